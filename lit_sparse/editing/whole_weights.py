"""Change whole weights of some layers, apart from the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.experts import ExpertWeight
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.selection import select_layers
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Patch, patch_of_deltas


class WholeWeights:
    """Base of methods that change whole weights of some layers.

    Args:
        target_modules: ``"all-linear"``, a list of whole trailing name parts, or one regular expression over full
            names, as for the methods.
        layers: Numbers of the transformer blocks to change, or one number; None: all.
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
        return f"{type(self).__name__}({arguments})"


class FineTuning(WholeWeights):
    """Plain fine-tuning of the weights of some layers: the baseline for editing with adapters."""


@dataclass(frozen=True)
class Changing:
    """Weights that can be changed.

    Args:
        layers: Name of a weight to its layer.
        weights: Name to copy, float32 or wider, with which the layer computes, rounded to its own type.
        before: Name to the weight as it was.
    """

    layers: Mapping[str, Any]
    weights: Mapping[str, nn.Parameter]
    before: Mapping[str, Tensor]

    @property
    def count(self) -> int:
        """Number of their entries."""
        return sum(weight.numel() for weight in self.weights.values())

    def require_linear(self, what: str) -> None:
        """Raise a UsageError, which says what needs linear layers, if one is of another kind."""
        others = sorted(name for name, layer in self.layers.items() if not isinstance(layer, FrozenLinear))
        if others:
            raise UsageError(f"{what} changes linear layers, and {others[:3]} are of other kinds: leave them out.")

    def as_matrix(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the weight's shape, seen as ``(out_features, in_features)``."""
        return tensor.mT if isinstance(self.layers[name], Conv1D) else tensor

    def patch(self) -> Patch:
        """The changes so far."""
        deltas = {name: w.detach() - self.before[name].to(w.dtype) for name, w in self.weights.items()}
        return patch_of_deltas(deltas)


@contextmanager
def changing(model: nn.Module, method: WholeWeights) -> Iterator[Changing]:
    """Give the layers that a method chooses copies of their weights, and put the weights back.

    Raises:
        UsageError: If no layer is chosen, or one is of experts or quantized.
    """
    chosen = select_layers(model, method.target_modules, method.layers, method.exclude_modules)
    names = {id(p): name for name, p in model.named_parameters()}
    experts = any(isinstance(layer, ExpertWeight) for layer in chosen.values())
    if experts or not all(id(layer.weight) in names for layer in chosen.values()):
        kind = type(method).__name__
        raise UsageError(
            f"{kind} changes the weights of plain layers, not those of experts or quantized layers: leave them out "
            "(exclude_modules)."
        )
    layers: dict[str, Any] = {names[id(layer.weight)]: layer for layer in chosen.values()}
    model.requires_grad_(False)
    before = {name: layer.weight.detach() for name, layer in layers.items()}
    with ExitStack() as stack:
        weights = {name: stack.enter_context(_in_float32(layer)) for name, layer in layers.items()}
        yield Changing(layers, weights, before)


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
