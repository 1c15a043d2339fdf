"""What happens around an optimizer step: as many kernels and as much memory for many layers as for few."""

import functools
import itertools
import json
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import lit_sparse as ls
from lit_sparse.adapters.statistics import live_ranks_of_all
from lit_sparse.functional import piecewise

METHODS = {
    "SoRA": functools.partial(ls.SoRA, threshold=1e-3, l1_weight=1.0, freeze_zero_after=3),
    "RoseLoRA": functools.partial(ls.RoseLoRA, density=0.2, begin=0, end=4, clamp=0.1),
    "RoseLoRA, masks chosen": functools.partial(ls.RoseLoRA, density=0.2, begin=0, end=4, update_every=3),
    "RoseLoRA, masks kept": functools.partial(ls.RoseLoRA, density=0.2, begin=0, end=4, update_every=2),
    "SoRA, budget": functools.partial(ls.SoRA, budget=0.5, begin=0, end=4, score="norm"),
    "SoRA, budget before a cut": functools.partial(ls.SoRA, budget=0.5, begin=6, end=6),
    "SoRA, budget held": functools.partial(ls.SoRA, budget=0.5, begin=0, end=2, score="sensitivity"),
    "GatedRoseLoRA, budget": functools.partial(ls.GatedRoseLoRA, budget=0.5, density=0.2, begin=0, end=4),
    "HardConcreteLoRA, penalty": functools.partial(ls.HardConcreteLoRA, penalty_weight=0.5),
    "HardConcreteLoRA, budget": functools.partial(ls.HardConcreteLoRA, budget=0.5, begin=0, end=4),
    "RoseLoRA, changed": functools.partial(ls.RoseLoRA, changed=0.3, begin=0, end=9),
    "GatedRoseLoRA, changed": functools.partial(ls.GatedRoseLoRA, changed=0.3, begin=0, end=9, threshold=1e-3),
    "GatedRoseLoRA": functools.partial(ls.GatedRoseLoRA, threshold=1e-3, density=0.2, begin=0, end=4),
}
VIEWS = {"detach", "view", "slice", "split_with_sizes", "unsqueeze", "t", "alias", "expand"}


class Kernels(TorchDispatchMode):
    """Counts operators, but for those that only look at memory in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in VIEWS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def kernels_of_a_step(method: ls.SparseMethod, layers: int) -> Counter[str]:
    """Those between the backward pass and the end of the optimizer step, when the method is in the midst of its run."""
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
    ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-3, fused=True)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=10)
    for number in range(3):
        model(torch.randn(4, 16)).square().sum().backward()
        kernels = Kernels()
        with kernels:
            steps.observe()
            optimizer.step()
        optimizer.zero_grad()
        assert steps.steps_taken == number + 1
    return kernels.counts


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_kernels_do_not_grow_with_the_layers(method: str) -> None:
    few, many = (kernels_of_a_step(METHODS[method](rank=2, target_modules=r"\d+"), n) for n in (3, 12))
    assert few == many
    assert sum(many.values()) < (110 if "changed" in method else 70 if "budget" in method else 40)


def test_watching_for_dead_ranks_costs_as_many_kernels_for_many_layers_as_for_few() -> None:
    counts = []
    for layers in (3, 12):
        model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(layers)))
        adapters = ls.inject(model, ls.SoRA(r"\d+", rank=2, threshold=1e-3))
        with Kernels() as kernels:
            live_ranks_of_all(list(adapters.values()))
        counts.append(kernels.counts)
    assert counts[0] == counts[1]
    assert sum(counts[1].values()) < 20


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_that_keeps_its_masks_selects_nothing() -> None:
    chosen, kept = (
        kernels_of_a_step(METHODS[f"RoseLoRA, masks {how}"](rank=2, target_modules=r"\d+"), 3)
        for how in ("chosen", "kept")
    )
    assert chosen["nan_to_num"] >= 1
    assert not kept.keys() & {"nan_to_num", "topk", "cumsum"}


def peak_of_an_update(method: ls.SparseMethod, layers: int) -> int:
    """The most bytes that tensors and arrays of numpy take at once in a step, beyond what is there before it."""
    model = nn.Sequential(*(nn.Linear(512, 256) for _ in range(layers)))
    adapters = ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-3, fused=True)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=10)
    for number in range(2):
        for parameter in (p for a in adapters.values() for p in (a.lora_A, a.lora_B_t)):
            nn.init.normal_(parameter)
            parameter.grad = torch.randn_like(parameter)
        steps.observe()
        if number == 0:
            optimizer.step()
    tracemalloc.start()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        optimizer.step()
    of_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    trace.export_chrome_trace("trace.json")
    events = json.loads(Path("trace.json").read_bytes())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(itertools.accumulate(size for _, size in changes)) + of_numpy


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["RoseLoRA", "RoseLoRA, masks chosen", "RoseLoRA, masks kept", "RoseLoRA, changed"])
def test_memory_does_not_grow_with_the_layers(method: str) -> None:
    few, many = (peak_of_an_update(METHODS[method](rank=16, target_modules=r"\d+"), n) for n in (40, 160))
    assert many < 24 * piecewise._AT_HAND
    assert many - few < 8 * 257 * 120 * 3  # for each more layer a few times what 257 thresholds let it change
