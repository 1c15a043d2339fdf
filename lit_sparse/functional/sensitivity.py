"""Sensitivity of the loss to an entry, |w · ∂L/∂w|, and its moving average."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import piecewise


def sensitivity(weight: Tensor, grad: Tensor) -> Tensor:
    """First-order change of the loss when an entry is set to zero: |weight · grad|.

    Args:
        weight: w, any shape: the values that produced ``grad``, before the optimizer step.
        grad: ∂L/∂w, same shape; unscaled and unclipped. Give float32 for half-precision models: the
            product of two small numbers underflows in float16.

    Returns:
        A new tensor of that shape, not negative, in the units of the loss.

    Example:
        >>> sensitivity(torch.tensor([2.0, -1.0]), torch.tensor([0.5, 3.0]))
        tensor([1., 3.])

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (3).
    """
    return (weight * grad).abs()


@torch.no_grad()
def sensitivities(weights: Sequence[Tensor], grads: Sequence[Tensor]) -> list[Tensor]:
    """:func:`sensitivity` of many weights, in a handful of kernels, without gradients.

    Args:
        weights: Any shapes.
        grads: One for each weight, of its shape.
    """
    products = list(torch._foreach_mul(list(weights), list(grads)))
    torch._foreach_abs_(products)
    return products


def moving_average(average: Tensor, value: Tensor, beta: float) -> Tensor:
    """Exponential moving average after one more value: beta·average + (1 − beta)·value.

    Args:
        average: Ī of the steps so far, any shape; the first value itself at the start.
        value: I of this step, same shape.
        beta: β, the share that the past keeps, unitless, in [0, 1).

    Returns:
        A new tensor with the shape and dtype of ``average``.

    Raises:
        UsageError: If ``beta`` is outside [0, 1).

    Example:
        >>> moving_average(torch.tensor([1.0]), torch.tensor([3.0]), beta=0.75)
        tensor([1.5000])

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (4).
    """
    require_range("beta", beta, at_least=0, below=1)
    return average.lerp(value.to(average.dtype), 1 - beta)


@torch.no_grad()
def update_moving_average_(averages: Sequence[Tensor], values: Sequence[Tensor], beta: float) -> None:
    """Apply :func:`moving_average` to many averages in place, in a handful of kernels, without gradients.

    Where a value is not finite the average does not change: otherwise one infinite gradient would stay in it for ever.

    Args:
        averages: Any shapes.
        values: One for each average, of its shape.
        beta: As in :func:`moving_average`.

    Raises:
        UsageError: If ``beta`` is outside [0, 1), or there are not as many values as averages.
    """
    require_range("beta", beta, at_least=0, below=1)
    if len(averages) != len(values):
        raise UsageError(f"Give one value for each average; got {len(values)} for {len(averages)} averages.")
    for piece in piecewise.piecewise(averages):
        mine = [averages[i] for i in piece]
        finite = _where_finite([values[i] for i in piece], mine)
        torch._foreach_lerp_(mine, [v.to(a.dtype) for v, a in zip(finite, mine, strict=True)], 1 - beta)


def _where_finite(values: list[Tensor], otherwise: list[Tensor]) -> list[Tensor]:
    """Replace every entry that is NaN or infinite, without waiting for the device.

    Returns:
        On a CPU ``values`` themselves if they are finite; else views of a copy.
    """
    flat = torch.cat([value.flatten() for value in values])
    if piecewise.is_at_hand(flat) and math.isfinite(flat.sum()):
        return values
    spare = torch.cat([tensor.flatten() for tensor in otherwise])
    pieces = torch.where(flat.isfinite(), flat, spare).split([value.numel() for value in values])
    return [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]
