"""What a training step costs with each way to adapt a model, against PEFT's LoRA and against no adapter at all.

Run:  python benchmarks/step_time.py [--backbone minilm|bert|llama] [--rank 8 32] [--dropout 0] [--tokens 64]
      [--layers 4] [--rows 32] [--rounds 20] [--threads 1] [--variants NAME …] [--keep-freed-memory] [--json FILE]

Every linear layer of the blocks is adapted, float32 on the CPU, and variants share the frozen weights. A round
takes a step of every variant, in a shuffled order; times are CPU times of the process. A ratio is the median of the
ratios within a round. "update" is the share of the step that follows the backward pass: observing, optimizer,
thresholds and masks. "peak" is the most memory that tensors take at once in a step, beyond what the floor's take.
--keep-freed-memory lets the process keep what it freed, as glibc does not: without, a part of what a variant costs is
pages that it gives back and gets anew. --layers is for bert and llama, whose weights are random. Given several
--tokens or --layers, the slope of the time over them is printed, on logarithmic scales: 1 is linear. The tables of
docs/performance.md are made from the files that --json writes, by benchmarks/tables.py.
"""

import argparse
import statistics
from typing import Any

import torch
from tables import slopes, step_table
from variants import (
    BACKBONES,
    COMPILED,
    build,
    interleave,
    keep_freed_memory,
    make_batch,
    peak_memory,
    provenance,
    ratio,
    write_json,
)


def measure(options: argparse.Namespace, rank: int, dropout: float, tokens: int, layers: int) -> dict[str, Any]:
    batch = make_batch(options.rows, tokens)
    plain = BACKBONES[options.backbone](*([layers] if layers else []))
    variants = build(plain, rank, dropout, options.variants)
    times = interleave(variants, batch, options.rounds)
    peaks = {name: peak_memory(variant, batch) for name, variant in variants.items()}
    found: dict[str, Any] = {}
    for name, seconds in times.items():
        row = {
            "ms": 1000 * statistics.median(t.step for t in seconds),
            "wall_ms": 1000 * statistics.median(t.wall for t in seconds),
            "update": statistics.median(t.update / t.step for t in seconds),
            "peak_MiB": (peaks[name] - peaks.get("floor", 0)) / 2**20,
        }
        for peer in ("PEFT LoRA", "floor"):
            if peer in times:
                row[f"/ {peer}"] = ratio([t.step for t in seconds], [t.step for t in times[peer]])
        eager = name.removesuffix(COMPILED)
        if eager != name and eager in times:
            row["/ eager"] = ratio([t.step for t in seconds], [t.step for t in times[eager]])
        found[name] = row
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="minilm")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--layers", type=int, nargs="+", help="how many blocks, for bert and llama; 4 if not given")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", help='only these, by the names in the table, or "NAME, compiled"')
    parser.add_argument("--keep-freed-memory", action="store_true")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    if options.layers and options.backbone == "minilm":
        parser.error("minilm has the layers that it has: give --layers with bert or llama")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.keep_freed_memory:
        keep_freed_memory()
    machine = provenance()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results: list[dict[str, Any]] = []
    for rank in options.rank:
        for dropout in options.dropout:
            for layers in options.layers or [0]:
                for tokens in options.tokens:
                    found = measure(options, rank, dropout, tokens, layers)
                    results.append(
                        {"rank": rank, "dropout": dropout, "tokens": tokens, "layers": layers, "variants": found}
                    )
                    print(f"\n{step_table(options.backbone, options.rows, results[-1])}", flush=True)
                    write_json(options.json, {**machine, **vars(options), "results": results})
    print(f"\n{slopes(results)}")


if __name__ == "__main__":
    main()
