"""The adapter of a linear layer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as modules
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.base import LowRankLayer, ReplacesLayer
from lit_sparse.adapters.fused import autocasts, fused_linear
from lit_sparse.errors import UsageError

FrozenLinear = nn.Linear | Conv1D
"""Linear layers; GPT-2's Conv1D is one that stores its weight as (in, out)."""

# Hooks on all modules: torch fills and empties these dictionaries in place (since 2.6).
_GLOBAL_HOOKS = (
    modules._global_forward_hooks,
    modules._global_forward_pre_hooks,
    modules._global_backward_hooks,
    modules._global_backward_pre_hooks,
)


class ReplacesLinear(ReplacesLayer):
    """An adapter that replaces a linear layer."""

    base: FrozenLinear

    @property
    def matrix(self) -> Tensor:
        """The frozen weight as ``(out_features, in_features)``."""
        return self._as_matrix(self.weight)

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t() if isinstance(self.base, Conv1D) else weight

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t() if isinstance(self.base, Conv1D) else matrix


class LowRankLinear(LowRankLayer, ReplacesLinear):
    """``y = base(x) + scale · B (gate ∘ (A x))``, with ``base`` frozen.

    Its arguments are those of every adapter that replaces a layer; ``base`` is an ``nn.Linear`` or ``Conv1D``.
    """

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        if not isinstance(base, FrozenLinear):
            raise UsageError(f"LowRankLinear adapts nn.Linear and Conv1D; got {type(base).__name__}.")
        return features_of(base)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not self.enabled or not self.rank:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, self.in_features)
        # Gate and scale are folded into B: rank · out_features products instead of tokens · rank.
        if self._can_fuse(rows):
            y = self._fused(rows)
        else:
            y = self.base(rows)
            hidden = F.linear(self.dropout(rows).to(y.dtype), self.lora_A.to(y.dtype)).to(y.dtype)
            y = torch.addmm(y, hidden, self.scaled_lora_B_t(self.training).to(y.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def _fused(self, rows: Tensor) -> Tensor:
        weight = self._as_matrix(self.base.weight)
        bias: Tensor | None = self.base.bias
        if autocasts(rows) and rows.dtype != torch.float64:
            # As autocast would, but once for the two products that read the rows.
            rows = rows.to(torch.get_autocast_dtype(rows.device.type))
        dropout = self.dropout.p if isinstance(self.dropout, nn.Dropout) and self.dropout.training else 0.0
        gate = self.effective_gate(self.training)
        return fused_linear(rows, weight, bias, self.lora_A, self.lora_B_t, gate, self.scale, dropout)

    def _can_fuse(self, rows: Tensor) -> bool:
        return type(self.dropout) in (nn.Identity, nn.Dropout) and may_fuse(self.base, rows)


def features_of(base: FrozenLinear) -> tuple[int, int]:
    """Inputs and outputs of a linear layer."""
    # Not the shape of an nn.Linear's weight, which may be packed.
    return (base.nx, base.nf) if isinstance(base, Conv1D) else (base.in_features, base.out_features)


def may_fuse(base: FrozenLinear, rows: Tensor) -> bool:
    """Whether calling ``base`` would only multiply by its weight, without hooks, and a hand-written backward serves."""
    weight = base.weight
    casts = autocasts(rows) and torch.float64 not in (rows.dtype, weight.dtype)
    return (
        type(base) in (nn.Linear, Conv1D)  # a sub-class may compute something else
        and type(weight) in (nn.Parameter, Tensor)  # quantized and sharded weights have classes of their own
        and not weight.requires_grad
        and (base.bias is None or not base.bias.requires_grad)
        and (rows.dtype == weight.dtype or casts)
        and not (base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks)
        and "forward" not in base.__dict__  # replaced on the object, as accelerate does to move weights
        and not any(_GLOBAL_HOOKS)
        # An exported graph is to have operators of torch alone; the others do not take a hand-written backward.
        and not torch.compiler.is_exporting()
        and forward_ad._current_level < 0
        and not torch._C._get_tracing_state()
        and not torch._C._are_functorch_transforms_active()
    )
