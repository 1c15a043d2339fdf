"""A long run, with everything that goes on beside the steps: does memory, time or what is written grow?

Run:  python benchmarks/soak.py [--steps 20000] [--json FILE]

A small encoder with random weights learns two kinds of text by SoRA, with the monitor, checkpoints, compaction, exact
resuming and validation, in epochs of 200 steps. Memory is what the process has of the machine's (resident), its slope a
least-squares line through the second half of the run; a step's time is the median of a tenth of the run.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from transformers import BertConfig, BertForSequenceClassification
from variants import provenance

import lit_sparse as ls

EVERY = 100  # steps between two looks at the process


class Look(L.Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.looks: list[dict[str, float]] = []
        self._last = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step % EVERY:
            return
        now = time.perf_counter()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        files = {path: path.stat().st_size for path in self.folder.rglob("*") if path.is_file()}
        look = {
            "step": trainer.global_step,
            "MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "ms": 1000 * (now - self._last) / EVERY,
            "checkpoints": sum(path.suffix == ".ckpt" for path in files),
            "checkpoint_KiB": max((size for path, size in files.items() if path.suffix == ".ckpt"), default=0) / 1024,
            "log_KiB": sum(size for path, size in files.items() if path.name == "metrics.csv") / 1024,
            "ranks": sum(adapter.rank for _, adapter in ls.adapters_in(trainer.lightning_module)),
            "open_files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        }
        if self._last:
            self.looks.append(look)
        self._last = now


def slope(looks: list[dict[str, float]], key: str) -> float:
    """Of ``key`` over a thousand steps."""
    return 1000 * statistics.linear_regression([look["step"] for look in looks], [look[key] for look in looks]).slope


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    kind = torch.arange(3200) % 2
    tokens = torch.randint(2, 48, (3200, 12)) + 16 * kind[:, None] % 64
    rows = [{"input_ids": row % 64, "labels": label} for row, label in zip(tokens, kind, strict=True)]
    method = ls.SoRA("all-linear", rank=8, sparsity_weight=0.2, gate_lr=1e-2)
    module = ls.SparseModule(
        BertForSequenceClassification(config), method, optimizer=partial(torch.optim.AdamW, lr=1e-3, fused=True)
    )
    with tempfile.TemporaryDirectory() as name:
        look = Look(Path(name))
        trainer = L.Trainer(
            accelerator="cpu", max_steps=options.steps, max_epochs=-1, log_every_n_steps=50, val_check_interval=200,
            logger=CSVLogger(name, "logs"), enable_model_summary=False, enable_progress_bar=False,
            callbacks=[
                ls.SparsityMonitor(), ls.CompactRanks(100), look,
                ModelCheckpoint(
                    f"{name}/kept", every_n_train_steps=500, save_top_k=2, monitor="step", mode="max", save_last=True
                ),
            ],
        )  # fmt: skip
        trainer.fit(
            module,
            torch.utils.data.DataLoader(rows, batch_size=16, shuffle=True),
            torch.utils.data.DataLoader(rows[:64], batch_size=16),
        )
    looks = look.looks
    half, tenth = looks[len(looks) // 2 :], max(1, len(looks) // 10)
    print(
        f"{'steps':>12} {'MiB':>8} {'ms/step':>8} {'ckpts':>6} {'ckpt KiB':>9} {'log KiB':>9} {'ranks':>6} {'files':>6}"
    )
    for first in range(0, len(looks), tenth):
        part = looks[first : first + tenth]
        last = part[-1]
        print(
            f"{last['step']:>12,} {last['MiB']:8.1f} {statistics.median(p['ms'] for p in part):8.2f} "
            f"{last['checkpoints']:6.0f} {last['checkpoint_KiB']:9.1f} {last['log_KiB']:9.1f} {last['ranks']:6.0f} "
            f"{last['open_files']:6.0f}"
        )
    found = {
        "MiB_per_1000_steps": slope(half, "MiB"),
        "ms_per_step_per_1000_steps": slope(half, "ms"),
        "log_KiB_per_1000_steps": slope(half, "log_KiB"),
        "checkpoint_KiB_per_1000_steps": slope(half, "checkpoint_KiB"),
    }
    print("Second half, in 1,000 steps: " + ", ".join(f"{key} {value:+.4f}" for key, value in found.items()))
    if options.json:
        content = {**provenance(), "steps": options.steps, "slopes": found, "looks": looks}
        Path(options.json).write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
