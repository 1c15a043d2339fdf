"""Proximal maps of the ℓ1 penalty, and the operator that SoRA's release uses instead."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse.errors import UsageError, require_range


def soft_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink every entry towards zero by ``threshold`` and stop there: sign(x)·max(|x| − threshold, 0).

    This is the proximal map of threshold·|·|, argmin_z ½(z − x)² + threshold·|z|. Entries with
    |x| ≤ threshold become exactly 0; NaN stays NaN; a threshold of 0 is the identity.

    Args:
        x: Any shape, floating point. A threshold far below |x| rounds away in half precision: keep
            gates in float32.
        threshold: Not negative, in the units of ``x``; a number, a tensor of one number, or one
            threshold per entry, broadcast to the shape of ``x``. A tensor is not read back by the
            host, so its sign is not checked; it is rounded to the dtype of ``x``.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        UsageError: If ``threshold`` is a negative number, infinite or NaN.

    Example:
        >>> soft_threshold(torch.tensor([-3.0, 0.5, 2.0]), 1.0)
        tensor([-2.,  0.,  1.])

    Source:
        Ding et al. 2023 (SoRA, arXiv:2311.11696), the update of the gate with threshold = η·λ.
    """
    # Not x·(1 − threshold/|x|), which is NaN at 0; and x − x is exactly 0.
    return x - _clip(x, threshold)


def released_threshold(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Shrink every entry by ``threshold``, then zero results that are below ``threshold``.

    SoRA's released code uses this instead of the paper's :func:`soft_threshold`; it serves to reproduce published runs.
    It is not a proximal map: entries with threshold < |x| < 2·threshold become zero too, and |x| = threshold does not
    change.

    Args:
        x: Any shape, floating point.
        threshold: As in :func:`soft_threshold`; constant ξ in the release, not scaled by the learning rate.

    Returns:
        A new tensor with the shape and dtype of ``x``.

    Raises:
        UsageError: If ``threshold`` is a negative number, infinite or NaN.

    Example:
        >>> released_threshold(torch.tensor([-3.0, 0.5, 1.5]), 1.0)
        tensor([-2.,  0.,  0.])

    Source:
        The release of Ding et al. 2023 (arXiv:2311.11696) at commit c275ac2, its sparse optimizer's step.
    """
    clipped = _clip(x, threshold)
    limit = threshold.to(x.dtype) if isinstance(threshold, Tensor) else threshold
    shrunk = torch.where(x.abs() > limit, x - clipped, x)
    return shrunk.masked_fill(shrunk.abs() < limit, 0.0)


def optimizer_metric_threshold(
    weight: float, lr: float | Tensor, second_moment: Tensor, step: float | Tensor, beta2: float, eps: float
) -> Tensor:
    """Threshold of each entry for the exact proximal map in the metric of Adam's step.

    Adam moves entry i by lr/D_i times its averaged gradient, D_i = √v̂_i + ε, v̂ = v/(1 − β₂^step). The
    proximal map in that metric, argmin_z D_i·(z − x)²/(2·lr) + weight·|z|, is :func:`soft_threshold` with
    threshold weight·lr/D_i: entries with small gradients are shrunk more.

    Args:
        weight: λ, the weight of the ℓ1 penalty in the loss; not negative.
        lr: η, the learning rate that the step used.
        second_moment: v, Adam's running average of squared gradients after the step; any shape.
        step: Optimizer steps taken, at least 1; a number or Adam's own counter tensor.
        beta2: β₂, the decay of ``second_moment``, in [0, 1).
        eps: ε, Adam's stabilizer, in the units of the gradient; positive, since an entry that never
            had a gradient has no finite threshold without it.

    Returns:
        Thresholds with the shape of ``second_moment``, in the units of the parameter.

    Raises:
        UsageError: If ``weight`` is negative, ``step`` is a number below 1, ``beta2`` is outside [0, 1) or
            ``eps`` is not positive.

    Example:
        >>> optimizer_metric_threshold(weight=1.0, lr=0.1, second_moment=torch.tensor([0.25, 4.0]), step=1, beta2=0.0,
        ...                            eps=1e-8)
        tensor([0.2000, 0.0500])

    Source:
        Yun et al. 2021 (ProxGen, arXiv:2006.07065), the ℓ1 case with Adam's preconditioner.
    """
    require_range("weight", weight, at_least=0)
    require_range("beta2", beta2, at_least=0, below=1)
    require_range("eps", eps, above=0)
    if isinstance(step, Tensor):
        # Not 1 − beta2**step: in float32, the dtype of counters, it loses half its digits in early steps.
        counted = step.to(second_moment.dtype)
        correction: float | Tensor = -torch.expm1(counted * (math.log(beta2) if beta2 else -math.inf))
    else:
        require_range("step", step, at_least=1)
        correction = 1 - beta2**step
    return weight * lr / ((second_moment / correction).sqrt() + eps)


def soft_threshold_(tensors: Sequence[Tensor], threshold: float | Tensor | Sequence[Tensor]) -> None:
    """Apply :func:`soft_threshold` to many tensors in place, in a handful of kernels, without gradients.

    Args:
        tensors: Any shapes; each device and dtype among them costs one round of kernels.
        threshold: Not negative: one number or tensor of one number for all, or a sequence with one tensor
            for each of ``tensors`` that broadcasts to its shape.

    Raises:
        UsageError: If ``threshold`` is a negative number, infinite or NaN, a tensor of several numbers, or a
            sequence of another length than ``tensors``.

    Example:
        >>> gates = [torch.tensor([2.0, -0.5]), torch.tensor([[1.5]])]
        >>> soft_threshold_(gates, 1.0)
        >>> gates
        [tensor([1., 0.]), tensor([[0.5000]])]
    """
    _replace_(tensors, threshold, soft_threshold)


def released_threshold_(tensors: Sequence[Tensor], threshold: float | Tensor | Sequence[Tensor]) -> None:
    """Apply :func:`released_threshold` to many tensors in place, in a handful of kernels, without gradients.

    Args:
        tensors: Any shapes; each device and dtype among them costs one round of kernels.
        threshold: As in :func:`soft_threshold_`.

    Raises:
        UsageError: As in :func:`soft_threshold_`.
    """
    _replace_(tensors, threshold, released_threshold)


def _clip(x: Tensor, threshold: float | Tensor) -> Tensor:
    """Limit ``x`` to [−threshold, threshold]."""
    if isinstance(threshold, Tensor):
        limit = threshold.to(x.dtype)
        # Not clamp: it refuses a CPU scalar, such as a learning rate, with gates on a GPU.
        return x.minimum(limit).maximum(-limit)
    require_range("threshold", threshold, at_least=0)
    return x.clamp(-threshold, threshold)


@torch.no_grad()
def _replace_(
    tensors: Sequence[Tensor],
    threshold: float | Tensor | Sequence[Tensor],
    operator: Callable[[Tensor, float | Tensor], Tensor],
) -> None:
    """Replace every tensor by ``operator`` of it, on one flat copy per device and dtype."""
    if isinstance(threshold, Tensor) and threshold.numel() != 1:
        raise UsageError(
            "threshold must be one number, or a sequence with a tensor for each tensor; got a single tensor of shape "
            f"{tuple(threshold.shape)}."
        )
    if isinstance(threshold, Sequence) and len(threshold) != len(tensors):
        raise UsageError(f"Give one threshold for each tensor; got {len(threshold)} for {len(tensors)} tensors.")
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, tensor in enumerate(tensors):
        alike.setdefault((tensor.device, tensor.dtype), []).append(index)
    for indices in alike.values():
        members = [tensors[i] for i in indices]
        limit: float | Tensor
        if isinstance(threshold, Sequence):
            limit = torch.cat([threshold[i].expand_as(tensors[i]).reshape(-1) for i in indices])
        else:
            limit = threshold
        flat = operator(torch.cat([member.reshape(-1) for member in members]), limit)
        pieces = flat.split([member.numel() for member in members])
        torch._foreach_copy_(members, [p.view_as(m) for p, m in zip(pieces, members, strict=True)])
