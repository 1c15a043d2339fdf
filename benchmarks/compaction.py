"""What a training step costs after compaction, against all ranks held, PEFT's LoRA, and no adapters at all.

Run:  python benchmarks/compaction.py [--rank 8 32] [--left 0.3] [--rounds 30] [--threads 1] [--checkpoint FILE]
      [--json FILE]

MiniLM-L6 with its real weights (extra quickstart), SoRA on every linear layer, batch 32 × 64 tokens, float32, fused
AdamW; PEFT's LoRA (extra peft) on the same layers, and the floor: the frozen backbone with gradients flowing through it
to its embeddings. Ranks die unevenly over the layers, as they do in training; given a checkpoint of the quickstart that
CompactRanks cut, they are those that it has left. Each round takes one step of every variant, in a shuffled order;
times are CPU times of the process, medians over the rounds, and ratios are medians of those within a round, with their
quartiles. "compact" is what taking the ranks out costs once, in CPU time, and after "break-even" steps it has paid.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from tables import compaction_table
from variants import (
    Batch,
    Variant,
    interleave,
    make_batch,
    minilm,
    peft_lora,
    provenance,
    ratio,
    twin,
    with_floor,
    with_method,
    with_peft,
    write_json,
)

import lit_sparse as ls


@torch.no_grad()
def kill_gates(model: torch.nn.Module, left: float | dict[str, int]) -> None:
    """Zero all but a share of the gates, of some layers more than of others; or all but so many of each layer."""
    if isinstance(left, dict):
        for name, adapter in ls.adapters_in(model):
            adapter.gate[left[name] :] = 0
        return
    generator = torch.Generator().manual_seed(0)
    gates = [adapter.gate for _, adapter in ls.adapters_in(model)]
    strength = [torch.rand(g.shape, generator=generator) + 0.6 * torch.rand(1, generator=generator) for g in gates]
    limit = torch.cat(strength).quantile(1 - left)
    for gate, values in zip(gates, strength, strict=True):
        gate[values < limit] = 0


def compacted(
    model: torch.nn.Module, method: ls.SparseMethod, left: float | dict[str, int], batch: Batch
) -> tuple[Variant, float]:
    """Adapters of ours of whose ranks a part is left, and the seconds that it took to take the others out."""
    variant = with_method(model, method)
    variant.step(batch)  # for the optimizer to have a state, which is cut too
    kill_gates(model, left)
    start = time.process_time()
    ls.compact(model, variant.optimizer)
    return variant, time.process_time() - start


def trained_ranks(checkpoint: str) -> tuple[int, dict[str, int]]:
    """Rank at the start, and ranks left by layer."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["lit_sparse"]
    left = {name.removeprefix("model."): rank for name, rank in saved["ranks_left"].items()}
    return max(saved["ranks"].values()), left


def ranks(variant: Variant) -> int:
    return sum(adapter.rank for _, adapter in ls.adapters_in(variant.model))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--left", type=float, default=0.3, help="share of the ranks that is left")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", help="take rank and ranks left from it")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    left = options.left
    if options.checkpoint:
        rank, left = trained_ranks(options.checkpoint)
        options.rank = [rank]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    plain, batch = minilm(), make_batch(32, 64)
    results = [measure(options, plain, batch, rank, left) for rank in options.rank]
    print("\n\n".join(compaction_table(result) for result in results))
    write_json(options.json, {**provenance(), **vars(options), "results": results})


def measure(
    options: argparse.Namespace, plain: torch.nn.Module, batch: Batch, rank: int, left: float | dict[str, int]
) -> dict[str, Any]:
    # A threshold of zero: gates are stepped, and none dies in the meantime.
    method = ls.SoRA(rank=rank, alpha=16, threshold=0.0)
    small, once = compacted(twin(plain), method, left, batch)
    variants = {
        "floor": with_floor(twin(plain)),
        "PEFT LoRA": with_peft(twin(plain), peft_lora(rank, dropout=0.0)),
        "all ranks": with_method(twin(plain), method),
        "compacted": small,
    }
    times = {name: [t.step for t in found] for name, found in interleave(variants, batch, options.rounds).items()}
    saved = statistics.median(a - b for a, b in zip(times["all ranks"], times["compacted"], strict=True))
    return {
        "rank": rank,
        "ranks": {name: ranks(variant) for name, variant in variants.items()},
        "ms": {name: 1000 * statistics.median(seconds) for name, seconds in times.items()},
        "/ all ranks": {name: ratio(seconds, times["all ranks"]) for name, seconds in times.items()},
        "/ PEFT LoRA": {name: ratio(seconds, times["PEFT LoRA"]) for name, seconds in times.items()},
        "compact_ms": 1000 * once,
        "break_even_steps": once / saved if saved > 0 else None,
    }


if __name__ == "__main__":
    main()
