"""What a training step costs with each way to adapt a model, against PEFT's LoRA and against no adapter at all.

Run:  python benchmarks/step_time.py [--backbone minilm|bert|llama] [--rank 8 32] [--dropout 0] [--tokens 64]
      [--rows 32] [--rounds 20] [--threads 1] [--variants NAME …] [--json FILE]

Every linear layer of the backbone's blocks is adapted, float32 on the CPU. Each round takes one step of every variant,
in a shuffled order; times are CPU times of the process. A ratio is the median of the ratios within a round. "update" is
the share of the step that follows the backward pass: observing, optimizer, thresholds and masks. "kept" is what
autograd keeps for the backward pass beyond the floor. Given several --tokens, the slope of the time over them is
printed, on logarithmic scales: 1 is linear.
"""

import argparse
import math
import statistics

import torch
from variants import BACKBONES, build, interleave, make_batch, provenance, ratio, saved_bytes, write_json


def measure(options: argparse.Namespace, rank: int, dropout: float, tokens: int) -> dict[str, dict[str, float]]:
    batch = make_batch(options.rows, tokens)
    variants = build(BACKBONES[options.backbone](), rank, dropout, options.variants)
    times = interleave(variants, batch, options.rounds)
    kept = {name: saved_bytes(variant.model, batch) for name, variant in variants.items()}
    found = {}
    for name, seconds in times.items():
        steps = [step for step, _ in seconds]
        row = {"ms": 1000 * statistics.median(steps), "kept_MiB": (kept[name] - kept.get("floor", 0)) / 2**20}
        row["update"] = statistics.median(update / step for step, update in seconds)
        for peer in ("PEFT LoRA", "floor"):
            if peer in times:
                row[f"/ {peer}"], low, high = ratio(steps, [step for step, _ in times[peer]])
                row[f"/ {peer}, quartiles"] = (low, high)  # type: ignore[assignment]
        found[name] = row
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    print(f"| {'':18} | ms | / PEFT LoRA | / floor | update | kept, MiB |\n|---|---|---|---|---|---|")
    for name, row in found.items():
        ratios = [f"{row[f'/ {peer}']:.3f}" if f"/ {peer}" in row else "" for peer in ("PEFT LoRA", "floor")]
        print(
            f"| {name:18} | {row['ms']:.0f} | {ratios[0]} | {ratios[1]} | {row['update']:.1%} | {row['kept_MiB']:.1f} |"
        )


def slope(tokens: list[int], milliseconds: list[float]) -> float:
    x, y = [math.log(t) for t in tokens], [math.log(m) for m in milliseconds]
    return statistics.linear_regression(x, y).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", choices=list(BACKBONES), default="minilm")
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[64])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--variants", nargs="+", help="only these, by the names in the table")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    machine = provenance()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = []
    for rank in options.rank:
        for dropout in options.dropout:
            by_tokens = []
            for tokens in options.tokens:
                found = measure(options, rank, dropout, tokens)
                print(f"\n{options.backbone}, rank {rank}, dropout {dropout:g}, {options.rows} × {tokens} tokens\n")
                show(found)
                by_tokens.append(found)
                results.append({"rank": rank, "dropout": dropout, "tokens": tokens, "variants": found})
            if len(by_tokens) > 1:
                for name in by_tokens[0]:
                    print(f"{name}: slope {slope(options.tokens, [found[name]['ms'] for found in by_tokens]):.2f}")
            write_json(options.json, {**machine, **vars(options), "results": results})


if __name__ == "__main__":
    main()
