"""What an edit costs around its optimizer steps: the Editor's own loop beside a Trainer.fit for each edit.

Run:  python benchmarks/edit_overhead.py --data FILE [--edits 12] [--steps 25] [--threads 1]

SmolLM2-135M-Instruct (configs/editing/roselora_smollm2.yaml says how it is installed), RoseLoRA of rank 4 on its down
projections, single edits of the first requests of FILE, in turn by the Editor's loop and by ``Trainer.fit`` of a
CausalLM on the same batch, with nothing switched on that an edit does not need. Both take the change out of the model
again. Times are CPU times of the process; "outside of steps" is what an edit takes beyond its forward and backward
passes and optimizer steps, which are those of the Editor's loop, as a share of the edit.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import statistics
import time
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.injection import take_out
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.edits import Edit, EditedModel
from lit_sparse.editing.measuring import Questions
from lit_sparse.editing.requests import EditRequest, read_requests
from lit_sparse.editing.teacher_forcing import collate
from lit_sparse.editing.training import train
from lit_sparse.interchange.patches import patch_of
from lit_sparse.modules.backbone import load_backbone


def by_loop(
    edited: EditedModel, model: Any, batch: Any, request: EditRequest, how: dict[str, Any]
) -> tuple[float, float]:
    """CPU seconds of an edit, and the share of the wall time that its steps took."""
    start, wall = time.process_time(), time.perf_counter()
    trained = train(model, batch, **how, stop_loss=None)
    edited.add(Edit(trained.patch, (request,), (), repr(how["method"]), "", trained.weights))
    edited.restore()
    return time.process_time() - start, trained.seconds / (time.perf_counter() - wall)


def by_fit(edited: EditedModel, model: Any, batch: Any, request: EditRequest, how: dict[str, Any]) -> float:
    """CPU seconds of the same edit by a Trainer."""
    start = time.process_time()
    module = ls.CausalLM(model, how["method"], optimizer=how["optimizer"])
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=how["steps"],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # the report at the end of a run
        trainer.fit(module, DataLoader([batch] * how["steps"], batch_size=None))
    patch = patch_of(dict(ls.adapters_in(model)))
    weights = sum(adapter.weight.numel() for _, adapter in ls.adapters_in(model))
    take_out(model)
    edited.add(Edit(patch, (request,), (), repr(how["method"]), "", weights))
    edited.restore()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file of edit requests")
    parser.add_argument("--edits", type=int, default=12)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    backbone = "quickstart://SmolLM2-135M-Instruct"
    model: Any = load_backbone(backbone, AutoModelForCausalLM).eval().requires_grad_(False)
    tokenizer = load_tokenizer(backbone)
    edited = EditedModel(model)
    method = ls.RoseLoRA(["down_proj"], rank=4, alpha=8, density=0.05, begin=3, end=20)
    optimizer = functools.partial(torch.optim.AdamW, lr=3e-3, weight_decay=0.0)
    how = {"method": method, "steps": options.steps, "optimizer": optimizer}
    loop, fit, steps = [], [], []
    for number, request in enumerate(read_requests(options.data)[: options.edits + 1]):
        questions = Questions(tokenizer, [request])
        batch = collate(tokenizer, [questions.rows[place] for place in questions.edits])
        seconds, share = by_loop(edited, model, batch, request, how)
        other = by_fit(edited, model, batch, request, how)
        if number:  # the first is for warming up
            loop.append(seconds)
            fit.append(other)
            steps.append(seconds * share)
    print("| | s per edit | outside of steps |\n|---|---|---|")
    for name, found in {"the Editor's loop": loop, "a Trainer.fit for each edit": fit}.items():
        outside = statistics.median(1 - step / second for step, second in zip(steps, found, strict=True))
        print(f"| {name} | {statistics.median(found):.2f} | {outside:.1%} |")


if __name__ == "__main__":
    main()
