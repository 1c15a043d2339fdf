"""Hold the quickstart runs to what the README promises of them."""

import csv
import sys
from pathlib import Path


def best_accuracy(run: Path) -> float:
    with (run / "metrics.csv").open(newline="") as file:
        return max(float(row["val_accuracy"]) for row in csv.DictReader(file) if row["val_accuracy"])


def main() -> None:
    runs = Path(sys.argv[1])
    found = {}
    for method in ("sora", "int8", "roselora", "lora"):
        run = runs / f"quickstart_{method}" / "version_0"
        with (run / "sparsity.csv").open(newline="") as file:
            layers = list(csv.DictReader(file))
        zero = 1 - sum(int(row["rank"]) for row in layers) / sum(int(row["max_rank"]) for row in layers)
        adapted = [int(row["adapted_parameters"]) for row in layers]
        changed = sum(float(row["density_BA"]) * size for row, size in zip(layers, adapted, strict=True)) / sum(adapted)
        left = sum(int(row["remaining_parameters"]) for row in layers)
        found[method] = best_accuracy(run), left, changed
        print(
            f"{method:9} accuracy {found[method][0]:.4f}, {left:,} parameters, zero ranks {zero:.1%}, "
            f"changed weights {changed:.2%}"
        )
    sora, rose, lora = found["sora"], found["roselora"], found["lora"]
    promises = {
        "SoRA reaches 0.80": sora[0] >= 0.80,
        "SoRA keeps a quarter of LoRA's parameters": 0.2475 <= sora[1] / lora[1] <= 0.25,
        "SoRA is within 1 point of LoRA": sora[0] >= lora[0] - 0.01,
        # Seeds of SoRA alone differ by one point (docs/quality.md): closer than two says nothing about the encoder.
        "SoRA on an int8 encoder is within 2 points of SoRA": abs(found["int8"][0] - sora[0]) <= 0.02,
        "SoRA on an int8 encoder keeps a quarter, too": 0.2475 <= found["int8"][1] / lora[1] <= 0.25,
        "RoseLoRA is within 1.5 points of LoRA": rose[0] >= lora[0] - 0.015,
        "RoseLoRA changes at most 5 % of the adapted weights": rose[2] <= 0.05,
    }
    broken = [promise for promise, kept in promises.items() if not kept]
    if broken:
        sys.exit(f"broken: {'; '.join(broken)}")


if __name__ == "__main__":
    main()
