"""A frozen linear layer and its low-rank product as one node of autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_WIDTH = 8
"""Ranks are padded with zeros to a multiple of this: in between, a layer costs up to 6 % more (MKL, float32)."""


def fused_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B_t: Tensor, dropout: float) -> Tensor:
    """``rows · weightᵀ + bias + dropout(rows) · Aᵀ · B_t``, with a backward that makes no pass it can spare.

    Autograd alone would add the gradients of the two branches in a pass of its own over rows × in_features, and keep a
    second copy of the rows under dropout. Here products accumulate onto each other, and dropout keeps a byte per entry.

    Args:
        rows: ``(rows, in_features)``.
        weight: ``(out_features, in_features)``, frozen.
        bias: ``(out_features,)``, frozen, or None.
        A: ``(rank, in_features)``.
        B_t: ``(rank, out_features)``, gate and scale folded in.
        dropout: Probability of zeroing an entry of the rows before A; the others are scaled by 1 / (1 - dropout).

    Returns:
        ``(rows, out_features)``, differentiable (twice too) with respect to rows, A and B_t.
    """
    short = -A.shape[0] % _WIDTH
    if short and A.shape[0] > _WIDTH:
        A, B_t = F.pad(A, (0, 0, 0, short)), F.pad(B_t, (0, 0, 0, short))
    return _FusedLinear.apply(rows, weight, bias, A, B_t, dropout)  # type: ignore[no-any-return, no-untyped-call]


class _FusedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B_t: Tensor, dropout: float
    ) -> Tensor:
        dropped, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        hidden = dropped.mm(A.t())
        y = rows.mm(weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
        y.addmm_(hidden, B_t)
        # What autograd does not know as an input or output must be made again for a second derivative: see backward.
        ctx.save_for_backward(rows, weight, A, B_t, hidden, kept)
        ctx.dropout = dropout
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        with _no_autocast(grad_y):  # dtypes are settled: it could only make them differ
            return _FusedLinear._backward(ctx, grad_y)

    @staticmethod
    def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B_t, hidden, kept = ctx.saved_tensors
        wants_rows, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        twice = torch.is_grad_enabled()
        scale = 1 / (1 - ctx.dropout)
        dropped = rows
        if kept is not None and (wants_A or twice):
            dropped = torch.ops.aten.native_dropout_backward(rows, kept, scale)  # rows ∘ kept · scale
        grad_rows = grad_A = grad_B = None
        if wants_A or wants_rows:
            grad_hidden = grad_y.mm(B_t.t())
        if wants_A:
            grad_A = grad_hidden.t().mm(dropped)
        if wants_B:
            grad_B = (dropped.mm(A.t()) if twice else hidden).t().mm(grad_y)
        if wants_rows and kept is None:
            grad_rows = grad_y.mm(weight).addmm_(grad_hidden, A)
        elif wants_rows:
            through_A = torch.ops.aten.native_dropout_backward(grad_hidden.mm(A), kept, scale)
            grad_rows = through_A.addmm_(grad_y, weight)
        return grad_rows, None, None, grad_A, grad_B, None


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on where ``tensor`` is."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def _no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()
