"""Whether DPO teaches SmolLM2-135M-Instruct to prefer right sums, on pairs that it was not trained on.

Run:  python benchmarks/preferences.py [--epochs 2] [--json FILE]

The pairs are made here: a sum or a difference of two numbers up to 20, the right answer, and one that is off by up to
10. 200 are trained on, 60 others are held out. Each row of the table is a run in a process of its own, so that its peak
of memory is its own. CausalLM learns the right answers alone, from as many rows per step as DPO has answers. The model
comes with the package that configs/editing/roselora_smollm2.yaml names. The table of docs/quality.md is made of
benchmarks/results/preferences.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import random
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import tables
import torch
from variants import provenance, write_json

import lit_sparse as ls
from lit_sparse.functional import answer_log_probabilities

MODEL = "quickstart://SmolLM2-135M-Instruct"
PAIRS = 8  # in a batch
METHODS = {
    "LoRA": functools.partial(ls.LoRA, rank=8, alpha=16),
    "SoRA": functools.partial(ls.SoRA, rank=8, alpha=16, budget=0.5, begin=0.2, end=0.8),
    "RoseLoRA": functools.partial(ls.RoseLoRA, rank=8, alpha=16, density=0.1, begin=0.2, end=0.8),
}
RUNS = [*(("DPO", method) for method in METHODS), ("CausalLM", "LoRA")]


def write_pairs(folder: Path) -> None:
    draw = random.Random(0)
    asked = [(a, sign, b) for a in range(1, 21) for b in range(1, 21) for sign in "+-" if sign == "+" or a >= b]
    rows = []
    for a, sign, b in draw.sample(asked, 260):
        right = a + b if sign == "+" else a - b
        wrong = draw.choice([n for n in range(max(0, right - 10), right + 11) if n != right])
        prompt = f"Question: What is {a} {sign} {b}?\nAnswer:"
        rows.append({"prompt": prompt, "chosen": f" {right}", "rejected": f" {wrong}"})
    for split, part in (("train", rows[:200]), ("validation", rows[200:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


@torch.no_grad()
def preferred(module: ls.SparseModule, data: ls.PreferenceData) -> float:
    """Share of the held-out pairs whose right answer is the likelier one."""
    module.eval()
    hits = []
    for batch in data.val_dataloader():
        answers = {name: value.flatten(0, 1) for name, value in batch.items()}
        sums, _ = answer_log_probabilities(module(**answers).logits, answers.pop("labels"))
        hits.append(sums[::2] > sums[1::2])
    module.train()
    return float(torch.cat(hits).float().mean())


def run(epochs: int, objective: str, method: str) -> dict[str, Any]:
    start = time.perf_counter()
    torch.set_num_threads(1)
    L.seed_everything(0, verbose=False)
    optimizer = functools.partial(torch.optim.AdamW, lr=5e-4, weight_decay=0.0, fused=True)
    options = {"optimizer": optimizer, "warmup": 0.1, "backbone_args": {"attn_implementation": "eager"}}
    kind = ls.PreferenceLM if objective == "DPO" else ls.CausalLM
    module = kind(MODEL, METHODS[method](), **options)
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder))
        pairs = ls.PreferenceData(folder, tokenizer=MODEL, batch_size=PAIRS, eval_batch_size=30)
        single = ls.InstructionData(
            folder, tokenizer=MODEL, template="{prompt}", response="chosen", batch_size=2 * PAIRS, eval_batch_size=60
        )
        trainer = L.Trainer(
            accelerator="cpu",
            precision="bf16-mixed",  # faster on processors that know bfloat16
            max_epochs=epochs,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        pairs.setup("fit")
        module.configure_model()
        before = preferred(module, pairs)
        steps = time.perf_counter()
        trainer.fit(module, pairs if objective == "DPO" else single)
        seconds = (time.perf_counter() - steps) / trainer.global_step
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        after = preferred(module, pairs)
        trainer.limit_val_batches = 1.0
        found = trainer.validate(module, pairs, verbose=False)[0] if objective == "DPO" else {}
    return {
        "objective": objective,
        "method": method,
        "steps": trainer.global_step,
        "preferred_before": before,
        "preferred_after": after,
        **{name: found.get(f"val_{name}") for name in ("reward_accuracy", "reward_margin", "chosen_log_ratio")},
        "seconds_per_step": seconds,
        "peak_mib": peak,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--json", type=str)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    results = []
    for objective, method in RUNS:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            results.append(pool.submit(run, options.epochs, objective, method).result())
        print(json.dumps(results[-1]), flush=True)
    content = {**provenance(), "results": results}
    print(tables.of_preferences(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()
