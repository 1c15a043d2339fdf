"""Train a small change of a model's weights, and return the change apart from the model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.experts import ExpertWeight
from lit_sparse.adapters.injection import inject, take_out
from lit_sparse.adapters.modes import in_mode
from lit_sparse.adapters.selection import select_layers
from lit_sparse.editing.objective import Objective
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Patch, patch_of, patch_of_deltas
from lit_sparse.methods.method import Method
from lit_sparse.methods.stepping import SparseSteps
from lit_sparse.modules.optimization import make_optimizer, relative_groups


class FineTuning:
    """Plain fine-tuning of the weights of some layers: the baseline for editing with adapters.

    Args:
        target_modules: ``"all-linear"``, a list of whole trailing name parts, or one regular expression over full
            names, as for the methods.
        layers: Numbers of the transformer blocks to train, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.

    Raises:
        UsageError: If ``target_modules`` is empty.
    """

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        layers: int | list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
    ) -> None:
        if not target_modules:
            raise UsageError(f"target_modules is {target_modules!r}: name at least one layer, or give 'all-linear'.")
        self.target_modules = target_modules
        self.layers = layers
        self.exclude_modules = exclude_modules

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"FineTuning({arguments})"


@dataclass(frozen=True)
class Trained:
    """A change that was trained.

    Args:
        patch: What to add to the model's weights.
        weights: Number of weight entries that could have changed.
        steps: Optimizer steps taken.
        loss: The last loss, in nats per token: the mean over the batches that took turns.
        seconds: Time of the steps alone.
    """

    patch: Patch
    weights: int
    steps: int
    loss: float
    seconds: float


@dataclass(frozen=True)
class _Trainable:
    """What an optimizer trains in a model, and how to read the change."""

    groups: list[dict[str, Any]]
    weights: int
    patch: Callable[[], Patch]


def train(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    method: Method | FineTuning,
    steps: int,
    optimizer: OptimizerCallable,
    stop_loss: float | None,
) -> Trained:
    """Train a change on batches that take turns; afterwards the model is bit for bit what it was.

    Args:
        model: A causal language model without adapters.
        batches: The rows of each batch, as :class:`~lit_sparse.editing.objective.Objective` takes them.
        method: What is trained. It must not train a head.
        steps: Optimizer steps, at most.
        optimizer: Makes the optimizer from parameter groups.
        stop_loss: Training stops at this loss, in nats per token, as the mean over the last step of every batch, once
            the method's sparsity is final; None: never.

    Raises:
        UsageError: If the method trains more than the weights of its target layers, or cannot work in so few steps.
    """
    objectives = [Objective(model, batch) for batch in batches]
    trainable = _weights(model, method) if isinstance(method, FineTuning) else _adapters(model, method)
    with torch.enable_grad(), in_mode(model, training=True), trainable as change:
        made = make_optimizer(optimizer, change.groups)
        sparse = SparseSteps(method, model, made, steps, alone=True) if isinstance(method, Method) else None
        settled = method.settled_after(steps) if isinstance(method, Method) else 0
        turn: deque[Tensor] = deque(maxlen=len(batches))
        start = time.perf_counter()
        taken = 0
        while taken < steps:
            loss, whole = objectives[taken % len(batches)](model)
            turn.append(loss.detach())
            # Reading losses waits for the device, so they are read only where training may stop.
            may_stop = taken + 1 >= settled + len(batches)
            if stop_loss is not None and may_stop and _mean(turn) <= stop_loss:
                break
            whole.sum().backward()
            if sparse is not None:
                sparse.observe()
            made.step()
            made.zero_grad()
            taken += 1
        last = (
            torch.stack(tuple(turn)).mean().item() + 0.0
        )  # not -0.0; before reading the clock, which does not wait for the device
        seconds = time.perf_counter() - start
        if sparse is not None:
            sparse.finish()
        return Trained(change.patch(), change.weights, taken, last, seconds)


def _mean(losses: Iterable[Tensor]) -> float:
    return torch.stack(tuple(losses)).mean().item()


@contextmanager
def _adapters(model: nn.Module, method: Method) -> Iterator[_Trainable]:
    """Inject the method's adapters, and take them out again."""
    adapters = inject(model, method)
    try:
        require_adapters_alone(model, method, adapters)
        weights = sum(adapter.weight.numel() for adapter in adapters.values())
        yield _Trainable(relative_groups(model, method), weights, lambda: patch_of(adapters))
    finally:
        take_out(model)


def require_adapters_alone(model: nn.Module, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """Refuse a method that also trains other parameters than those of its adapters."""
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters(recurse=False)}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if outside:
        raise UsageError(
            f"An edit changes only adapted weights, but {method!r} also trains {outside[:3]}: set train_head to false."
        )


@contextmanager
def _weights(model: nn.Module, method: FineTuning) -> Iterator[_Trainable]:
    """Train copies of the weights of some layers, and put the weights back."""
    chosen = select_layers(model, method.target_modules, method.layers, method.exclude_modules)
    names = {id(p): name for name, p in model.named_parameters()}
    experts = any(isinstance(layer, ExpertWeight) for layer in chosen.values())
    if experts or not all(id(layer.weight) in names for layer in chosen.values()):
        raise UsageError("FineTuning trains the weights of plain layers, not those of experts or quantized layers.")
    layers: dict[str, Any] = {names[id(layer.weight)]: layer for layer in chosen.values()}
    model.requires_grad_(False)
    before = {name: layer.weight.detach() for name, layer in layers.items()}
    with ExitStack() as stack:
        weights = {name: stack.enter_context(_in_float32(layer)) for name, layer in layers.items()}

        def patch() -> Patch:
            return patch_of_deltas({name: w.detach() - before[name].to(w.dtype) for name, w in weights.items()})

        groups = [{"params": list(weights.values())}]
        yield _Trainable(groups, sum(weight.numel() for weight in weights.values()), patch)


@contextmanager
def _in_float32(layer: Any) -> Iterator[nn.Parameter]:
    """Give a layer a weight to train in float32 or better, which it rounds to its own type to compute with."""
    stored = layer.weight
    wide = stored.detach().to(torch.promote_types(stored.dtype, torch.float32), copy=True)
    layer.weight = nn.Parameter(wide)
    parametrize.register_parametrization(layer, "weight", _Rounded(stored.dtype), unsafe=True)
    try:
        yield layer.parametrizations.weight.original
    finally:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        layer.weight = stored


class _Rounded(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self._dtype)
