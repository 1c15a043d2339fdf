"""How many facts one change of the weights can edit: 1, 10, 100 and 1,000, by each method.

Run:  python benchmarks/many_edits.py --data FOLDER [--processes 2] [--results FILE]

SmolLM2-135M-Instruct (configs/editing/*_smollm2.yaml say how it is installed) learns facts of KnowEdit. FOLDER has the
files and texts.jsonl of editing.py; held_out.jsonl with a column ``text``, whose first 100 give the perplexity; and
arc_easy.json, questions in the form of LLM-Adapters, whose first 200 are the unrelated task. Our texts are sentences of
QNLI's training and validation files.

The facts are those of five files, each prompt once, in random order: the first 1,000 are reported, and settings are
chosen on the next 100. Of each, one rephrase and one unrelated prompt are asked. All methods change the down
projections of the same nine blocks, with 15 steps on each fact at most (25 if there are so few) and the same early
stop, but UltraEdit as published, which has one; they compute in bfloat16. Of three learning rates, that with the best
locality is taken among those with an edit success of 0.95 or more. The results go to
benchmarks/results/many_edits.json, and from there into docs/editing.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import editing
import figures
import lightning as L
import tables
import torch
from cells import Found, Store, run_missing
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.data import quickstart
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.edits import EditedModel, load_edit
from lit_sparse.editing.measuring import Measurer
from lit_sparse.editing.teacher_forcing import collate, encode

RESULTS = Path(__file__).parent / "results" / "many_edits.json"
FILES = ("ZsRE-test-all", "recent_test", "test_cf", "recent_train", "train_cf")
EDITS = {1000: 1, 100: 1, 10: 2, 1: 3}  # facts of a change → changes that are made, each from the unedited model
SEARCHED = 100  # facts of a change, where settings are chosen
ENOUGH = 0.95  # edit success that is asked of a setting there
PASSES, FEWEST_STEPS = 15, 25  # steps on each fact at most, or of a small change
QUESTIONS, TEXTS = 200, 100
LAYERS = {"target_modules": ["down_proj"], "layers": editing.BLOCKS}
PUBLISHED, STEPS = "UltraEdit", "UltraEdit in steps"


class Way(NamedTuple):
    """A method, and how the Editor makes its changes.

    Args:
        method: By its learning rate, where it has one.
        rates: Learning rates to try.
        turn: Facts of a step.
    """

    method: Any
    rates: tuple[float, ...]
    turn: int


RANKS = {**LAYERS, "rank": 32}
WAYS = {
    STEPS: Way(lambda lr: ls.UltraEdit(**LAYERS, lr=lr, normalization="turn"), (2.5e-5, 5e-5, 1e-4), 50),
    PUBLISHED: Way(lambda lr: ls.UltraEdit(**LAYERS, lr=lr), (1e-5, 3e-5, 1e-4), 50),
    "fine-tuning": Way(lambda _: ls.FineTuning(**LAYERS), (1e-4, 2e-4, 4e-4), 10),
    "LoRA": Way(lambda _: ls.LoRA(**RANKS, alpha=64), (1e-3, 2e-3, 4e-3), 10),
    "RoseLoRA": Way(lambda _: ls.RoseLoRA(**RANKS, alpha=64, changed=0.1, begin=0.1, end=0.4), (2e-3, 4e-3, 8e-3), 10),
}


class Cell(NamedTuple):
    """Changes of one size by one method."""

    phase: str
    method: str
    lr: float
    facts: int

    @property
    def key(self) -> str:
        return f"{self.phase}/{self.method}/{self.lr:g}/{self.facts}"


def run(model: str, data: Path, cell: Cell) -> dict[str, Any]:
    start = time.perf_counter()
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        facts, texts = Path(folder) / "facts.json", Path(folder) / "texts.jsonl"
        final = cell.phase == "final"
        asked = _facts(data)[: max(EDITS)] if final else _facts(data)[max(EDITS) :]
        edits = EDITS[cell.facts] if cell.facts and final else 1
        groups = [asked[i * cell.facts : (i + 1) * cell.facts] for i in range(edits)]
        # Facts of like length take turns, so that there is little padding.
        facts.write_text(json.dumps([fact for group in groups for fact in sorted(group, key=_length)]))
        lines = (data / "held_out.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        texts.write_text("".join(lines[:TEXTS]), encoding="utf-8")
        if cell.method == "none":
            plain = _of_model(model, data, texts, [])
            score = 100 * plain["figures"]["question"]["mean"]
            return {**cell._asdict(), **plain, "score": score, "seconds": time.perf_counter() - start}
        way = WAYS[cell.method]
        turns = -(-cell.facts // way.turn)
        anchors = ls.Anchors(weight=100, of_subject=0, general=320, tokens=24, texts=str(data / "texts.jsonl"))
        editor = ls.Editor(
            model,
            way.method(cell.lr),
            folder,
            steps=turns if cell.method == PUBLISHED else max(FEWEST_STEPS, turns * PASSES),
            requests_per_step=way.turn,
            anchors=anchors if cell.method == STEPS else None,
            optimizer=functools.partial(torch.optim.AdamW, lr=cell.lr, weight_decay=0.0),
            stop_loss=None if cell.method == PUBLISHED else 0.1,
            save_edits=True,
            fluency_tokens=0,
            generated_tokens=16 if final else 0,
            texts=str(texts) if final else None,
        )
        requests = ls.EditingData(str(facts), batch_size=cell.facts, side_by_side=1)
        trainer = L.Trainer(
            accelerator="cpu", precision="bf16-mixed", inference_mode=False, logger=False, enable_progress_bar=False
        )
        trainer.test(editor, requests, verbose=False)
        saved = sorted((Path(folder) / "edits").iterdir())
        size = saved[0].stat().st_size / 2**20
        found = editor.summary["figures"]
        if final and cell.facts >= SEARCHED:
            found = {**found, **_of_model(model, data, texts, saved)["figures"]}
    return {
        **cell._asdict(),
        **editor.summary,
        "figures": found,
        "MiB": size,
        "score": 100 * found["edit_success"]["mean"],
        "seconds": time.perf_counter() - start,
    }


def _facts(data: Path) -> list[dict[str, Any]]:
    """All facts, each prompt once, in random order, with one rephrase and one unrelated prompt where there are some."""
    found: dict[str, dict[str, Any]] = {}
    for name in FILES:
        source = ls.EditingData(str(data / f"{name}.json"))
        source.setup()
        for request in source.requests:
            kinds = {kind: probes[:1] for kind, probes in sorted(request.locality.items(), reverse=True) if probes}
            probes = [
                {kind: [{"prompt": probe.prompt, "ground_truth": list(probe.answers)} for probe in some]}
                for kind, some in kinds.items()
            ]
            found.setdefault(
                request.prompt,
                {
                    "prompt": request.prompt,
                    "subject": request.subject,
                    "target_new": request.target_new,
                    "rephrase": list(request.rephrases[:1]),
                    "locality": probes[0] if probes else {},
                },
            )
    facts = [found[prompt] for prompt in sorted(found)]
    random.Random(0).shuffle(facts)
    return facts[: max(EDITS) + SEARCHED]


def _length(fact: dict[str, Any]) -> int:
    return len(fact["prompt"]) + len(fact["target_new"])


def _of_model(folder: str, data: Path, texts: Path, edits: Sequence[Path]) -> dict[str, Any]:
    """Perplexity, and the share of right answers to multiple-choice questions, of a model with some edits."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    edited = EditedModel(model)
    for edit in edits:
        edited.add(load_edit(edit))
    questions = json.loads((data / "arc_easy.json").read_text(encoding="utf-8"))[:QUESTIONS]
    measurer = Measurer(model, tokenizer, [], fluency_tokens=0, texts=str(texts), batch_size=32)
    with torch.autocast("cpu", torch.bfloat16):
        right = [_is_right(model, tokenizer, question) for question in questions]
        perplexity = measurer.perplexity()
    return {"figures": {"question": {"mean": sum(right) / len(right)}, "perplexity": {"mean": perplexity}}}


@torch.no_grad()
def _is_right(model: Any, tokenizer: Any, question: dict[str, str]) -> bool:
    """Whether the right answer is the likeliest, per token, of those that the question lists."""
    asked, _, listed = question["instruction"].partition("\n\nAnswer1:")
    options = [text.strip() for text in re.split(r"Answer\d:", listed.partition("\n\nAnswer format")[0])]
    prompt = f"Question: {asked.partition(': ')[2].strip()}\nAnswer:"
    batch = collate(tokenizer, encode(tokenizer, [(prompt, option) for option in options]))
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch, use_cache=False).logits[:, :-1].mT
    losses = torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="none").sum(1)
    means = losses / (labels != IGNORED).sum(1)
    return f"answer{int(means.argmin()) + 1}" == question["answer"]


def chosen_lr(found: Found, method: str) -> float | None:
    """The learning rate of a method; None before its search is complete."""
    rates = WAYS[method].rates
    runs = {lr: found.get(Cell("search", method, lr, SEARCHED).key) for lr in rates}
    if None in runs.values():
        return None
    return editing.best_lr({lr: tables.success_and_locality([run]) for lr, run in runs.items() if run}, ENOUGH)


def missing(found: Found) -> dict[str, Cell]:
    rates = {method: chosen_lr(found, method) for method in WAYS}
    cells = [Cell("search", method, lr, SEARCHED) for method, way in WAYS.items() for lr in way.rates]
    cells += [Cell("final", method, lr, facts) for facts in EDITS for method, lr in rates.items() if lr is not None]
    cells.append(Cell("final", "none", 0, 0))
    return {cell.key: cell for cell in cells if cell.key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    model = quickstart.resolve("quickstart://SmolLM2-135M-Instruct")
    store = Store(options.results)
    run_missing(store, missing, functools.partial(run, model, options.data), options.processes)
    print(tables.of_many_edits(store.read()))
    if options.results == RESULTS:
        tables.write()
        figures.draw_many_edits(store.read())


if __name__ == "__main__":
    main()
