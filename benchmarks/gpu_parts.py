"""The parts of gpu.py, most important first."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils
from compaction import compacted, ranks
from gpu_quantized import QUANTIZED
from gpu_run import Run, Skip, described
from precision import METHODS, NAMES, PRECISIONS, allowed, errors
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from variants import Batch, Variant, build, ours, peft_lora, twin, with_floor, with_method, with_peft

import lit_sparse as ls

VARIANTS = ["floor", "PEFT LoRA", "LoRA", "SoRA", "RoseLoRA", "gated RoseLoRA", "PEFT AdaLoRA", "PEFT DoRA"]
FEW = ["floor", "PEFT LoRA", "SoRA", "RoseLoRA"]


class Part(NamedTuple):
    """A part, and about how many seconds it takes on an H100; one that takes twice as many is stopped."""

    work: Callable[[Run], None]
    seconds: int


def makers(plain: nn.Module, run: Run, names: Sequence[str]) -> dict[str, Callable[[], Variant]]:
    return {name: functools.partial(lambda own: build(plain, run.rank, 0.0, [own])[own], name) for name in names}


def correctness(run: Run) -> None:
    """Every method against the CPU in float64: the relative error of a step and its way, merged and exported."""
    more: dict[str, Callable[[], ls.SparseMethod]] = {
        "SoRA, budget": lambda: ls.SoRA(NAMES, rank=8, budget=0.5, begin=0, end=1, train_head=["out"]),
        "SoRA, weight": lambda: ls.SoRA(NAMES, rank=8, sparsity_weight=0.1, train_head=["out"]),
        "RoseLoRA, changed": lambda: ls.RoseLoRA(NAMES, rank=8, changed=0.3, begin=0, end=1, train_head=["out"]),
    }
    for name, precision in PRECISIONS.items():
        if precision.quantized is None:
            for method, make in {**METHODS, **(more if name == "32-true" else {})}.items():
                with run.case(f"{name}, {method}") as row:
                    row |= errors(precision, make(), run.device)
                    row["as exact as the precision"] = all(row[path] < allowed(precision, path) for path in row)


def waits(run: Run) -> None:
    """A step of every method in CUDA's sync debug mode, where whatever makes the host wait is an error.

    transformers waits itself where it asks whether a batch has padding. The attention that is registered here is its
    own under another name, for which it makes no mask.
    """
    AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
    plain: Any = run.backbone("llama-1b", num_hidden_layers=2)
    plain.config._attn_implementation = "unmasked_sdpa"
    batch = run.batch(8, 512)
    for name in ["floor", *ours(run.rank, 0.0)]:
        with run.case(name) as row:
            variant = makers(plain, run, [name])[name]()
            for _ in range(3):  # what is copied to the device once is there
                run.step(variant, batch)
            row["waits"] = _waits(run, variant, batch)


def _waits(run: Run, variant: Variant, batch: Batch) -> str:
    if run.device == "cpu":
        run.step(variant, batch)
        raise Skip("needs CUDA")
    run.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.loss(variant, batch).backward()
        variant.update()
        variant.optimizer.zero_grad()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return described(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def timed(
    run: Run,
    backbone: str,
    shapes: Sequence[tuple[int, int]],
    compiled: bool = False,
    checkpointing: bool = True,
    names: Sequence[str] = VARIANTS,
) -> None:
    """The time of a step and its memory, for batches of rows × tokens."""
    plain = run.backbone(backbone, checkpointing)
    variants = run.make(makers(plain, run, names))
    if compiled:
        variants = with_compiled_blocks(run, variants, run.batch(*shapes[0]))
    for rows, tokens in shapes:
        run.compare(variants, run.batch(rows, tokens), f"{rows} × {tokens}, ")


def with_compiled_blocks(
    run: Run, variants: Mapping[str, Variant], batch: Batch, label: str = ""
) -> dict[str, Variant]:
    """The variants that can be compiled, with a row of what that took."""
    ready = {}
    for name, variant in variants.items():
        with run.case(f"compiled: {label}{name}") as row:
            run.require_time()
            torch._dynamo.utils.counters.clear()
            begin = time.time()
            ls.compile_blocks(variant.model, **compiler(run))
            run.step(variant, batch)
            row |= {"seconds": time.time() - begin, **graphs()}
            if row["breaks"] and len(variants) > 1:
                torch._dynamo.reset()  # dynamo takes pieces of a broken graph for other models of the same classes
                row["note"] = "left out of the rounds"
            else:
                ready[name] = variant
    return ready


def graphs() -> dict[str, int]:
    """What was compiled since the counters were cleared; ``refused`` are those that are no CUDA graphs."""
    counters = torch._dynamo.utils.counters
    return {
        "graphs": counters["stats"]["unique_graphs"],
        "breaks": sum(counters["graph_break"].values()),
        "refused": counters["inductor"]["cudagraph_skips"],
    }


def compiler(run: Run) -> dict[str, str]:
    """On the CPU only the graphs are made: to compile them takes minutes."""
    return {"backend": "eager"} if run.tiny else {}


def small_ones(run: Run, compiled: bool = False) -> None:
    """The encoders, whose steps wait for the host."""
    for name in ("bert-base", "minilm"):
        with run.case(name, quiet=True):
            plain = run.backbone(name, checkpointing=False)
            batch = run.batch(16, 512)
            variants = run.make(makers(plain, run, FEW if compiled else VARIANTS), f"{name}, ")
            if compiled:
                variants = with_compiled_blocks(run, variants, batch, f"{name}, ")
            run.compare(variants, batch, f"{name}, ")


def kernels(run: Run) -> None:
    """The kernels that an adapter adds to its layer, forward and backward, and all of what follows."""
    plain = run.backbone("llama-1b", checkpointing=False, num_hidden_layers=2)
    batch = run.batch(8, 512)
    floor: dict[str, int] = {}
    for name in VARIANTS:
        with run.case(name) as row:
            variant = makers(plain, run, [name])[name]()
            for _ in range(2):
                run.step(variant, batch)
            found = _launches(run, variant, batch)
            floor = found if name == "floor" else floor
            layers = sum(isinstance(module, nn.Linear) for module in plain.modules()) - 1  # the head
            row |= {key: (found[key] - floor[key]) / layers for key in ("forward", "backward")}
            row["update"] = found["update"]


def _launches(run: Run, variant: Variant, batch: Batch) -> dict[str, int]:
    held: list[torch.Tensor] = []
    run.launches(run.synchronize)  # the profiler's own start
    found = {
        "forward": run.launches(lambda: held.append(run.loss(variant, batch))),
        "backward": run.launches(lambda: held.pop().backward()),
        "update": run.launches(variant.update),
    }
    if not found["forward"]:
        raise RuntimeError("The profiler saw no kernels.")
    return found


def compaction(run: Run) -> None:
    """A step when a quarter of the ranks is left, as it was and with the others taken out."""
    plain, batch = run.backbone("llama-1b"), run.batch(8, 512)
    method = ls.SoRA(rank=run.rank, alpha=16, threshold=0.0)  # none dies in the meantime
    once: list[float] = []

    def small() -> Variant:
        variant, seconds = compacted(twin(plain), method, 0.25, batch)
        once.append(seconds)
        return variant

    variants = run.make(
        {
            "floor": lambda: with_floor(twin(plain)),
            "PEFT LoRA": lambda: with_peft(twin(plain), peft_lora(run.rank, 0.0)),
            "all ranks": lambda: with_method(twin(plain), method),
            "compacted": small,
        }
    )
    run.compare(variants, batch)
    with run.case("compact()") as row:
        row |= {"ms": 1000 * once[0], "ranks": ranks(variants["compacted"]), "of": ranks(variants["all ranks"])}


def quantized(run: Run) -> None:
    """A step on weights in fewer bits: two blocks as wide as the 7B model's."""
    batch = run.batch(4, 512)
    for name, (package, quantize) in QUANTIZED.items():
        with run.case(name, quiet=True):
            if package and importlib.util.find_spec(package) is None:
                raise Skip(f"{package} is not installed")
            plain = run.backbone("llama-7b", checkpointing=False, num_hidden_layers=2)
            quantize(plain)
            run.compare(run.make(makers(plain, run, FEW), f"{name}, "), batch, f"{name}, ")


def strategies(run: Run) -> None:
    """One process per strategy, all at once: the losses of a short run beside those without one."""
    program = str(Path(__file__).with_name("gpu_strategies.py"))
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = {
        name: subprocess.Popen([sys.executable, program, name, run.device], **pipes)
        for name in ("auto", "ddp", "fsdp", "fsdp2")
    }
    alone: list[float] = []
    try:
        for name, process in started.items():
            with run.case(name) as row:
                words, errors_of = process.communicate(timeout=max(1.0, run.stop_at - time.time()))
                if process.returncode:
                    raise RuntimeError("\n".join(errors_of.strip().splitlines()[-3:]))
                told = json.loads(words.splitlines()[-1])
                alone = alone or told["losses"]
                row["backend"] = told["backend"]
                row["losses differ by"] = max(abs(a - b) for a, b in zip(told["losses"], alone, strict=True))
    finally:
        for process in started.values():
            process.kill()


def reduce_overhead(run: Run) -> None:
    """Whole models as CUDA graphs, beside the same ones as they are."""
    plain, batch = run.backbone("bert-base", checkpointing=False, num_hidden_layers=4), run.batch(4, 128)
    variants = run.make(makers(plain, run, ["PEFT LoRA", "SoRA", "RoseLoRA"]))
    run.compare(variants, batch, "eager, ")
    for name, variant in variants.items():
        with run.case(f"graphs, {name}", quiet=True):
            torch._dynamo.reset()
            torch._dynamo.utils.counters.clear()
            model: Any = variant.model.get_base_model() if name.startswith("PEFT") else variant.model
            model.compile(**(compiler(run) or {"mode": "reduce-overhead"}))
            for _ in range(4):  # compiled, warmed up, recorded
                run.step(variant, batch)
            run.compare({name: variant}, batch, "graphs, ", **graphs())


LONG, SHORT = (2, 2048), (8, 512)
PARTS: dict[str, Part] = {
    "correctness": Part(correctness, 25),
    "waits": Part(waits, 20),
    "llama-1b": Part(lambda run: timed(run, "llama-1b", [SHORT, LONG]), 40),
    "llama-1b compiled": Part(lambda run: timed(run, "llama-1b", [SHORT], compiled=True, names=VARIANTS[:-1]), 70),
    "kernels": Part(kernels, 20),
    "llama-7b": Part(lambda run: timed(run, "llama-7b", [(4, 512), (1, 2048)]), 70),
    "llama-1b, all kept": Part(lambda run: timed(run, "llama-1b", [SHORT], checkpointing=False), 20),
    "compaction": Part(compaction, 20),
    "quantized": Part(quantized, 40),
    "strategies": Part(strategies, 40),
    "reduce-overhead": Part(reduce_overhead, 50),
    "encoders": Part(small_ones, 20),
    "llama-7b compiled": Part(lambda run: timed(run, "llama-7b", [(4, 512)], compiled=True, names=FEW), 45),
    "llama-1b compiled, long": Part(lambda run: timed(run, "llama-1b", [LONG], compiled=True, names=FEW), 40),
    # By itself: its graphs break.
    "PEFT DoRA compiled": Part(lambda run: timed(run, "llama-1b", [SHORT], compiled=True, names=["PEFT DoRA"]), 40),
    "encoders compiled": Part(lambda run: small_ones(run, compiled=True), 50),
}
