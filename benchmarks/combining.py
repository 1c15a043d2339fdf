"""How much of two adapters is left in their sum, by the rules of lit_sparse.combine and of PEFT, at equal bytes.

Run:  python benchmarks/combining.py [--rows 1500] [--json FILE]

Two tasks for one encoder, MiniLM-L6, on the sentences of the quickstart: whether a review is positive, and whether it
is long, of 20 words or more (the probing task of Conneau et al. 2018, with two classes). A LoRA and a RoseLoRA of rank
8 with a head learn each. Their adapters are added up without training, and each task is measured with its own head on
400 sentences that were not trained on. The weight is the factor of both adapters. Sums by singular values have the
bytes of one adapter, and stacked ones those of two. The table of docs/quality.md is made of
benchmarks/results/combining.json.
"""

from __future__ import annotations

import argparse
import csv
import functools
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
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
TASKS = ("sentiment", "length")
RANK, HELD_OUT, LONG = 8, 400, 20
METHODS = {
    "LoRA": functools.partial(ls.LoRA, rank=RANK, alpha=16),
    "RoseLoRA": functools.partial(ls.RoseLoRA, rank=RANK, alpha=16, density=0.1, begin=0.2, end=0.8),
}
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
    """The rows of both tasks, which have the same sentences."""
    draw = random.Random(0)
    with reviews_csv().open(encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["source"] == "rotten_tomatoes"]
    draw.shuffle(rows)
    for split, part in (("validation", rows[:HELD_OUT]), ("train", rows[HELD_OUT : HELD_OUT + count])):
        labels = {
            "sentiment": [row["label"] for row in part],
            "length": ["long" if len(row["text"].split()) >= LONG else "short" for row in part],
        }
        for task in TASKS:
            (folder / task).mkdir(exist_ok=True)
            with (folder / task / f"{split}.csv").open("w", encoding="utf-8", newline="") as stream:
                texts = [row["text"] for row in part]
                csv.writer(stream).writerows([("text", "label"), *zip(texts, labels[task], strict=True)])


def trained(folder: Path, task: str, method: str) -> tuple[str, dict[str, torch.Tensor]]:
    """The folder of an adapter without its head, and the head."""
    L.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0, fused=True)
    module = ls.SequenceClassification(MODEL, METHODS[method](), optimizer=optimizer, warmup=0.1)
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
    made = folder / f"{task} {method}"
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


def ours(folder: Path, sources: list[str], weight: float, rules: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for name, arguments in ((name, OURS[name]) for name in rules):
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


def measured(folder: Path, method: str) -> list[dict[str, Any]]:
    sources, heads = [], {}
    for task in TASKS:
        source, heads[task] = trained(folder, task, method)
        sources.append(source)
    scores = Scores(folder, heads)
    rows = []
    for task, source in zip(TASKS, sources, strict=True):
        model = plain()
        ls.load_peft(model, source)
        rows.append(
            {"method": method, "rule": f"{task} alone", "weight": 1.0, "bytes": size_of(model), **scores.of(model)}
        )
    for weight in WEIGHTS:
        rules = list(OURS) if method == "LoRA" else ["concatenate", "svd"]
        peers = of_peft(sources, weight) if method == "LoRA" else ()
        for rule, model in chain(ours(folder, sources, weight, rules), peers):
            rows.append({"method": method, "rule": rule, "weight": weight, "bytes": size_of(model), **scores.of(model)})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1500)
    parser.add_argument("--json", type=str)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    start = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.rows)
        results = [row for method in METHODS for row in measured(folder, method)]
    content = {**provenance(), "rows": options.rows, "seconds": time.process_time() - start, "results": results}
    print(tables.of_combining(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()
