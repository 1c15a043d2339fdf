"""How good the methods are on GLUE tasks with MiniLM, with equal budgets and an equal search for hyper-parameters.

Run:  python benchmarks/quality.py --data FOLDER [--processes 2] [--tasks …] [--methods …] [--again KEY]

FOLDER holds a folder per task with train.jsonl and validation.jsonl, in the columns of the hub's nyu-mll/glue. Every
method searches the same three learning rates for every task, and up to two more where the best is the lowest or the
highest, on 500 rows held out of the training rows; with the best one it is trained by three seeds, and measured once,
at the end, on the validation set, which no method's rate was chosen on.
Steps, batches, backbone and schedule are the same for all; the backbone's own dropout is off, with which nothing is
learnt in so few steps, and matrices are multiplied in bfloat16.
Each run is a cell of its own: one process after another, or several at once, take those that are missing, a run that
was killed begins anew, and the rest stays. --again trains one cell anew and compares. The results go to
benchmarks/results/quality.json, and from there into docs/quality.md and its figures.
"""

from __future__ import annotations

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import figures
import peft
import tables
import torch
from cells import Found, Store, run_missing
from tables import METHODS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import (
    AutoConfig,
    BertConfig,
    BertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from variants import mean_of_tokens, peft_adalora

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.data import quickstart
from lit_sparse.modules.metrics import build_metrics, predictions
from lit_sparse.modules.optimization import lr_scheduler

RESULTS = Path(__file__).parent / "results" / "quality.json"
SEEDS = (0, 1, 2)
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
EXTENSIONS = 2  # rates to try beyond these, where the best is at an end
HELD_OUT, MAX_LENGTH = 500, 64


class Task(NamedTuple):
    """How long a task is trained, and what is reported."""

    steps: int
    metric: str
    batch: int = 8
    train_rows: int | None = None
    validation_rows: int | None = None


TASKS = {
    "cola": Task(800, "matthews", batch=16),
    "mrpc": Task(480, "accuracy"),
    "rte": Task(300, "accuracy"),
    "stsb": Task(600, "pearson"),
    "sst2": Task(600, "accuracy", train_rows=8000),
    "qnli": Task(480, "accuracy", train_rows=6000, validation_rows=1500),
}


Adapting = ls.Method | Callable[[nn.Module], peft.PeftConfig]
"""A method, or PEFT's configuration for a model."""


def adalora(initial: int, final: int, steps: int) -> Callable[[nn.Module], peft.PeftConfig]:
    """PEFT's AdaLoRA, from an initial to a final mean rank."""

    def config(model: nn.Module) -> peft.PeftConfig:
        made = peft_adalora(model, rank=initial, dropout=0.0)
        made.target_r, made.total_step = final, steps
        made.tinit, made.tfinal = round(0.1 * steps), round(0.5 * steps)
        return made

    return config


def method_of(name: str, steps: int) -> Adapting:
    """The method in a run of so many steps."""
    # All thresholds of a run together are the same however long it is: about 0.7, of gates that begin near 1.
    gates = {"sparsity_weight": 0.6, "gate_lr": 2.2 / steps}
    masks = {"density": 0.12, "begin": round(0.1 * steps), "end": round(0.5 * steps)}
    methods: dict[str, Adapting] = {
        "LoRA": ls.LoRA(rank=8, alpha=16),
        "AdaLoRA": adalora(12, 8, steps),
        "SoRA": ls.SoRA(rank=8, alpha=32, **gates),
        "RoseLoRA": ls.RoseLoRA(rank=8, alpha=64, **masks),
        "gated RoseLoRA": ls.GatedRoseLoRA(rank=8, alpha=64, **gates, **masks),
    }
    return methods[name]


class Cell(NamedTuple):
    """One run."""

    phase: str
    """``search`` (measured on rows held out of the training rows) or ``final`` (on the validation set)."""
    task: str
    method: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.task}/{self.method}/{self.lr:g}/{self.seed}"


def half() -> torch.autocast:
    """Faster on processors that know bfloat16 (1.5 times as many tokens here); weights and adapters stay in float32."""
    return torch.autocast("cpu", torch.bfloat16)


def run(data: Path, cell: Cell) -> dict[str, Any]:
    """Train and measure one cell."""
    start = time.process_time()  # of one thread: what a run takes with nothing beside it
    task = TASKS[cell.task]
    with rows_of(data, cell.task, cell.phase, cell.seed, backbone()) as rows:
        model = mean_pooled(rows.num_labels or 1, backbone())
        model = train(model, method_of(cell.method, task.steps), rows, task, cell.lr)
        score = measure(model, rows, task)
    return {**cell._asdict(), "score": score, **left(model), "seconds": time.process_time() - start}


@contextmanager
def rows_of(data: Path, task: str, phase: str, seed: int, tokenizer: str) -> Iterator[ls.GLUE]:
    """The rows of a run, in the order of its seed, with which everything random of the run is set."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        _write_rows(data / task, Path(folder), TASKS[task], phase)
        size = TASKS[task].batch
        rows = ls.GLUE(folder, task=task, tokenizer=tokenizer, max_length=MAX_LENGTH, batch_size=size, seed=seed)
        rows.prepare_data()
        rows.setup("fit")
        yield rows


def train(model: nn.Module, method: Adapting, rows: ls.GLUE, task: Task, lr: float) -> nn.Module:
    """The model with adapters, trained."""
    model, steps = _adapted(model, method, rows, task, lr)
    for layer in model.modules():
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad:
            layer.to(torch.bfloat16)  # what half() rounds it to at every step: the same numbers in 4/5 of the time
    for batch in _batches(rows.train_dataloader(), task.steps):
        steps(batch)
    return model


def measure(model: nn.Module, rows: ls.GLUE, task: Task) -> float:
    """The score on the rows to measure on, in per cent."""
    count = rows.num_labels or 1
    metric = build_metrics([task.metric], count)[task.metric]
    model.eval()
    with torch.inference_mode():
        for batch in rows.val_dataloader():
            with half():
                logits = model(**batch).logits
            metric.update(predictions(logits, count), batch["labels"])
    score = 100 * float(metric.compute())
    return 0.0 if math.isnan(score) else score  # the same for every row: no correlation


def _adapted(
    model: nn.Module, method: Adapting, rows: ls.GLUE, task: Task, lr: float
) -> tuple[nn.Module, Callable[[dict[str, Any]], None]]:
    """The model with adapters, and what takes a step of training with a batch."""

    def loss(batch: dict[str, Any]) -> Tensor:
        with half():
            return model(**batch).loss  # type: ignore[no-any-return]

    if isinstance(method, ls.Method):
        ls.inject(model, method)
        if method.batch_start is not None:
            ls.start_from_batches(model, method, _batches(rows.train_dataloader(), method.start_batches), loss)
        groups = ls.parameter_groups(model, method)
    else:
        model = peft.get_peft_model(model, method(model))
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)
    schedule = lr_scheduler(optimizer, "linear", 0.3, task.steps)
    sparse = None
    if isinstance(method, ls.Method):
        sparse = ls.SparseSteps(method, model, optimizer, total_steps=task.steps, lr_scheduler=schedule)
    taken = 0

    def step(batch: dict[str, Any]) -> None:
        nonlocal taken
        loss(batch).backward()
        if sparse is not None:
            sparse.observe()
        torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        taken += 1
        if sparse is None:
            model.base_model.update_and_allocate(taken)  # type: ignore[operator, union-attr]
        schedule.step()
        optimizer.zero_grad()

    return model, step


def left(model: nn.Module) -> dict[str, Any]:
    """What the adapters hold at the end: parameters not zero, share of the weights changed, ranks of each layer."""
    layers = layer_sparsity(model)
    if layers:
        changed = sum(layer.density_BA * layer.adapted_parameters for layer in layers)
        return {
            "parameters": sum(layer.remaining_parameters for layer in layers),
            "changed": changed / sum(layer.adapted_parameters for layer in layers),
            "ranks": {layer.name: layer.rank for layer in layers},
        }
    ranks, parameters = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.adalora.layer.AdaLoraLayer):
            E, A, B = module.lora_E["default"], module.lora_A["default"], module.lora_B["default"]
            live = int((E != 0).sum())
            ranks[name.removeprefix("base_model.model.")] = live
            parameters += live * (1 + A.shape[1] + B.shape[0])
    return {"parameters": parameters, "changed": 1.0, "ranks": ranks}


def _answer(model: Any, hidden: Tensor, attention_mask: Tensor, labels: Tensor) -> SequenceClassifierOutput:
    logits = model.classifier(mean_of_tokens(hidden, attention_mask)).float()
    regression = model.config.num_labels == 1
    loss = mse_loss(logits.squeeze(1), labels.float()) if regression else cross_entropy(logits, labels)
    return SequenceClassifierOutput(loss=loss, logits=logits)


class MeanPooledBert(BertForSequenceClassification):
    """The encoder with a head on the mean of its tokens, which is how this one was trained to be read.

    Its first token, which transformers' head reads, was trained for nothing: with it some runs at a rate of 1e-3
    end with hidden values that are the same for all rows.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.bert.pooler = None

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, token_type_ids: Tensor | None = None, **_: Any
    ) -> SequenceClassifierOutput:  # PEFT gives all other arguments of transformers, as None
        hidden = self.bert(input_ids, attention_mask, token_type_ids).last_hidden_state
        return _answer(self, hidden, attention_mask, labels)


class MeanPooledMPNet(MPNetForSequenceClassification):
    """The same of a larger encoder, with the same head."""

    def __init__(self, config: MPNetConfig) -> None:
        super().__init__(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def forward(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **_: Any
    ) -> SequenceClassifierOutput:
        return _answer(self, self.mpnet(input_ids, attention_mask).last_hidden_state, attention_mask, labels)


def mean_pooled(num_labels: int, folder: str) -> nn.Module:
    """The encoder of a folder."""
    kind: Any = MeanPooledMPNet if AutoConfig.from_pretrained(folder).model_type == "mpnet" else MeanPooledBert
    model: nn.Module = kind.from_pretrained(
        folder,
        num_labels=num_labels,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",  # in bfloat16 torch's fused attention takes 29 % of a step on the CPU, in backward
    )
    return model.train()


def backbone() -> str:
    """The folder of the quickstart's encoder."""
    return str(quickstart.resolve("quickstart://all-MiniLM-L6-v2"))


def _write_rows(source: Path, folder: Path, task: Task, phase: str) -> None:
    """The training rows, and those to measure on: the same ones for all methods and seeds."""
    train = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
    train = random.Random(0).sample(train, task.train_rows or len(train))
    if phase == "search":
        train, measured = train[HELD_OUT:], train[:HELD_OUT]
    else:
        measured = (source / "validation.jsonl").read_text(encoding="utf-8").splitlines()
        measured = random.Random(0).sample(measured, task.validation_rows or len(measured))
    (folder / "train.jsonl").write_text("\n".join(train) + "\n", encoding="utf-8")
    (folder / "validation.jsonl").write_text("\n".join(measured) + "\n", encoding="utf-8")


def _batches(loader: Any, count: int) -> Iterator[dict[str, Any]]:
    taken = epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        for batch in loader:
            yield batch
            taken += 1
            if taken == count:
                return
        epoch += 1


# Which cells there are, and which are missing.


def searched(found: Found, task: str, method: str) -> list[float]:
    """The learning rates to search, as far as they are known: also beyond the best one, where it is at an end."""
    return extended(partial(_best, found, task, method))


def extended(best_of: Callable[[list[float]], float | None]) -> list[float]:
    """The rates of the search, and some beyond its ends; ``best_of`` is the best of rates, None if one is missing."""
    rates = sorted(LEARNING_RATES)
    for _ in range(EXTENSIONS):
        best = best_of(rates)
        if best == rates[-1]:
            rates.append(2 * best)
        elif best == rates[0]:
            rates.insert(0, best / 2)
    return rates


def chosen_lr(found: Found, task: str, method: str) -> float | None:
    """The learning rate of the search's best score; None before it is complete."""
    return _best(found, task, method, searched(found, task, method))


def _best(found: Found, task: str, method: str, rates: list[float]) -> float | None:
    cells = [Cell("search", task, method, lr, 0) for lr in rates]
    if any(cell.key not in found for cell in cells):
        return None
    return max(cells, key=lambda cell: found[cell.key]["score"]).lr


def missing(tasks: list[str], methods: list[str], found: Found) -> dict[str, Cell]:
    """Cells that can be run now, by their keys."""
    cells = []
    for task in tasks:
        for method in methods:
            lr = chosen_lr(found, task, method)
            if lr is None:
                cells += [Cell("search", task, method, rate, 0) for rate in searched(found, task, method)]
            else:
                cells += [Cell("final", task, method, lr, seed) for seed in SEEDS]
    return {cell.key: cell for cell in cells if cell.key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder for each task")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--again", metavar="KEY", help="train this cell anew and compare")
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.results)
    if options.again:
        before = store.read()[options.again]
        now = run(Path(options.data), Cell(*(before[field] for field in Cell._fields)))
        print(
            f"{options.again}: {now['score']:.4f}, {now['parameters']} parameters; before {before['score']:.4f}, "
            f"{before['parameters']}"
        )
        return
    wanted = partial(missing, options.tasks, options.methods)
    run_missing(store, wanted, partial(run, Path(options.data)), options.processes)
    left = wanted(store.read())
    print(f"{len(store.read())} cells are there, {len(left)} are missing.\n")
    print(tables.of_quality(store.read()))
    if options.results == RESULTS:
        tables.write()
        figures.draw_quality(store.read())


if __name__ == "__main__":
    main()
