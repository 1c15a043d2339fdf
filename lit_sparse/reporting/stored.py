"""An adapter as a file holds it, and the figures of one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.statistics import LayerSparsity, live_ranks, sparsity_of_layer


@dataclass(frozen=True, eq=False)
class StoredLayer:
    """A, B and gate of one layer.

    Args:
        name: Full name of the layer.
        lora_A: Shape ``(copies · rank, in_features)``.
        lora_B_t: Shape ``(copies · rank, out_features)``.
        gate: Shape ``(copies · rank,)``, None without gates.
        scale: What BA is multiplied by; None if the file does not say.
        alpha: Numerator of the scale; None if the file does not say.
        copies: Number of matrices, each with its own ranks (experts).
        max_rank: Ranks of each copy at the start, before any were taken out.
    """

    name: str
    lora_A: Tensor
    lora_B_t: Tensor
    gate: Tensor | None
    scale: float | None
    alpha: float | None
    copies: int
    max_rank: int

    @property
    def rank(self) -> int:
        """Ranks held by each copy."""
        return self.lora_A.shape[0] // self.copies

    @property
    def in_features(self) -> int:
        """Columns of each matrix."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of each matrix."""
        return self.lora_B_t.shape[1]

    def scaled_lora_B_t(self) -> Tensor:
        """``scale · gate ∘ Bᵀ`` in float64, shape ``(copies · rank, out_features)``; an unknown scale counts as 1."""
        factor = self.lora_B_t.detach().double() * (1.0 if self.scale is None else self.scale)
        return factor if self.gate is None else factor * self.gate.detach().double().unsqueeze(1)

    def change_per_copy(self) -> Tensor:
        """Frobenius norm of ``scale · B diag(gate) A`` of each copy, shape ``(copies,)``, from r × r products only."""
        A = self.lora_A.detach().double().view(self.copies, self.rank, self.in_features)
        B_t = self.scaled_lora_B_t().view(self.copies, self.rank, self.out_features)
        squares = ((A @ A.mT) * (B_t @ B_t.mT)).sum((1, 2))  # ‖BA‖² = ⟨BᵀB, AAᵀ⟩
        return squares.clamp(min=0).sqrt()


@dataclass(frozen=True)
class LayerFigures:
    """A line of the table.

    Args:
        sparsity: Ranks, densities, remaining parameters.
        alpha: Numerator of the scale; None where it is not known.
        scale: What BA is multiplied by; None where it is not known.
        norm_A: Frobenius norm of A, dead ranks counted as zero; None if only a table is stored.
        norm_B: The same of B.
        norm_BA: Frobenius norm of ``scale · B diag(gate) A``, of all copies together; without the scale where that is
            not known.
        bytes: What A, B and gate take as they are stored.
    """

    sparsity: LayerSparsity
    alpha: float | None = None
    scale: float | None = None
    norm_A: float | None = None
    norm_B: float | None = None
    norm_BA: float | None = None
    bytes: int | None = None


def stored_layer(name: str, adapter: LowRankAdapter) -> StoredLayer:
    """The adapter of a model, as if it were stored."""
    copies, max_rank = adapter.copies, adapter.max_rank
    A, B_t = adapter.lora_A.detach().cpu(), adapter.lora_B_t.detach().cpu()
    gate = None if adapter.gate is None else adapter.gate.detach().cpu()
    return StoredLayer(name, A, B_t, gate, adapter.scale, None, copies, max_rank)


@torch.no_grad()
def figures_of(layer: StoredLayer) -> LayerFigures:
    """Everything that the table says of a layer."""
    live = live_ranks(layer)
    tensors = [t for t in (layer.lora_A, layer.lora_B_t, layer.gate) if t is not None]
    return LayerFigures(
        sparsity=sparsity_of_layer(layer.name, layer),
        alpha=layer.alpha,
        scale=layer.scale,
        norm_A=float(layer.lora_A[live].double().norm()),
        norm_B=float(layer.lora_B_t[live].double().norm()),
        norm_BA=float(layer.change_per_copy().norm()),
        bytes=sum(t.numel() * t.element_size() for t in tensors),
    )
