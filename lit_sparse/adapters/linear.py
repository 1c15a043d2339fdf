"""One low-rank layer around a frozen linear one, with an optional gate on its ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from lit_sparse.errors import UsageError

FrozenLinear = nn.Linear | Conv1D
"""The layers that can be adapted; GPT-2's Conv1D is a linear layer that stores its weight as (in, out)."""


class LowRankLinear(nn.Module):
    """``y = base(x) + scale · B (gate ∘ (A x))``, scale = alpha / rank, with ``base`` frozen.

    B is stored rank-major, as :attr:`lora_B_t` of shape ``(rank, out_features)``: every rank is then one
    contiguous row in A and in B, which makes the thin matrix products and the per-rank updates fast.
    :attr:`lora_B` is the same memory in the orientation of the papers and of PEFT, ``(out_features, rank)``.

    The parameters are float32 when the base is float16 or bfloat16, and stay so under ``module.half()``,
    ``module.to(dtype)`` and Lightning's true half precision: updates of size lr · 1 vanish in 8 bits of
    mantissa. They are rounded to the dtype of the base's output where they are used, as autocast does.

    Args:
        base: Frozen layer, ``nn.Linear`` or ``Conv1D``.
        rank: Number of ranks r, at least 1.
        alpha: Numerator of the scale alpha / rank.
        dropout: Probability of zeroing an entry of x before A, while training, in [0, 1).
        gated: Whether each rank has a gate.

    Raises:
        UsageError: If ``base`` is not linear, ``rank`` < 1, or ``dropout`` is outside [0, 1).

    Source:
        Hu et al. 2021 (arXiv:2106.09685) for A and B; Ding et al. 2023 (arXiv:2311.11696) for the gate.
    """

    lora_A: nn.Parameter
    lora_B_t: nn.Parameter
    gate: nn.Parameter | None

    def __init__(self, base: FrozenLinear, rank: int, alpha: float, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__()
        if not isinstance(base, FrozenLinear):
            raise UsageError(f"Only nn.Linear and Conv1D can be adapted; got {type(base).__name__}.")
        if rank < 1:
            raise UsageError(f"rank must be at least 1; got {rank}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be in [0, 1); got {dropout}.")
        self.base = base.requires_grad_(False)
        self.in_features, self.out_features = _features(base)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.enabled = True

        def new(*shape: int) -> nn.Parameter:
            dtype = torch.promote_types(base.weight.dtype, torch.float32)
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=base.weight.device))

        self.lora_A = new(rank, self.in_features)
        self.lora_B_t = new(rank, self.out_features)
        self.register_parameter("gate", new(rank) if gated else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A Kaiming-uniform (a = √5), B zero, so that training starts at the frozen model; gate ~ N(0, 1)."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B_t)
        if self.gate is not None:
            nn.init.normal_(self.gate)

    @property
    def rank(self) -> int:
        """Number of ranks held, zero gates included."""
        return self.lora_A.shape[0]

    @property
    def lora_B(self) -> Tensor:
        """B of shape ``(out_features, rank)``: a view of :attr:`lora_B_t`, so writing to it in place works."""
        return self.lora_B_t.t()

    @property
    def weight(self) -> Tensor:
        """The frozen weight; backbones such as T5 ask a layer for ``weight.dtype``."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_features)`` to ``(..., out_features)``."""
        if not self.enabled:
            return self.base(x)  # type: ignore[no-any-return]
        rows = x.reshape(-1, self.in_features)
        y = self.base(rows)
        hidden = F.linear(self.dropout(rows).to(y.dtype), self.lora_A.to(y.dtype)).to(y.dtype)
        # Gate and scale are folded into B: rank · out_features products instead of tokens · rank.
        lora_B_t = self.scaled_lora_B_t().to(y.dtype)
        y = y.addmm_(hidden, lora_B_t) if self._owns_output() else torch.addmm(y, hidden, lora_B_t)
        return y.view(*x.shape[:-1], self.out_features)

    def scaled_lora_B_t(self) -> Tensor:
        """``scale · gate ∘ Bᵀ``, shape ``(rank, out_features)``."""
        if self.gate is None:
            return self.lora_B_t * self.scale
        return self.lora_B_t * (self.gate * self.scale).unsqueeze(1)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """What merging would add to the frozen weight, in that weight's own orientation and shape."""
        delta = self.scaled_lora_B_t().t() @ self.lora_A
        return delta.t() if isinstance(self.base, Conv1D) else delta

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        gated = ", gated" if self.gate is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{gated}"

    def _owns_output(self) -> bool:
        # Hooks, the base's own or global, may keep its output (and backward hooks forbid changing it in place).
        base = self.base
        hooked = base._forward_hooks or base._backward_hooks or base._backward_pre_hooks or _has_any_global_hook()
        return type(base) in (nn.Linear, Conv1D) and not hooked

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        # Every .to(), .half() and .cuda() of nn.Module comes through here.
        if recurse:
            for child in self.children():
                child._apply(fn)

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
            return tensor.to(moved.device) if narrowed else moved

        applied: Any = super()._apply(keep_precision, recurse=False)  # type: ignore[no-untyped-call]
        return applied  # type: ignore[no-any-return]


def _features(base: FrozenLinear) -> tuple[int, int]:
    if isinstance(base, Conv1D):
        return base.weight.shape[0], base.weight.shape[1]
    return base.in_features, base.out_features
