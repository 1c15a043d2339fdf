"""A and B of one layer apart from its model: what exports fold, and what files hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import adapters_in


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerFactors:
    """A, B and gate of one layer.

    Args:
        name: Full name of the layer.
        lora_A: Shape ``(sum of ranks, in_features)``.
        lora_B_t: Shape ``(sum of ranks, out_features)``.
        ranks: Rows that belong to each matrix: one number, or one for each expert.
        max_rank: Ranks of each matrix at the start of training, before any were removed.
        gate: Shape ``(sum of ranks,)``; None without gates.
        scale: Factor of B diag(gate) A; None if the file does not record it.
        alpha: Numerator of the scale; None if it is not known.
        packed: Bytes in a file that stores nonzero entries alone; None: as they are here.
    """

    name: str
    lora_A: Tensor
    lora_B_t: Tensor
    ranks: tuple[int, ...]
    max_rank: int
    gate: Tensor | None = None
    scale: float | None = 1.0
    alpha: float | None = None
    packed: int | None = None

    @classmethod
    def of(cls, name: str, adapter: LowRankAdapter) -> LayerFactors:
        """The factors of an adapter in a model, sharing its memory."""
        gate = adapter.effective_gate()
        return cls(
            name=name,
            lora_A=adapter.lora_A.detach(),
            lora_B_t=adapter.lora_B_t.detach(),
            ranks=(adapter.rank,) * adapter.copies,
            max_rank=adapter.max_rank,
            gate=None if gate is None else gate.detach(),
            scale=adapter.scale,
        )

    @property
    def in_features(self) -> int:
        """Columns of each matrix BA."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Rows of each matrix BA."""
        return self.lora_B_t.shape[1]

    @property
    def start_size(self) -> int:
        """Entries of A and B at the start of training."""
        return len(self.ranks) * self.max_rank * (self.in_features + self.out_features)

    @property
    def nbytes(self) -> int:
        """Stored bytes of A, B and gate."""
        whole = sum(tensor.nbytes for tensor in (self.lora_A, self.lora_B_t, self.gate) if tensor is not None)
        return whole if self.packed is None else self.packed

    def scaled_lora_B_t(self) -> Tensor:
        """``scale · gate ∘ Bᵀ`` in float64, shape ``(sum of ranks, out_features)``; an unknown scale counts as 1."""
        scale = 1.0 if self.scale is None else self.scale
        return self.lora_B_t.double() * (scale if self.gate is None else (self.gate.double() * scale).unsqueeze(1))

    @cached_property
    def change_norms(self) -> Tensor:
        """Frobenius norm of ``scale · B diag(gate) A`` of each matrix, shape ``(len(ranks),)``; BA is not formed."""
        parts = zip(self.lora_A.double().split(self.ranks), self.scaled_lora_B_t().split(self.ranks), strict=True)
        squares = torch.stack([((A @ A.mT) * (B_t @ B_t.mT)).sum() for A, B_t in parts])  # ‖BA‖² = ⟨BᵀB, AAᵀ⟩
        return squares.clamp(min=0).sqrt()


@torch.no_grad()
def stacked(
    changes: Sequence[Mapping[str, LayerFactors]], weights: Sequence[float], names: Iterable[str]
) -> dict[str, LayerFactors]:
    """The exact sum of several changes: ``Σ w_i B_i A_i = [w_1 B_1, w_2 B_2, …] · [A_1; A_2; …]``.

    Args:
        changes: The layers of each change, with scale 1 and without gates.
        weights: Of each change.
        names: The layers to add up.

    Returns:
        Layers that keep a rank, with as many as the changes have together.
    """
    found: dict[str, LayerFactors] = {}
    for name in names:
        own = [(layers[name], w) for layers, w in zip(changes, weights, strict=True) if name in layers and w]
        copies = range(len(own[0][0].ranks)) if own else range(0)
        split = [(layer.lora_A.split(layer.ranks), layer.lora_B_t.split(layer.ranks), w) for layer, w in own]
        A = [torch.cat([rows_A[copy] for rows_A, _, _ in split]) for copy in copies]
        B_t = [torch.cat([rows_B_t[copy] * w for _, rows_B_t, w in split]) for copy in copies]
        if any(map(len, A)):
            found[name] = layer_of(name, A, B_t)
    return found


def layer_of(name: str, A: Sequence[Tensor], B_t: Sequence[Tensor]) -> LayerFactors:
    """A layer of scale 1 with these matrices, one for each expert or one alone."""
    ranks, rows_A, rows_B_t = tuple(map(len, A)), torch.cat(list(A)), torch.cat(list(B_t))
    largest = max(ranks)
    return LayerFactors(
        name=name, lora_A=rows_A, lora_B_t=rows_B_t, ranks=ranks, max_rank=largest, alpha=float(largest)
    )


@torch.no_grad()
def gate_record(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Record the gates that a method computes from its parameters, for readers without the method's class.

    Args:
        model: Module with adapters.
        state: Its state, as a checkpoint holds it.

    Returns:
        ``{"gates": {layer name: effective gate}}``; empty where the parameters are the gates.
    """
    gates = {
        name: adapter.gate_function(state[f"{name}.gate"], False)
        for name, adapter in adapters_in(model)
        if isinstance(adapter, LowRankAdapter) and adapter.gate_function is not None and f"{name}.gate" in state
    }
    return {"gates": gates} if gates else {}
