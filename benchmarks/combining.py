"""How much of two adapters is left in their sum, by the rules of lit_sparse.combine and of PEFT, at equal bytes.

Run:  python benchmarks/combining.py [--rows 1200] [--json FILE]

Two tasks for one encoder, MiniLM-L6, on the quickstart's reviews: whether a sentence is positive, and whether a text is
a critic's (Rotten Tomatoes) or the beginning of a user's (IMDB). A LoRA of rank 8 with a head learns each. The adapters
are added up without training, and each task is measured with its own head on 300 texts that were not trained on. The
weight is the factor of both adapters. Sums by singular values have the bytes of one adapter, and stacked ones those of
two. The table of docs/quality.md is made of benchmarks/results/combining.json.
"""

from __future__ import annotations

import argparse
import csv
import functools
import random
import tempfile
import time
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import peft
import tables
import torch
from torch import nn
from torch.utils.data import DataLoader
from variants import provenance, write_json

import lit_sparse as ls
from lit_sparse.data.quickstart import resolve, reviews_csv

MODEL = "quickstart://all-MiniLM-L6-v2"
TASKS = ("sentiment", "source")
RANK, HELD_OUT, WORDS = 8, 300, 20
WEIGHTS = (1.0, 0.5)
# Name → arguments of combine.
OURS: dict[str, dict[str, Any]] = {
    "concatenate": {},
    "svd": {"rule": "svd", "budget": 0.5},
    "ties": {"rule": "ties", "density": 0.2, "budget": 0.5},
    "dare": {"rule": "dare", "density": 0.5, "budget": 0.5},
}
# Name → arguments of add_weighted_adapter.
PEFT: dict[str, dict[str, Any]] = {
    "cat": {"combination_type": "cat"},
    "linear": {"combination_type": "linear"},
    "svd": {"combination_type": "svd", "svd_rank": RANK, "svd_full_matrices": False},
    "ties": {"combination_type": "ties", "density": 0.2},
    "ties_svd": {"combination_type": "ties_svd", "svd_rank": RANK, "density": 0.2, "svd_full_matrices": False},
    "dare_linear": {"combination_type": "dare_linear", "density": 0.5},
    "dare_linear_svd": {
        "combination_type": "dare_linear_svd",
        "svd_rank": RANK,
        "density": 0.5,
        "svd_full_matrices": False,
    },
}


def write_rows(folder: Path, count: int) -> None:
    """The rows of both tasks."""
    draw = random.Random(0)
    with reviews_csv().open(encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    draw.shuffle(rows)
    critics = [row for row in rows if row["source"] == "rotten_tomatoes"]
    users = [row for row in rows if row["source"] != "rotten_tomatoes"]
    half = (HELD_OUT + count) // 2
    mixed = [("critic", row) for row in critics[:half]] + [("user", row) for row in users[:half]]
    draw.shuffle(mixed)
    found = {
        "sentiment": [(row["text"], row["label"]) for row in critics[half : half + HELD_OUT + count]],
        "source": [(" ".join(row["text"].lower().split()[:WORDS]), kind) for kind, row in mixed],
    }
    for task, lines in found.items():
        (folder / task).mkdir()
        for split, part in (("validation", lines[:HELD_OUT]), ("train", lines[HELD_OUT:])):
            with (folder / task / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
                csv.writer(stream).writerows([("text", "label"), *part])


def trained(folder: Path, task: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The folder of an adapter without its head, and the head."""
    L.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.0, fused=True)
    method = ls.LoRA(rank=RANK, alpha=16)
    module = ls.SequenceClassification(MODEL, method, optimizer=optimizer, warmup=0.1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, ls.TextClassificationData(str(folder / task), batch_size=32))
    made = folder / f"{task} adapter"
    ls.export_peft(module.model, made, with_head=False)
    model: Any = module.model
    return str(made), {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}


@torch.no_grad()
def accuracy(model: Any, batches: DataLoader[Any]) -> float:
    hits = [(model(**{k: v for k, v in b.items() if k != "labels"}).logits.argmax(1) == b["labels"]) for b in batches]
    return float(torch.cat(hits).float().mean())


class Scores:
    """Measures both tasks, each with its head.

    Args:
        folder: With the rows of the tasks.
        heads: Task to head.
    """

    def __init__(self, folder: Path, heads: dict[str, dict[str, torch.Tensor]]) -> None:
        self.heads, self.batches = heads, {}
        for task in TASKS:
            data = ls.TextClassificationData(str(folder / task), batch_size=32, tokenizer=MODEL, eval_batch_size=100)
            data.setup("validate")
            self.batches[task] = data.val_dataloader()

    def of(self, model: Any) -> dict[str, float]:
        head = next(m for n, m in model.named_modules() if n.rpartition(".")[2] == "classifier")
        found = {}
        for task in TASKS:
            head.load_state_dict(self.heads[task])
            found[task] = accuracy(model.eval(), self.batches[task])
        return found


def plain() -> Any:
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(resolve(MODEL), num_labels=2)


def size_of(model: nn.Module) -> int:
    """Bytes of A and B of the adapter in use."""
    adapters = dict(ls.adapters_in(model)).values()
    if adapters:
        return sum(a.lora_A.nbytes + a.lora_B_t.nbytes for a in adapters)
    return sum(p.nbytes for n, p in model.named_parameters() if ".sum." in n)


def ours(folder: Path, sources: list[str], weight: float) -> Iterator[tuple[str, Any]]:
    for name, arguments in OURS.items():
        output = Path(tempfile.mkdtemp(dir=folder))
        ls.combine(sources, output, [weight] * 2, layout="ragged", **arguments)
        model = plain()
        ls.load_peft(model, output)
        yield f"lit_sparse {name}", model


def of_peft(sources: list[str], weight: float) -> Iterator[tuple[str, Any]]:
    for name, arguments in PEFT.items():
        torch.manual_seed(0)
        model = peft.PeftModel.from_pretrained(plain(), sources[0], adapter_name="one")
        model.load_adapter(sources[1], adapter_name="two")
        model.add_weighted_adapter(["one", "two"], [weight] * 2, adapter_name="sum", **arguments)
        model.set_adapter("sum")
        yield f"PEFT {name}", model


def measured(folder: Path) -> list[dict[str, Any]]:
    sources, heads = [], {}
    for task in TASKS:
        source, heads[task] = trained(folder, task)
        sources.append(source)
    scores = Scores(folder, heads)
    rows = []
    for task, source in zip(TASKS, sources, strict=True):
        model = plain()
        ls.load_peft(model, source)
        rows.append({"rule": f"{task} alone", "weight": 1.0, "bytes": size_of(model), **scores.of(model)})
        print(rows[-1], flush=True)
    for weight in WEIGHTS:
        for rule, model in chain(ours(folder, sources, weight), of_peft(sources, weight)):
            rows.append({"rule": rule, "weight": weight, "bytes": size_of(model), **scores.of(model)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1200)
    parser.add_argument("--json", type=str)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.rows)
        results = measured(folder)
    content = {**provenance(), "rows": options.rows, "seconds": time.process_time() - start, "results": results}
    print(tables.of_combining(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()
