"""Several adapters of one linear layer at the same time, each for some rows of a batch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.linear import LowRankLinear


class CannotShareError(Exception):
    """Why adapters of several changes cannot share a model; they are trained one after another then."""


def _as_trained(layer: nn.Module, x: Tensor) -> Tensor:
    """The input in the dtype of a layer's own weights: a head may be float32 in a model of half precision.

    Adapters take what their frozen layer takes, and hold values of a higher precision.
    """
    dtype = next(layer.parameters()).dtype
    return x if isinstance(layer, Adapter) or not x.is_floating_point() else x.to(dtype)


@dataclass(eq=False)
class Routes:
    """Which adapter each row of the batch goes through; all layers of a model share one.

    Args:
        copies: Number of the adapter, for each row of the batch: shape ``(rows,)``, dtype long, on the model's device.
    """

    copies: Tensor


def _rows_of(routes: Routes, x: Tensor) -> int:
    """The number of rows; raises a CannotShareError if ``x`` has not as many."""
    rows = len(routes.copies)
    if x.dim() < 2 or len(x) != rows:
        raise CannotShareError(f"an adapted layer gets an input of shape {tuple(x.shape)} for {rows} rows")
    return rows


class RowwiseLinear(LowRankLinear):
    """``y_i = base(x_i) + scale · B_c (gate_c ∘ (A_c x_i))``, where row i of a batch goes through adapter c.

    The ranks of all adapters are consecutive rows of A, Bᵀ, gate and the buffers of the method, as those of experts
    are. So an update that treats each rank by itself treats each adapter as if it were alone.

    Args:
        parts: Adapters of one layer, made alike and without dropout. Their values are copied.
        routes: The adapter of each row.
    """

    def __init__(self, parts: Sequence[LowRankLinear], routes: Routes) -> None:
        first = parts[0]
        super().__init__(first.base, first.rank, first.scale, gated=first.gate is not None)
        self.copies = len(parts)
        self.gate_function, self.overrides = first.gate_function, first.overrides
        self.routes = routes
        for name, _ in first.named_parameters(recurse=False):
            values = torch.cat([getattr(part, name).detach() for part in parts])
            self.register_parameter(name, nn.Parameter(values))
        for name, _ in first.named_buffers(recurse=False):
            self.register_buffer(name, torch.cat([getattr(part, name) for part in parts]))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, ..., in_features)`` to ``(rows, ..., out_features)``.

        Raises:
            CannotShareError: If the input has another shape, so that its rows cannot be told apart.
        """
        rows = _rows_of(self.routes, x)
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        lora_A = self._of_rows(self.lora_A).to(y.dtype)
        lora_B_t = self._of_rows(self.scaled_lora_B_t(self.training)).to(y.dtype)
        hidden = torch.bmm(x.reshape(rows, -1, self.in_features).to(y.dtype), lora_A.mT).to(y.dtype)
        return torch.baddbmm(y.reshape(rows, -1, self.out_features), hidden, lora_B_t).view(y.shape)

    def _of_rows(self, matrix: Tensor) -> Tensor:
        """The matrix of each row's adapter, shape ``(rows, rank, features)``."""
        return matrix.view(self.copies, self.rank, -1)[self.routes.copies]

    @torch.no_grad()
    def copy_to(self, part: LowRankAdapter, copy: int) -> None:
        """Give an adapter the parameters of one of these.

        Args:
            part: Made as the parts were.
            copy: Number of the adapter.
        """
        for name, parameter in part.named_parameters(recurse=False):
            parameter.copy_(getattr(self, name)[copy * self.rank : (copy + 1) * self.rank])


class RowwiseChoice(nn.Module):
    """Layers of any kind, one for each adapter, of which each row of a batch has the output of its own.

    All of them compute all rows, so it is for the few layers that are not :class:`RowwiseLinear`: task heads and
    embeddings.

    Args:
        versions: The layer of each adapter; one layer may stand for several.
        routes: The adapter of each row.
    """

    def __init__(self, versions: Sequence[nn.Module], routes: Routes) -> None:
        super().__init__()
        self.versions = nn.ModuleList(versions)
        self.routes = routes

    def __getattr__(self, name: str) -> Any:
        # Backbones read attributes of a layer, such as its weight's dtype.
        try:
            return super().__getattr__(name)
        except AttributeError:
            first: nn.ModuleList = super().__getattr__("versions")  # type: ignore[assignment]
            return getattr(first[0], name)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, ...)`` to ``(rows, ...)``.

        Raises:
            CannotShareError: If the input has another shape, so that its rows cannot be told apart.
        """
        rows = _rows_of(self.routes, x)
        found: dict[nn.Module, Tensor] = {}
        for version in self.versions:
            if version not in found:
                found[version] = version(_as_trained(version, x))
        outputs = [found[version] for version in self.versions]
        dtype = functools.reduce(torch.promote_types, (output.dtype for output in outputs))
        each = torch.stack([output.to(dtype) for output in outputs])
        return each[self.routes.copies, torch.arange(rows, device=each.device)]
