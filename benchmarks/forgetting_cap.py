"""What a cap of forgetting costs: a model of stories learns Shakespeare, and may forget the stories only so far.

Run:  python benchmarks/forgetting_cap.py --data FOLDER [--processes 2] [--results FILE]

FOLDER holds models/stories260k (a Llama of 260,000 parameters, trained on TinyStories), and train.jsonl and
validation.jsonl of text/tinyshakespeare and validation.jsonl of text/tinystories, with a text per row. LoRA learns
Shakespeare in 200 steps. The score is the share of the tokens of other Shakespeare that the model gives the highest
probability, and the probe is the loss on the stories. Plain training at three learning rates has several points of
score and probe; ForgettingCap trains at the highest two of them under two tolerances, and measures eight times. The
results go to benchmarks/results/forgetting-cap.json, and from there into docs/quality.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import lightning as L
import tables
import torch
from cells import Found, Store, run_missing
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity

RESULTS = Path(__file__).parent / "results" / "forgetting-cap.json"
SEEDS = (0, 1)
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
TOLERANCES = (0.1, 0.3)
STEPS, BATCH, TOKENS, MEASURED = 200, 16, 64, 64

Cell = tuple[float | None, float, int]
"""Tolerance, learning rate and seed."""


class Blocks(L.LightningDataModule):
    """The texts of a folder as one, in blocks of tokens."""

    def __init__(self, folder: Path, tokenizer: str, seed: int = 0) -> None:
        super().__init__()
        self.folder, self.tokenizer, self.seed = folder, tokenizer, seed

    def train_dataloader(self) -> DataLoader[Any]:
        order = torch.Generator().manual_seed(self.seed)
        return DataLoader(self._rows("train"), BATCH, shuffle=True, generator=order)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self._rows("validation")[:MEASURED], MEASURED)  # type: ignore[arg-type]

    def _rows(self, split: str) -> list[dict[str, Tensor]]:
        lines = (self.folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        text = "\n".join(json.loads(line)["text"] for line in lines)
        ids = torch.tensor(AutoTokenizer.from_pretrained(self.tokenizer)(text)["input_ids"])
        whole = ids[: len(ids) // TOKENS * TOKENS].view(-1, TOKENS)
        return [{"input_ids": row, "labels": row} for row in whole]


def run(data: Path, cell: Cell) -> dict[str, Any]:
    tolerance, lr, seed = cell
    start = time.process_time()
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    model = str(data / "models" / "stories260k")
    stories = Blocks(data / "text" / "tinystories", model)
    probe = ls.ForgettingProbe(stories) if tolerance is None else ls.ForgettingCap(stories, tolerance)
    optimizer = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.01)
    module = ls.CausalLM(model, ls.LoRA(rank=8, alpha=16), optimizer=optimizer, warmup=0.1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=STEPS,
        val_check_interval=STEPS // 8,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Blocks(data / "text" / "tinyshakespeare", model, seed))
    layers = layer_sparsity(module)
    return {
        "method": "LoRA" if tolerance is None else f"LoRA, cap {tolerance:g}",
        "lr": lr,
        "seed": seed,
        "score": 100 * float(trainer.callback_metrics["val_token_accuracy"]),
        "before": {"stories, loss": (probe.before or {})["loss"]},
        "after": {"stories, loss": (probe.after or {})["loss"]},
        "changed": sum(layer.density_BA * layer.adapted_parameters for layer in layers)
        / sum(layer.adapted_parameters for layer in layers),
        "scale": getattr(probe, "scale", 1.0),
        "seconds": time.process_time() - start,
    }


def missing(found: Found) -> dict[str, Cell]:
    plain: list[Cell] = [(None, lr, seed) for seed in SEEDS for lr in LEARNING_RATES]
    capped: list[Cell] = [(cap, lr, seed) for seed in SEEDS for cap in TOLERANCES for lr in LEARNING_RATES[1:]]
    cells = {"/".join(map(str, cell)): cell for cell in plain + capped}
    return {key: cell for key, cell in cells.items() if key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.results)
    run_missing(store, missing, functools.partial(run, options.data), options.processes)
    print(tables.of_forgetting(store.read()))
    if options.results == RESULTS:
        tables.write()


if __name__ == "__main__":
    main()
