"""What the benchmarks compare: a backbone, ways to train it, and interleaved rounds of their steps."""

from __future__ import annotations

import copy
import ctypes
import itertools
import json
import platform
import random
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import lit_sparse as ls
from lit_sparse.data import quickstart

Batch = dict[str, Tensor]


def mean_of_tokens(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """What a sentence encoder makes of a text: the mean (rows, size) of (rows, tokens, size), padding left out."""
    mask = attention_mask.unsqueeze(2)
    return (hidden * mask).sum(1) / mask.sum(1)


def minilm() -> nn.Module:
    """The quickstart's encoder with its real weights: 6 layers, width 384, 22 million parameters."""
    folder = quickstart.resolve("quickstart://all-MiniLM-L6-v2")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()  # type: ignore[no-any-return]


def bert(layers: int = 4) -> nn.Module:
    """BERT-base cut to some layers, random weights."""
    return BertForSequenceClassification(BertConfig(num_hidden_layers=layers)).train()


def llama(layers: int = 4) -> nn.Module:
    """A Llama of width 512 (with 8 / 4 heads, gated feed-forward of 1408), random weights."""
    config = LlamaConfig(
        vocab_size=30000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_labels=2,
        pad_token_id=0,
        use_cache=False,  # as in training
    )
    return LlamaForSequenceClassification(config).train()


BACKBONES: dict[str, Callable[..., nn.Module]] = {"minilm": minilm, "bert": bert, "llama": llama}


def make_batch(rows: int, tokens: int) -> Batch:
    ids = torch.randint(1000, 30000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


class Times(NamedTuple):
    """Seconds of a step."""

    step: float
    """CPU time."""
    update: float
    """Its share after the backward pass: observing, optimizer, thresholds, masks; CPU time."""
    wall: float


class Variant:
    """A model with its optimizer, and a step of it.

    Args:
        model: The model, ready to train.
        groups: Groups of the parameters that are trained.
        before: Called between backward pass and optimizer step.
        after: Called after the optimizer step.
        optimizer: AdamW is fused, as the command line's; the released codes' is not.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        before: Callable[[], None] | None = None,
        after: Callable[[], None] | None = None,
        fused: bool = True,
    ) -> None:
        self.model, self.before, self.after = model, before, after
        self.optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=1e-4, fused=fused)

    def step(self, batch: Batch) -> Times:
        """One training step."""
        wall, start = time.perf_counter(), time.process_time()
        self.model(**batch).loss.backward()
        passed = time.process_time()
        self.update()
        end = time.process_time()
        self.optimizer.zero_grad()
        return Times(time.process_time() - start, end - passed, time.perf_counter() - wall)

    def update(self) -> None:
        """What follows the backward pass."""
        if self.before is not None:
            self.before()
        self.optimizer.step()
        if self.after is not None:
            self.after()


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_floor(model: nn.Module) -> Variant:
    """The head trained, nothing else, and gradients made down to the embeddings: no adapter can be cheaper."""
    model.requires_grad_(False)
    for name in ("classifier", "score"):
        if hasattr(model, name):
            getattr(model, name).requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())  # type: ignore[operator]
    return Variant(model, [{"params": trained(model)}])


def with_method(model: nn.Module, method: ls.Method) -> Variant:
    """Adapters of ours, with everything that happens around a step."""
    ls.inject(model, method)
    fill(a.values if isinstance(a, ls.DeltaLinear) else a.lora_B_t for _, a in ls.adapters_in(model))
    variant = Variant(model, ls.parameter_groups(model, method))
    variant.before = ls.SparseSteps(method, model, variant.optimizer, total_steps=1000).observe
    return variant


def fill(weights: Any) -> None:
    """B, or a change without factors, is zero at the start, and products with zeros may be cheaper than others."""
    for weight in weights:
        nn.init.normal_(weight, std=1e-3)


def with_peft(model: nn.Module, config: peft.PeftConfig) -> Variant:
    adapted = peft.get_peft_model(model, config)
    fill(p for name, p in adapted.named_parameters() if "lora_B" in name)
    variant = Variant(adapted, [{"params": trained(adapted)}])
    if isinstance(config, peft.AdaLoraConfig):
        steps = iter(range(1, 10**9))
        variant.after = lambda: adapted.base_model.update_and_allocate(next(steps))
    return variant


def peft_lora(rank: int, dropout: float, **options: Any) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=rank, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", task_type="SEQ_CLS", **options
    )


def peft_adalora(model: nn.Module, rank: int, dropout: float) -> peft.AdaLoraConfig:
    # AdaLoRA does not know "all-linear" in every release: the same layers by their last names.
    names = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)} - {
        "classifier",
        "score",
    }
    return peft.AdaLoraConfig(
        init_r=rank,
        target_r=max(1, rank // 2),
        tinit=1,
        tfinal=10,
        deltaT=1,
        total_step=10**6,
        lora_alpha=16,
        lora_dropout=dropout,
        target_modules=sorted(names),
        task_type="SEQ_CLS",
    )


class ReleasedLayer(nn.Module):
    """How the papers' codes compute: products one by one, B stored (out, rank), the gate on the hidden values."""

    def __init__(self, base: nn.Linear, rank: int, dropout: float, gated: bool) -> None:
        super().__init__()
        self.base, self.scale = base, 16 / rank
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.lora_B = nn.Parameter(1e-3 * torch.randn(base.out_features, rank))
        self.gate = nn.Parameter(torch.randn(1, rank)) if gated else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(self.dropout(x), self.lora_A)
        if self.gate is not None:
            hidden = hidden * self.gate
        return self.base(x) + F.linear(hidden, self.lora_B) * self.scale  # type: ignore[no-any-return]


def with_released(model: nn.Module, rank: int, dropout: float, gated: bool) -> Variant:
    """The released update rules, written anew with their loops: gated is SoRA's, else RoseLoRA's."""
    ls.inject(model, ls.LoRA(rank=rank))  # to find the same layers, and to freeze the rest
    layers = []
    for _, adapter in list(ls.adapters_in(model)):
        layer = ReleasedLayer(adapter.base, rank, dropout, gated)
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if child is adapter:
                    setattr(parent, name, layer)
        layers.append(layer)
    model.train()
    gates = {layer.gate for layer in layers}
    variant = Variant(model, [{"params": [p for p in trained(model) if p not in gates]}], fused=False)
    if gated:
        own = torch.optim.AdamW([layer.gate for layer in layers], lr=1e-4, weight_decay=0.0, foreach=False)
        variant.after = lambda: _released_sora(own, threshold=1e-7)
    else:
        averages: dict[nn.Parameter, Tensor] = {}
        pairs = [(p, dim) for layer in layers for p, dim in ((layer.lora_A, 1), (layer.lora_B, 0))]
        variant.before = lambda: _released_observe(pairs, averages)
        variant.after = lambda: _released_mask(pairs, averages, density=0.05)
    return variant


@torch.no_grad()
def _released_sora(optimizer: torch.optim.Optimizer, threshold: float) -> None:
    optimizer.step()
    for group in optimizer.param_groups:
        for gate in group["params"]:
            gate[gate > threshold] -= threshold
            gate[gate < -threshold] += threshold
            gate[gate.abs() < threshold] = 0.0
    optimizer.zero_grad()


@torch.no_grad()
def _released_observe(pairs: list[tuple[nn.Parameter, int]], averages: dict[nn.Parameter, Tensor]) -> None:
    for weight, _ in pairs:
        seen = (weight * weight.grad).abs()
        averages[weight] = 0.8 * averages[weight] + 0.2 * seen if weight in averages else seen


@torch.no_grad()
def _released_mask(pairs: list[tuple[nn.Parameter, int]], averages: dict[nn.Parameter, Tensor], density: float) -> None:
    for weight, dim in pairs:
        average = averages[weight]
        dropped = int(average.shape[dim] * (1 - density))
        limit = torch.kthvalue(average, dropped, dim=dim, keepdim=True).values
        weight.masked_fill_(average < limit, 0.0)


def ours(rank: int, dropout: float, **options: Any) -> dict[str, ls.Method]:
    # Nothing dies while it is measured: a threshold of nearly zero, and masks at their final density.
    masks = {"density": 0.05, "begin": 0, "end": 0, **options}
    return {
        "LoRA": ls.LoRA(rank=rank, alpha=16, dropout=dropout),
        "SoRA": ls.SoRA(rank=rank, alpha=16, dropout=dropout, threshold=1e-7),
        "SoRA, budget": ls.SoRA(rank=rank, alpha=16, dropout=dropout, budget=0.999, begin=0, end=0),
        "RoseLoRA": ls.RoseLoRA(rank=rank, alpha=16, dropout=dropout, **masks),
        # In its schedule all the time, at whose end the choice of entries would stay.
        "RoseLoRA, changed": ls.RoseLoRA(rank=rank, alpha=16, dropout=dropout, changed=0.05, begin=0, end=1.0),
        "gated RoseLoRA": ls.GatedRoseLoRA(rank=rank, alpha=16, dropout=dropout, threshold=1e-7, **masks),
        # Whatever the rank. LIFT has the same steps: its entries are chosen by the largest, and stay.
        "SHiRA": ls.SHiRA(changed=0.02),
        # All steps sum gradients of candidates, as a quarter of them do by default; the others are SHiRA's.
        "SpIEL, in a window": ls.SpIEL(changed=0.02, update_every=999, window=999),
    }


COMPILED = ", compiled"


def build(backbone: nn.Module, rank: int, dropout: float, names: Sequence[str] | None = None) -> dict[str, Variant]:
    """All variants, each on a copy of the backbone; "NAME, compiled" has its blocks compiled."""
    makers: dict[str, Callable[[nn.Module], Variant]] = {
        "floor": with_floor,
        "PEFT LoRA": lambda m: with_peft(m, peft_lora(rank, dropout)),
        "PEFT DoRA": lambda m: with_peft(m, peft_lora(rank, dropout, use_dora=True)),
        "PEFT AdaLoRA": lambda m: with_peft(m, peft_adalora(m, rank, dropout)),
        "SoRA, released": lambda m: with_released(m, rank, dropout, gated=True),
        "RoseLoRA, released": lambda m: with_released(m, rank, dropout, gated=False),
        **{name: lambda m, method=method: with_method(m, method) for name, method in ours(rank, dropout).items()},
    }
    variants = {}
    for name in names or list(makers):
        variants[name] = makers[name.removesuffix(COMPILED)](twin(backbone))
        if name.endswith(COMPILED):
            ls.compile_blocks(variants[name].model)
    return variants


def twin(backbone: nn.Module) -> nn.Module:
    """A copy that shares all weights but the head's, which nobody trains.

    Copies of the same weights cost up to a tenth more or less than each other, in the whole life of a process, by where
    they happen to lie in memory.
    """
    heads = [getattr(backbone, name) for name in ("classifier", "score") if hasattr(backbone, name)]
    own = {p for head in heads for p in head.parameters()}
    return copy.deepcopy(backbone, {id(p): p for p in backbone.parameters() if p not in own})


def keep_freed_memory() -> None:
    """Let the process keep what it freed (glibc only), so that no step pays for pages that the one before gave back."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (-1, -2, -3):  # trim threshold, top pad, mmap threshold
            mallopt(option, 2**30)


def interleave(variants: Mapping[str, Variant], batch: Batch, rounds: int) -> dict[str, list[Times]]:
    """Times by variant: each round has a step of each, in a shuffled order."""
    times: dict[str, list[Times]] = {name: [] for name in variants}
    for number in range(rounds + 3):
        for name in random.sample(list(variants), len(variants)):
            seconds = variants[name].step(batch)
            if number >= 3:  # the first ones warm up
                times[name].append(seconds)
    return times


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Median of the ratios within a round, and their quartiles."""
    quarter, half, three = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    return half, quarter, three


def peak_memory(variant: Variant, batch: Batch) -> int:
    """The most bytes that tensors on the CPU take at once in a step, beyond what is held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        variant.step(batch)
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        trace.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_bytes())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def provenance() -> dict[str, Any]:
    """Command, versions, machine and commit."""
    root = Path(__file__).parents[1]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
        "lit_sparse": ls.__version__,
        "commit": commit.stdout.strip() or None,
        "torch": torch.__version__,
        "peft": peft.__version__,
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
    }


def write_json(file: str | None, content: Mapping[str, Any]) -> None:
    if file is not None:
        Path(file).write_text(json.dumps(content, indent=1) + "\n")
