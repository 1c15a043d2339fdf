"""The parts of gpu.py, most important first."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch._dynamo.utils
from compaction import compacted, ranks
from gpu_run import Run, Skip, described
from precision import METHODS, NAMES, PRECISIONS, allowed, errors
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from variants import Batch, Variant, build, ours, peft_lora, twin, with_floor, with_method, with_peft

import lit_sparse as ls
from lit_sparse.strategies.blocks import transformer_blocks

VARIANTS = ["floor", "PEFT LoRA", "LoRA", "SoRA", "RoseLoRA", "gated RoseLoRA", "PEFT DoRA", "PEFT AdaLoRA"]
FEW = ["floor", "PEFT LoRA", "SoRA", "RoseLoRA"]


class Part(NamedTuple):
    """A part, and about how many seconds it takes on an H100; one that takes twice as many is stopped."""

    work: Callable[[Run], None]
    seconds: int


def makers(plain: nn.Module, run: Run, names: Sequence[str]) -> dict[str, Callable[[], Variant]]:
    return {name: functools.partial(lambda own: build(plain, run.rank, 0.0, [own])[own], name) for name in names}


# Correctness.


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


# Waits of the host.


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


# Time and memory.


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
        torch._dynamo.config.recompile_limit = 256  # all variants have the code of their blocks in common
        for variant in variants.values():
            compile_blocks(run, variant.model)
    for rows, tokens in shapes:
        run.compare(variants, run.batch(rows, tokens), f"{rows} × {tokens}, ")


def compile_blocks(run: Run, model: nn.Module) -> None:
    """Compile every block in place."""
    for block in transformer_blocks(model):
        block.compile(dynamic=False, **compiler(run))


def compiler(run: Run) -> dict[str, str]:
    """On the CPU only the graphs are made: to compile them takes minutes."""
    return {"backend": "eager"} if run.tiny else {}


def small_ones(run: Run, compiled: bool = False) -> None:
    """The encoders, whose steps wait for the host."""
    for name in ("bert-base", "minilm"):
        with run.case(name, quiet=True):
            plain = run.backbone(name, checkpointing=False)
            names = FEW if compiled else VARIANTS
            variants = run.make(makers(plain, run, names), f"{name}, ")
            for variant in variants.values() if compiled else ():
                compile_blocks(run, variant.model)
            run.compare(variants, run.batch(16, 512), f"{name}, ")


# Kernels.


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


# Compaction.


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


# Quantized backbones.


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


def nf4(model: Any) -> None:
    import bitsandbytes

    model.is_loaded_in_4bit = True  # where PEFT looks
    for block in transformer_blocks(model):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    own = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                    own.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                    own.weight.module = own
                    setattr(parent, name, own.to(layer.weight.device))


def torchao(config: str, model: nn.Module) -> None:
    from torchao import quantization

    options: dict[str, Any] = {}
    if config == "IntxWeightOnlyConfig":
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    for block in transformer_blocks(model):
        quantization.quantize_(block, getattr(quantization, config)(**options))


QUANTIZED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "bf16": ("", lambda _: None),
    "nf4": ("bitsandbytes", nf4),
    "int8": ("torchao", functools.partial(torchao, "Int8WeightOnlyConfig")),
    "int4": ("torchao", functools.partial(torchao, "IntxWeightOnlyConfig")),
    "fp8": ("torchao", functools.partial(torchao, "Float8WeightOnlyConfig")),
}


# Strategies.


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


# CUDA graphs.


def reduce_overhead(run: Run) -> None:
    """Whole models as CUDA graphs, beside the same ones as they are."""
    counters = torch._dynamo.utils.counters
    plain, batch = run.backbone("bert-base", checkpointing=False, num_hidden_layers=4), run.batch(4, 128)
    variants = run.make(makers(plain, run, ["PEFT LoRA", "SoRA", "RoseLoRA"]))
    run.compare(variants, batch, "eager, ")
    for name, variant in variants.items():
        with run.case(f"graphs, {name}", quiet=True):
            torch._dynamo.reset()
            counters.clear()
            model: Any = variant.model.get_base_model() if name.startswith("PEFT") else variant.model
            model.compile(**(compiler(run) or {"mode": "reduce-overhead"}))
            told = {"graphs": 0, "breaks": 0, "refused": 0}
            for _ in range(4):  # compiled, warmed up, recorded
                run.step(variant, batch)
            told["graphs"] = counters["stats"]["unique_graphs"]
            told["breaks"] = sum(counters["graph_break"].values())
            told["refused"] = counters["inductor"]["cudagraph_skips"]
            run.compare({name: variant}, batch, "graphs, ", **told)


LONG, SHORT = (2, 2048), (8, 512)
PARTS: dict[str, Part] = {
    "correctness": Part(correctness, 25),
    "waits": Part(waits, 20),
    "llama-1b": Part(lambda run: timed(run, "llama-1b", [SHORT, LONG]), 40),
    "llama-1b compiled": Part(lambda run: timed(run, "llama-1b", [SHORT], compiled=True), 70),
    "kernels": Part(kernels, 20),
    "llama-7b": Part(lambda run: timed(run, "llama-7b", [(4, 512), (1, 2048)]), 60),
    "llama-1b, all kept": Part(lambda run: timed(run, "llama-1b", [SHORT], checkpointing=False), 20),
    "compaction": Part(compaction, 20),
    "quantized": Part(quantized, 40),
    "strategies": Part(strategies, 40),
    "reduce-overhead": Part(reduce_overhead, 50),
    "encoders": Part(small_ones, 20),
    "llama-7b compiled": Part(lambda run: timed(run, "llama-7b", [(4, 512)], compiled=True, names=FEW), 45),
    "llama-1b compiled, long": Part(lambda run: timed(run, "llama-1b", [LONG], compiled=True, names=FEW), 40),
    "encoders compiled": Part(lambda run: small_ones(run, compiled=True), 50),
}
