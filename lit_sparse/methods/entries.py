"""Methods that train single entries of the frozen weights, without factors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.quantized import is_quantized
from lit_sparse.errors import UsageError, listed, require_range
from lit_sparse.methods.method import Method


@dataclass(eq=False, repr=False, kw_only=True)
class Entries(Method):
    """Methods whose adapters are a :class:`~lit_sparse.DeltaLinear`: ``W = W0 + ΔW``, with few trained entries in ΔW.

    Merging writes these entries alone. Linear layers that are not quantized can be adapted. The other arguments are
    those of :class:`~lit_sparse.Method`.

    Args:
        changed: The share of each adapted weight that is trained, in (0, 1]; rounded down to whole entries, at least
            one.

    Raises:
        UsageError: If ``changed`` is outside its range.
    """

    overridable = ("changed",)

    changed: float = 0.02

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("changed", self.changed, above=0, at_most=1)

    def scores(self, weight: Tensor) -> Tensor | None:
        """The score of every entry of a frozen weight, of which the highest are trained; None: they come later."""
        raise NotImplementedError

    def settings(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
        """What ``overrides`` sets for each layer; raises UsageError for layers that are not linear, or quantized."""
        found = super().settings(layers)
        refused = [n for n, layer in layers.items() if not isinstance(layer, FrozenLinear) or is_quantized(layer)]
        if refused:
            raise UsageError(
                f"{type(self).__name__} trains entries of linear layers that are not quantized: {listed(refused)} are "
                "of another kind. Leave them out by exclude_modules, or take a low-rank method, such as RoseLoRA."
            )
        return found

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> DeltaLinear:
        """Wrap one frozen layer, and choose its entries."""
        if not isinstance(layer, FrozenLinear):
            raise UsageError(f"{type(self).__name__} adapts linear layers; got {type(layer).__name__}.")
        adapter = DeltaLinear(layer, self._count(layer.weight, overrides))
        adapter.overrides = overrides
        scores = self.scores(layer.weight.detach())
        if scores is not None:
            place(adapter, scores)
        return adapter

    def mismatch(self, adapter: Any) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if not isinstance(adapter, DeltaLinear):
            return "factors A and B"
        wanted = max(1, math.floor(self._share(adapter.overrides) * adapter.in_features * adapter.out_features + 1e-6))
        if adapter.size != wanted:
            return f"{adapter.size:,} trained entries, not {wanted:,}"
        return None

    def goal(self, adapters: Sequence[DeltaLinear]) -> str | None:
        """The number of weights that are trained."""
        weights = sum(adapter.in_features * adapter.out_features for adapter in adapters)
        return f"{sum(adapter.size for adapter in adapters):,} of {weights:,} adapted weights are trained."

    def _share(self, overrides: Mapping[str, float]) -> float:
        return overrides.get("changed", self.changed)

    def _count(self, weight: Tensor, overrides: Mapping[str, float]) -> int:
        return max(1, math.floor(self._share(overrides) * weight.numel() + 1e-6))


def by_chance(weight: Tensor) -> Tensor:
    """Random scores, which are drawn on the CPU so that every device has the same."""
    return torch.rand(weight.shape).to(weight.device)


@torch.no_grad()
def place(adapter: DeltaLinear, scores: Tensor) -> None:
    """Let an adapter train the entries with the highest scores, of any shape; its values stay as they are."""
    adapter.indices.copy_(highest(scores, adapter.size))


def highest(scores: Tensor, count: int) -> Tensor:
    """The places of the highest scores in their flat form, ascending."""
    return scores.flatten().topk(count, sorted=False).indices.sort().values
