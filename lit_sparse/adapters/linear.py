"""The adapter of a linear layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.base import LowRankLayer
from lit_sparse.errors import UsageError

FrozenLinear = nn.Linear | Conv1D
"""Linear layers; GPT-2's Conv1D is one that stores its weight as (in, out)."""


class LowRankLinear(LowRankLayer):
    """``y = base(x) + scale · B (gate ∘ (A x))``, with ``base`` frozen.

    Args:
        base: Frozen layer, ``nn.Linear`` or ``Conv1D``.
        rank: Number of ranks r, at least 1.
        scale: What B diag(gate) A is multiplied by: alpha / rank.
        dropout: Probability of zeroing an entry of x before A, while training, in [0, 1).
        gated: Whether each rank has a gate.

    Raises:
        UsageError: If ``base`` is not linear, ``rank`` < 1, or ``dropout`` is outside [0, 1).
    """

    base: FrozenLinear

    def __init__(self, base: FrozenLinear, rank: int, scale: float, dropout: float = 0.0, gated: bool = False) -> None:
        if not isinstance(base, FrozenLinear):
            raise UsageError(f"LowRankLinear adapts nn.Linear and Conv1D; got {type(base).__name__}.")
        if isinstance(base, Conv1D):
            in_features, out_features = base.weight.shape
        else:
            in_features, out_features = base.in_features, base.out_features
        super().__init__(base, in_features, out_features, rank, scale, dropout, gated)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not self.enabled or not self.rank:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, self.in_features)
        y = self.base(rows)
        hidden = F.linear(self.dropout(rows).to(y.dtype), self.lora_A.to(y.dtype)).to(y.dtype)
        # Gate and scale are folded into B: rank · out_features products instead of tokens · rank.
        lora_B_t = self.scaled_lora_B_t().to(y.dtype)
        y = y.addmm_(hidden, lora_B_t) if self._owns_output() else torch.addmm(y, hidden, lora_B_t)
        return y.view(*x.shape[:-1], self.out_features)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if isinstance(self.base, Conv1D) else weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t() if isinstance(self.base, Conv1D) else matrix

    def _owns_output(self) -> bool:
        # Hooks, the base's own or global, may keep its output (and backward hooks forbid changing it in place).
        base = self.base
        hooked = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks or _has_any_global_hook()
        return type(base) in (nn.Linear, Conv1D) and not hooked
