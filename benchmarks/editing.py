"""How precisely RoseLoRA, SoRA, LoRA and plain fine-tuning edit facts, at equal success.

Run:  python benchmarks/editing.py facts [--processes 2]
      python benchmarks/editing.py smollm2 --data FOLDER [--processes 2] [--results FILE]

``facts`` trains tiny language models on made-up facts (examples/edit_generated_facts.py), one for each of three seeds.
``smollm2`` takes SmolLM2-135M-Instruct (configs/editing/*_smollm2.yaml say how it is installed) and FOLDER with
KnowEdit's ZsRE-test-all.json, recent_train.json, recent_test.json, train_cf.json and test_cf.json, and texts.jsonl with
a column ``text``, of which the first 320 are held; ours are sentences of QNLI, which are Wikipedia's.

All methods change the down projections, of nine blocks where the name says so, with equal steps and early stop. Those
with anchors or from keys, and UltraEdit, hold the outputs of these layers on texts. Each method tries two learning
rates or more, on requests that are none of those reported; of those with an edit success of 0.98 or more, the one with
the best locality is taken. On SmolLM2, which computes in bfloat16, RoseLoRA from keys has three seeds. ``--curve``
also tries densities of RoseLoRA on the made-up facts. Runs that are in the results are not repeated. They go to
benchmarks/results/editing-facts.json and editing-smollm2.json, and from there into docs/editing.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import runpy
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import tables
import torch
from cells import Found, Store, run_missing

import lit_sparse as ls
from lit_sparse.data import quickstart

ROOT = Path(__file__).parents[1]
SEEDS = (0, 1, 2)
BLOCKS = list(range(18, 27))  # of 30; tried were 12-23, 15-23 and 18-26, on 30 requests that are not reported
ULTRAEDIT, TUNED, HELD, KEYS, LIGHT = (
    f"{name}, blocks {BLOCKS[0]}-{BLOCKS[-1]}"
    for name in (
        "UltraEdit in steps",
        "fine-tuning",
        "fine-tuning with anchors",
        "RoseLoRA from keys",
        "RoseLoRA from keys, light anchors",
    )
)
ENOUGH = 0.98  # edit success that is asked of a setting, where it is chosen
ANCHORS = {ULTRAEDIT: 100, HELD: 300, KEYS: 2000, LIGHT: 700}  # their weights


class Source(NamedTuple):
    """Requests of one kind.

    Args:
        backbone: Folder of the model.
        search: File and first request to choose settings on.
        final: File and first request to report.
    """

    backbone: str
    search: tuple[str, int]
    final: tuple[str, int]


class Bench(NamedTuple):
    """What differs between the two kinds of model.

    Args:
        methods: Name to method, by its density where it has one, and its learning rate where it has one.
        rates: Name to learning rates.
        counts: Requests of a source in the search and in the end.
        fluency_tokens: Tokens to generate.
        precision: The Trainer's.
        seeds: Those of RoseLoRA from keys, in the end.
    """

    methods: Mapping[str, Any]
    rates: Mapping[str, tuple[float, ...]]
    counts: Mapping[str, int]
    fluency_tokens: int
    precision: str
    seeds: tuple[int, ...]


def methods(target: str, rank: int, density: float) -> dict[str, Any]:
    options = {"target_modules": [target], "rank": rank, "alpha": 2 * rank}
    return {
        "LoRA": lambda *_: ls.LoRA(**options),
        # All thresholds of an edit together are 1.2: gates that begin near 1 go unless the edit needs them.
        "SoRA": lambda *_: ls.SoRA(**options, threshold=0.048, gate_init="ones"),
        "RoseLoRA": lambda share, _: ls.RoseLoRA(**options, density=share or density, begin=3, end=20),
        "fine-tuning": lambda *_: ls.FineTuning([target]),
        ULTRAEDIT: lambda _, lr: ls.UltraEdit([target], BLOCKS, lr=lr, normalization="turn", density=0.1),
        TUNED: lambda *_: ls.FineTuning([target], BLOCKS),
        HELD: lambda *_: ls.FineTuning([target], BLOCKS),
        # It starts with its share of the input features, so that masks can be final early.
        **dict.fromkeys(
            (KEYS, LIGHT),
            lambda *_: ls.RoseLoRA([target], layers=BLOCKS, rank=8, alpha=16, density=0.2, begin=2, end=5),
        ),
    }


BENCHES = {
    "facts": Bench(
        methods("down_proj", 4, 0.09),
        {
            "LoRA": (1e-3, 2e-3, 4e-3),
            "SoRA": (4e-3, 8e-3, 1.6e-2),
            "RoseLoRA": (2.5e-3, 5e-3, 1e-2),
            "fine-tuning": (1e-4, 2e-4, 4e-4),
        },
        {"search": 20, "final": 40},
        0,
        "32-true",
        (0,),  # each model has one
    ),
    "smollm2": Bench(
        methods("down_proj", 4, 0.05),
        {
            KEYS: (3e-3, 5e-3, 8e-3),
            LIGHT: (3e-3, 5e-3),
            TUNED: (5e-5, 1e-4, 2e-4),
            ULTRAEDIT: (2.5e-5, 5e-5, 1e-4),
            HELD: (1e-4, 2e-4),
            "RoseLoRA": (1.5e-3, 3e-3, 6e-3),
            "fine-tuning": (1e-5, 2e-5, 3e-5, 5e-5, 1e-4),
            "LoRA": (2e-4, 4e-4, 1e-3),
            "SoRA": (2e-3, 4e-3, 8e-3),
        },
        {"search": 10, "final": 100},
        0,
        "bf16-mixed",
        SEEDS,
    ),
}


class Cell(NamedTuple):
    """One run of the Editor."""

    phase: str
    source: str
    method: str
    lr: float
    density: float | None = None
    seed: int = 0

    @property
    def key(self) -> str:
        share = "" if self.density is None else f"/{self.density:g}"
        seed = f"/seed {self.seed}" if self.seed else ""
        return f"{self.phase}/{self.source}/{self.method}/{self.lr:g}{share}{seed}"


def run(kind: str, sources: Mapping[str, Source], cell: Cell) -> dict[str, Any]:
    start = time.perf_counter()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench, source = BENCHES[kind], sources[cell.source]
    phase = "final" if cell.phase == "final" else "search"
    file, first = getattr(source, phase)
    texts = str(Path(file).parent / "texts.jsonl")
    weight = ANCHORS.get(cell.method)
    with tempfile.TemporaryDirectory() as folder:
        editor = ls.Editor(
            source.backbone,
            bench.methods[cell.method](cell.density, cell.lr),
            folder,
            anchors=weight and ls.Anchors(weight=weight, of_subject=0, general=320, tokens=24, texts=texts),
            start_at_keys=cell.method in (KEYS, LIGHT),
            optimizer=functools.partial(torch.optim.AdamW, lr=cell.lr, weight_decay=0.0),
            fluency_tokens=bench.fluency_tokens if phase == "final" else 0,
            generated_tokens=0,
            seed=1000 * cell.seed,
        )
        trainer = L.Trainer(
            accelerator="cpu",
            precision=bench.precision,
            inference_mode=False,
            logger=False,
            enable_progress_bar=False,
        )
        trainer.test(editor, ls.EditingData(file, first, bench.counts[phase]), verbose=False)
        lines = (Path(folder) / "results.jsonl").read_text(encoding="utf-8").splitlines()
    figures = editor.summary["figures"]
    return {
        **cell._asdict(),
        **editor.summary,
        "each": {name: [json.loads(line).get(name) for line in lines] for name in tables.EACH},
        "score": 100 * figures["edit_success"]["mean"],
        "seconds": time.perf_counter() - start,
    }


def chosen_lr(found: Found, bench: Bench, sources: Mapping[str, Source], method: str) -> float | None:
    """The learning rate of a method; None before its search is complete."""
    means = {}
    for lr in bench.rates[method]:
        runs = [found.get(Cell("search", source, method, lr).key) for source in sources]
        if None in runs:
            return None
        means[lr] = tables.success_and_locality([run for run in runs if run])
    return best_lr(means, ENOUGH)


def best_lr(means: Mapping[float, tuple[float, float]], enough: float) -> float:
    """The learning rate with the best locality of those with enough edit success, or else with the most success.

    Args:
        means: Learning rate to edit success and locality.
        enough: Edit success that is asked for.
    """
    able = [lr for lr, (success, _) in means.items() if success >= enough]
    return max(able or means, key=lambda lr: means[lr][1 if able else 0])


def missing(kind: str, sources: Mapping[str, Source], densities: tuple[float, ...], found: Found) -> dict[str, Cell]:
    bench = BENCHES[kind]
    cells = []
    for method, rates in bench.rates.items():
        lr = chosen_lr(found, bench, sources, method)
        for source in sources:
            if lr is None:
                cells += [Cell("search", source, method, rate) for rate in rates]
            else:
                seeds = bench.seeds if method == KEYS else (0,)
                cells += [Cell("final", source, method, lr, seed=seed) for seed in seeds]
                if method == "RoseLoRA":
                    cells += [Cell("curve", source, method, lr, density) for density in densities]
    cells.sort(key=lambda cell: (cell.method == HELD, cell.seed))  # the slowest last
    return {cell.key: cell for cell in cells if cell.key not in found}


def facts_sources(folder: Path) -> dict[str, Source]:
    """A model for each seed that knows its own facts, and requests to change some."""
    example = runpy.run_path(str(ROOT / "examples" / "edit_generated_facts.py"))
    cities, sources = example["CITIES"], {}
    for seed in SEEDS:
        L.seed_everything(seed, verbose=False)
        rng, place = random.Random(seed), folder / str(seed)
        facts = {(city, relation): f"{relation}{rng.randrange(12)}" for city in cities for relation in example["ASK"]}
        example["pretrain"](facts, place / "model")
        asked = [example["request"](facts, city, rng) for city in rng.sample(cities, 60)]
        (place / "requests.json").write_text(json.dumps(asked))
        file = str(place / "requests.json")
        sources[f"seed {seed}"] = Source(str(place / "model"), (file, 40), (file, 0))
    return sources


def smollm2_sources(data: Path) -> dict[str, Source]:
    model = quickstart.resolve("quickstart://SmolLM2-135M-Instruct")
    zsre = str(data / "ZsRE-test-all.json")
    return {
        "ZsRE": Source(model, (zsre, 200), (zsre, 0)),
        "WikiData recent": Source(model, (str(data / "recent_train.json"), 0), (str(data / "recent_test.json"), 0)),
        "WikiData counterfact": Source(model, (str(data / "train_cf.json"), 0), (str(data / "test_cf.json"), 0)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(BENCHES))
    parser.add_argument("--data", type=Path, help="for smollm2: folder of KnowEdit's files")
    parser.add_argument("--curve", type=float, nargs="+", default=[], metavar="DENSITY")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    if options.kind == "smollm2" and options.data is None:
        parser.error("smollm2 needs --data")
    results = Path(__file__).parent / "results" / f"editing-{options.kind}.json"
    store = Store(options.results or results)
    with tempfile.TemporaryDirectory() as folder:
        sources = facts_sources(Path(folder)) if options.kind == "facts" else smollm2_sources(options.data)
        wanted = functools.partial(missing, options.kind, sources, tuple(options.curve))
        run_missing(store, wanted, functools.partial(run, options.kind, sources), options.processes)
    print(tables.of_editing(store.read()))
    if options.results is None:
        tables.write()


if __name__ == "__main__":
    main()
