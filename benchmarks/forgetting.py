"""What a sentence encoder forgets: how well its embeddings tell similar sentences, before and after another task.

Run:  python benchmarks/forgetting.py --data FOLDER [--processes 2] [--epochs 1] [--results FILE]

MiniLM-L6 (extra quickstart), an encoder of sentences, learns the sentiment of movie reviews by each method. FOLDER
holds stsb/validation.jsonl of GLUE (sentence1, sentence2, label): the probe is Spearman's correlation between the
cosine of the two mean-pooled embeddings and the label, which no method is trained on. Four learning rates give each
method several points of task accuracy and probe, for methods are to be compared where their accuracies are equal; three
seeds for each. Runs that are in the results are not repeated. They go to benchmarks/results/forgetting.json, and from
there into docs/quality.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import tables
import torch
from cells import Found, Store, run_missing
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import AutoTokenizer
from variants import mean_of_tokens

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.data import quickstart

RESULTS = Path(__file__).parent / "results" / "forgetting.json"
BACKBONE = "quickstart://all-MiniLM-L6-v2"
SEEDS = (0, 1, 2)
LEARNING_RATES = (2e-4, 5e-4, 1.5e-3, 4e-3)
METHODS = {
    "LoRA": ls.LoRA(rank=8, alpha=16),
    "SoRA": ls.SoRA(rank=8, alpha=32, sparsity_weight=0.6, gate_lr=1e-2),
    "RoseLoRA": ls.RoseLoRA(rank=8, alpha=16, density=0.08, begin=0.1, end=0.5, update_every=10),
}


class SentencePairs(L.LightningDataModule):
    """Pairs of sentences, each tokenised apart, with how similar they are."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def val_dataloader(self) -> DataLoader[Any]:
        rows = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        tokenizer = AutoTokenizer.from_pretrained(str(quickstart.resolve(BACKBONE)))

        def collate(part: list[dict[str, Any]]) -> dict[str, Any]:
            sides = [[row[name] for row in part] for name in ("sentence1", "sentence2")]
            first, second = (dict(tokenizer(side, padding=True, return_tensors="pt")) for side in sides)
            return {"first": first, "second": second, "label": torch.tensor([row["label"] for row in part])}

        return DataLoader(rows, batch_size=64, collate_fn=collate)  # type: ignore[arg-type]


@torch.no_grad()
def similarity(module: L.LightningModule, batches: Iterable[Any], _: L.LightningDataModule) -> dict[str, float]:
    """Spearman's correlation, in per cent, between cosines of embeddings and labels."""
    was_training = module.training
    module.eval()
    cosines, labels = [], []
    for batch in batches:
        first, second = (_embedding(module, batch[side]) for side in ("first", "second"))
        cosines.append(torch.cosine_similarity(first, second))
        labels.append(batch["label"].float())
    module.train(was_training)
    return {"STS-B, Spearman": 100 * float(spearman_corrcoef(torch.cat(cosines), torch.cat(labels)))}


def _embedding(module: L.LightningModule, tokens: dict[str, Tensor]) -> Tensor:
    hidden = module.model.base_model(**tokens).last_hidden_state  # type: ignore[operator, union-attr]
    return mean_of_tokens(hidden, tokens["attention_mask"])


def run(data: Path, epochs: int, cell: tuple[str, float, int]) -> dict[str, Any]:
    method, lr, seed = cell
    start = time.perf_counter()
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    probe = ls.ForgettingProbe(SentencePairs(data / "stsb" / "validation.jsonl"), "stsb", measure=similarity)
    optimizer = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.01, fused=True)
    module = ls.SequenceClassification(BACKBONE, METHODS[method], optimizer=optimizer, warmup=0.3)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[probe],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, ls.QuickstartReviews(seed=seed))
    layers = layer_sparsity(module)
    changed = sum(layer.density_BA * layer.adapted_parameters for layer in layers)
    assert probe.before is not None
    assert probe.after is not None
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "score": 100 * float(trainer.callback_metrics["val_accuracy"]),
        "before": probe.before,
        "after": probe.after,
        "changed": changed / sum(layer.adapted_parameters for layer in layers),
        "seconds": time.perf_counter() - start,
    }


def missing(found: Found) -> dict[str, tuple[str, float, int]]:
    cells = {f"{m}/{lr:g}/{seed}": (m, lr, seed) for seed in SEEDS for m in METHODS for lr in LEARNING_RATES}
    return {key: cell for key, cell in cells.items() if key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with stsb/validation.jsonl")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.results)
    run_missing(store, missing, functools.partial(run, Path(options.data), options.epochs), options.processes)
    print(tables.of_forgetting(store.read()))
    if options.results == RESULTS:
        tables.write()


if __name__ == "__main__":
    main()
