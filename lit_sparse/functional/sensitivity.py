"""Sensitivity of the loss to an entry, |w · ∂L/∂w|, and its moving average."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import masks


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
    if not averages:
        return
    finite = where_finite(values, averages)
    cast = [value.to(average.dtype) for average, value in zip(averages, finite, strict=True)]
    torch._foreach_lerp_(list(averages), cast, 1 - beta)


@torch.no_grad()
def where_finite(values: Sequence[Tensor], otherwise: Sequence[Tensor]) -> list[Tensor]:
    """Replace every entry that is NaN or infinite, in a handful of kernels and without waiting for the device.

    Args:
        values: Any shapes, all on one device.
        otherwise: The replacements: a tensor for each value, of its shape.

    Returns:
        On a CPU ``values`` themselves if they are finite; else views of a copy.
    """
    if not values or (masks._is_at_hand(values[0]) and bool(get_total_norm(values).isfinite())):
        return list(values)
    flat, spare = (torch.cat([tensor.flatten() for tensor in tensors]) for tensors in (values, otherwise))
    pieces = torch.where(flat.isfinite(), flat, spare).split([value.numel() for value in values])
    return [piece.view_as(value) for piece, value in zip(pieces, values, strict=True)]
