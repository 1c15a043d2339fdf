"""Train a small change of a model's weights, and give the change apart from the model."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.experts import ExpertWeight
from lit_sparse.adapters.injection import inject, take_out
from lit_sparse.adapters.selection import select_layers
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Patch, patch_of, patch_of_deltas
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.stepping import SparseSteps
from lit_sparse.modules.optimization import make_optimizer, parameter_groups


class FineTuning:
    """Plain fine-tuning of some layers' weights: what editing by adapters is compared with.

    Args:
        target_modules: ``"all-linear"``, a list of whole trailing name parts, or one regular expression over full
            names, as for the methods.
        layers: Numbers of the transformer blocks to train, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
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
class Training:
    """How a change is trained.

    Args:
        method: What is trained; a method's head is not.
        steps: Optimizer steps, at most.
        optimizer: Makes the optimizer of one change from parameter groups.
        stop_loss: Loss, in nats per token, at which training stops once the method's sparsity is final; None: never.
    """

    method: SparseMethod | FineTuning
    steps: int
    optimizer: OptimizerCallable
    stop_loss: float | None


@dataclass(frozen=True)
class Trained:
    """A change that was trained.

    Args:
        patch: What to add to the model's weights.
        weights: Entries of the weights that could have changed.
        steps: Optimizer steps that were taken.
        loss: The last loss that was seen, in nats per token.
        seconds: Time of the steps alone.
    """

    patch: Patch
    weights: int
    steps: int
    loss: float
    seconds: float


def train(model: nn.Module, batch: Mapping[str, Tensor], how: Training) -> Trained:
    """Train a change on one batch, step after step; the model is then bit for bit what it was.

    Args:
        model: A causal language model without adapters.
        batch: Arguments of the model, ``labels`` among them.
        how: The method and its settings.

    Raises:
        UsageError: If the method trains more than weights of the layers that it targets, or cannot work in so few
            steps.
    """
    part = _Weights if isinstance(how.method, FineTuning) else _Adapters
    with torch.enable_grad(), _trained(model), part(model, how.method) as change:  # type: ignore[arg-type]
        optimizer = make_optimizer(how.optimizer, change.groups)
        settled = change.follow(optimizer, how.steps)
        start = time.perf_counter()
        steps = 0
        while steps < how.steps:
            loss = model(**batch, use_cache=False).loss
            # Only where training may stop does it wait for the device.
            if how.stop_loss is not None and steps >= settled and loss.item() <= how.stop_loss:
                break
            loss.backward()
            change.observe()
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
        last = loss.item()  # before the clock is read, which does not wait for the device
        seconds = time.perf_counter() - start
        return Trained(change.patch(), change.weights, steps, last, seconds)


class _Adapters:
    """Adapters of a sparse method, put in and taken out again."""

    def __init__(self, model: nn.Module, method: SparseMethod) -> None:
        self._model, self._method = model, method
        self._steps: SparseSteps | None = None

    def __enter__(self) -> _Adapters:
        self._adapters = inject(self._model, self._method)
        own = {id(p) for adapter in self._adapters.values() for p in adapter.parameters(recurse=False)}
        outside = [name for name, p in self._model.named_parameters() if p.requires_grad and id(p) not in own]
        if outside:
            self.__exit__()
            raise UsageError(
                f"An edit changes the weights that are adapted, and {self._method!r} trains {outside[:3]} too: set "
                "train_head to false."
            )
        self.groups = parameter_groups(self._model, self._method)
        self.weights = sum(adapter.weight.numel() for adapter in self._adapters.values())
        return self

    def __exit__(self, *_: object) -> None:
        if self._steps is not None:
            self._steps.release()
        take_out(self._model)

    def follow(self, optimizer: Optimizer, total: int) -> int:
        """Let the method act around every step; the step after which its sparsity is final."""
        self._steps = SparseSteps(self._method, self._model, optimizer, total)
        return self._method.settled_after(total)

    def observe(self) -> None:
        if self._steps is not None:
            self._steps.observe()

    def patch(self) -> Patch:
        return patch_of(self._adapters)


class _Weights:
    """The weights of some layers themselves, put back afterwards."""

    def __init__(self, model: nn.Module, method: FineTuning) -> None:
        self._model = model
        chosen = select_layers(model, method.target_modules, method.layers, method.exclude_modules)
        names = {id(p): name for name, p in model.named_parameters()}
        weights = [layer.weight for layer in chosen.values()]
        experts = any(isinstance(layer, ExpertWeight) for layer in chosen.values())
        if experts or not all(id(weight) in names for weight in weights):
            raise UsageError("FineTuning trains the weights of plain layers, not those of experts or quantized ones.")
        self._weights: dict[str, Any] = {names[id(weight)]: weight for weight in weights}

    def __enter__(self) -> _Weights:
        self._model.requires_grad_(False)
        self._before = {name: weight.detach().clone() for name, weight in self._weights.items()}
        for weight in self._weights.values():
            weight.requires_grad_(True)
        self.groups: list[dict[str, Any]] = [{"params": list(self._weights.values())}]
        self.weights = sum(weight.numel() for weight in self._weights.values())
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for name, weight in self._weights.items():
            weight.requires_grad_(False)
            weight.grad = None
            weight.copy_(self._before[name])

    def follow(self, optimizer: Optimizer, total: int) -> int:  # noqa: ARG002
        return 0

    def observe(self) -> None:
        pass

    @torch.no_grad()
    def patch(self) -> Patch:
        wide = torch.promote_types(next(iter(self._before.values())).dtype, torch.float32)
        return patch_of_deltas({n: w.detach().to(wide) - self._before[n].to(wide) for n, w in self._weights.items()})


@contextmanager
def _trained(model: nn.Module) -> Iterator[None]:
    """Within the context the model is in training mode; after it, every module in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
