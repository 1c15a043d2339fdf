"""A frozen linear layer and its low-rank product as one node of autograd."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

_MANY_ROWS = 4
"""Multiple of ``in · out / (in + out)`` rows from which the product of A and B is added to the weight first."""

_WIDTH = 8
"""Ranks are padded with zeros to a multiple of this. Other ranks cost a layer up to 6 % more (MKL, float32)."""


def fused_linear(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B_t: Tensor,
    gate: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """``rows · weightᵀ + bias + dropout(rows) · Aᵀ · (scale · gate ∘ B_t)`` with a hand-written backward.

    Autograd alone would add the gradients of the two branches in one more pass over rows × in_features, and keep a
    second copy of the rows under dropout. Here, products accumulate onto each other, and dropout keeps one byte per
    entry. Copies of weight, A, B_t and gate in the dtype of autocast are made again in the backward pass. (``F.linear``
    keeps them for every layer: a second backbone in half precision.) With many rows, the two branches become one
    product with a combined weight, but not in a compiled graph, which would keep that weight for the backward pass.

    Args:
        rows: ``(rows, in_features)``, in the dtype to compute in.
        weight: ``(out_features, in_features)``, frozen, in the dtype of the rows or a wider one.
        bias: ``(out_features,)``, frozen, or None; the same.
        A: ``(rank, in_features)``, the same.
        B_t: ``(rank, out_features)``, the same.
        gate: ``(rank,)``, or None for ones.
        scale: Factor of the product of A and B_t.
        dropout: Probability of zeroing an entry of the rows before A; the others are scaled by 1 / (1 - dropout).

    Returns:
        ``(rows, out_features)``, differentiable (twice too) with respect to rows, A, B_t and gate.
    """
    return _FusedLinear.apply(rows, weight, bias, A, B_t, gate, scale, dropout)  # type: ignore[no-any-return, no-untyped-call]


class _FusedLinear(Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B_t: Tensor,
        gate: Tensor | None,
        scale: float,
        dropout: float,
    ) -> Tensor:
        thin_A, thin_B = _ready(A, rows), _ready(_folded(B_t, gate, scale), rows)
        wide, hidden, kept = weight.to(rows.dtype), None, None
        if dropout or not _sums_pay(rows, weight):
            dropped, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
            hidden = _thin(thin_A, dropped)
        else:
            wide = torch.addmm(wide, thin_B.t(), thin_A)
        y = rows.mm(wide.t()) if bias is None else torch.addmm(bias.to(rows.dtype), rows, wide.t())
        if hidden is not None:
            y = _add_product_(y, hidden.t(), thin_B)
        # Tensors that are no input or output of this node are recomputed for a second derivative: see backward.
        ctx.save_for_backward(rows, weight, A, B_t, gate, hidden, kept)
        ctx.scale, ctx.dropout = scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_y,) = grads
        with no_autocast(grad_y):  # dtypes are fixed by now
            return _FusedLinear._backward(ctx, grad_y)

    @staticmethod
    def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, A, B_t, gate, hidden, kept = ctx.saved_tensors
        wants_rows, _, _, wants_A, wants_B, wants_gate, _, _ = ctx.needs_input_grad
        thin_A, thin_B = _ready(A, rows), _ready(_folded(B_t, gate, ctx.scale), rows)
        twice = torch.is_grad_enabled()
        scale = 1 / (1 - ctx.dropout)
        dropped = rows
        if kept is not None and (wants_A or twice):
            dropped = torch.ops.aten.native_dropout_backward(rows, kept, scale)  # rows ∘ kept · scale
        grad_rows = grad_A = grad_B = grad_gate = None
        if wants_A or (wants_rows and hidden is not None):
            grad_hidden = _thin(thin_B, grad_y)
        if wants_A:
            grad_A = grad_hidden.mm(dropped)[: A.shape[0]].to(A.dtype)
        if wants_B or wants_gate:
            again = twice or hidden is None
            folded = (_thin(thin_A, dropped) if again else hidden).mm(grad_y)[: A.shape[0]].to(B_t.dtype)
            grad_B = _folded(folded, gate, ctx.scale) if wants_B else None
            grad_gate = (folded * B_t).sum(1) * ctx.scale if wants_gate else None
        if wants_rows and hidden is None:
            grad_rows = grad_y.mm(torch.addmm(weight.to(rows.dtype), thin_B.t(), thin_A))
        elif wants_rows and kept is None:
            grad_rows = _add_product_(grad_y.mm(weight.to(rows.dtype)), grad_hidden.t(), thin_A)
        elif wants_rows:
            through_A = torch.ops.aten.native_dropout_backward(grad_hidden.t().mm(thin_A), kept, scale)
            grad_rows = _add_product_(through_A, grad_y, weight.to(rows.dtype))
        return grad_rows, None, None, grad_A, grad_B, grad_gate, None, None


@torch.library.custom_op("lit_sparse::add_product_", mutates_args=("total",))
def _add_product_of_graph_(total: Tensor, a: Tensor, b: Tensor) -> None:
    total.addmm_(a, b)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``total += a · b``, in place.

    In a compiled graph by an operator of our own: the compiler's ``addmm`` copies ``total``, the output of a layer.
    """
    if torch.compiler.is_compiling():
        _add_product_of_graph_(total, a, b)
        return total
    return total.addmm_(a, b)


def _sums_pay(rows: Tensor, weight: Tensor) -> bool:
    """Whether a combined weight is cheaper for these rows, and as exact.

    It costs rank · in · out products twice, and saves rank · rows · (in + out) products, a pass over rows × out and one
    over rows × in. Where products round their operands to half precision or TF32, a small product of A and B would be
    lost in the rounding of the weight.
    """
    if torch.compiler.is_compiling():
        return False
    out_features, in_features = weight.shape
    enough = rows.shape[0] * (out_features + in_features) >= _MANY_ROWS * out_features * in_features
    if not enough or rows.dtype != weight.dtype:
        return False
    return rows.dtype == torch.float64 or (rows.dtype == torch.float32 and _float32_is_exact(rows.device.type))


def _float32_is_exact(device_type: str) -> bool:
    """Whether torch's settings for the device make products of float32 matrices use all bits.

    ``torch.set_float32_matmul_precision`` and the settings of ``torch.backends`` allow TF32 (10 bits of mantissa) or
    bfloat16 (7 bits).
    """
    if not hasattr(torch.backends, "fp32_precision"):  # before torch 2.9: one setting for all devices
        return torch.get_float32_matmul_precision() == "highest"
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision in ("ieee", "none")


def _folded(B_t: Tensor, gate: Tensor | None, scale: float) -> Tensor:
    """``scale · gate ∘ B_t``: rank · out_features products instead of rows · rank."""
    return B_t * scale if gate is None else B_t * (gate * scale).unsqueeze(1)


def _thin(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix · rowsᵀ``, in the memory order that was fastest in measurements (MKL, float32).

    Up to eight ranks, the order of A and B was a fifth faster on an AMD EPYC, without a clear difference on an Intel
    Xeon. For more ranks, the order of the rows was faster: 17 to 38 % at 32 ranks on the Xeon. A compiled graph has
    this order for all numbers of ranks.
    """
    in_graph = torch.compiler.is_compiling()
    return rows.mm(matrix.t()).t() if in_graph or matrix.shape[0] > _WIDTH else matrix.mm(rows.t())


def _ready(matrix: Tensor, rows: Tensor) -> Tensor:
    """Cast to the dtype of ``rows``, and pad with rows of zeros to a rank for which products are fast.

    In a compiled graph, whose ranks may be a variable, there is no padding.
    """
    matrix = matrix.to(rows.dtype)
    if torch.compiler.is_compiling():
        return matrix
    short = -matrix.shape[0] % _WIDTH
    return F.pad(matrix, (0, 0, 0, short)) if short and matrix.shape[0] > _WIDTH else matrix


def autocasts(tensor: Tensor) -> bool:
    """Whether autocast is on for the device of ``tensor``."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def no_autocast(tensor: Tensor) -> AbstractContextManager[Any]:
    """Within the context, autocast is off for the device of ``tensor``."""
    return torch.autocast(tensor.device.type, enabled=False) if autocasts(tensor) else nullcontext()
