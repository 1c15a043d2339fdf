"""What a training step costs after compaction, against the same step with all ranks held.

Run:  python benchmarks/compaction.py [--rank 8 32] [--left 0.3] [--rounds 30] [--threads 1]

MiniLM-L6 with its real weights (extra quickstart), SoRA on every linear layer, batch 32 × 64 tokens, float32, fused
AdamW. Ranks die unevenly over the layers, as they do in training. Each round takes one step of every variant, in a
shuffled order; times are CPU times of the process, medians over the rounds, and the ratio is the median of those within
a round, with its quartiles.
"""

import argparse
import copy
import platform
import random
import statistics
import time

import torch
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse import quickstart


def backbone() -> torch.nn.Module:
    folder = quickstart.resolve("quickstart://all-MiniLM-L6-v2")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()


@torch.no_grad()
def kill_gates(model: torch.nn.Module, left: float) -> None:
    """Zero all but a share of the gates, of some layers more than of others."""
    generator = torch.Generator().manual_seed(0)
    gates = [adapter.gate for _, adapter in ls.adapters_in(model)]
    strength = [torch.rand(g.shape, generator=generator) + 0.6 * torch.rand(1, generator=generator) for g in gates]
    limit = torch.cat(strength).quantile(1 - left)
    for gate, values in zip(gates, strength, strict=True):
        gate[values < limit] = 0


class Variant:
    """A model with its optimizer, and a step of it."""

    def __init__(self, model: torch.nn.Module, method: ls.SparseMethod, left: float | None) -> None:
        self.model = model
        ls.inject(model, method)
        self.optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-4, fused=True)
        self.steps = ls.SparseSteps(method, model, self.optimizer, total_steps=None)
        if left is not None:
            kill_gates(model, left)
            ls.compact(model, self.optimizer)
        self.ranks = sum(adapter.rank for _, adapter in ls.adapters_in(model))

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """CPU seconds of one training step."""
        start = time.process_time()
        self.model(**batch).loss.backward()
        self.steps.observe()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--left", type=float, default=0.3, help="share of the ranks that is left")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (32, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(32) % 2}
    plain = backbone()
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), {options.rounds} rounds")
    for rank in options.rank:
        # A threshold of zero: gates are stepped, and none dies in the meantime.
        method = ls.SoRA(rank=rank, alpha=16, threshold=0.0)
        variants = {
            "all ranks": Variant(copy.deepcopy(plain), method, None),
            "compacted": Variant(copy.deepcopy(plain), method, options.left),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 3):
            for name in random.sample(list(variants), len(variants)):
                seconds = variants[name].step(batch)
                if number >= 3:  # the first ones warm up
                    times[name].append(seconds)
        ratios = [b / a for a, b in zip(times["all ranks"], times["compacted"], strict=True)]
        quarter, half, three = statistics.quantiles(ratios, n=4)
        for name, variant in variants.items():
            print(f"r = {rank:3}  {name:10}  {variant.ranks:5} ranks  {1000 * statistics.median(times[name]):8.1f} ms")
        print(f"r = {rank:3}  ratio {half:.3f} ({quarter:.3f} to {three:.3f})")


if __name__ == "__main__":
    main()
