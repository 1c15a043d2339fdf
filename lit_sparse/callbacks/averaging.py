"""Averages of weights that are zero where the weights are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import UsageError

Pair = tuple[nn.Parameter, nn.Parameter]
"""A parameter that is trained, and its average."""

_Average = Callable[[Tensor, Tensor, Tensor | int], Tensor]
_AverageAll = Callable[..., None]  # of lists of tensors, in place


def keep_averages_sparse(callbacks: list[Callback], module: nn.Module) -> list[Pair]:
    """Make ``WeightAveraging`` and its sub-classes keep zeros: call it once their averages exist, on fit start.

    Each time an average is updated, what is zero in the model becomes zero in it: the mean of a zero and what was
    there before would not be, and the model that is validated, saved and left at the end would be dense. What never
    changes, such as frozen weights, stays as it is to the last bit, and what is counted is copied.

    Args:
        callbacks: Of the Trainer.
        module: Module with the adapters that are averaged.

    Returns:
        For :func:`copy_zeros`: every parameter of an adapter, and its entry in an average.

    Raises:
        UsageError: If there is a ``StochasticWeightAveraging``, or an average cannot be found.
    """
    pairs: list[Pair] = []
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise UsageError(
                "StochasticWeightAveraging averages zeros away, ends the learning-rate schedule, and copies the model "
                "before configure_model has filled it. Use lightning.pytorch.callbacks.WeightAveraging, which "
                "Sparsify keeps sparse."
            )
        if isinstance(callback, WeightAveraging):
            average = getattr(callback, "_average_model", None)
            if not isinstance(average, AveragedModel):
                raise UsageError(
                    f"{type(callback).__name__} holds no AveragedModel that could be kept sparse. Leave it out, or use "
                    "the one of a tested version of lightning."
                )
            if average.multi_avg_fn is not None:
                average.multi_avg_fn = _keeping_zeros_of_all(average.multi_avg_fn)
            else:
                average.avg_fn = _keeping_zeros(average.avg_fn or get_swa_avg_fn())
            for (_, adapter), (_, averaged) in zip(adapters_in(module), adapters_in(average.module), strict=True):
                pairs += zip(adapter.parameters(recurse=False), averaged.parameters(recurse=False), strict=True)
    return pairs


@torch.no_grad()
def copy_zeros(pairs: list[Pair]) -> None:
    """Zero in the averages what is zero in the adapters: after every step, as averages may be updated at few of them.

    Args:
        pairs: As returned by :func:`keep_averages_sparse`.
    """
    if pairs:
        present = torch._foreach_abs(torch._foreach_sign([parameter.detach() for parameter, _ in pairs]))
        averages: list[Tensor] = [average for _, average in pairs]
        masks: list[Tensor] = [mask.to(a.device) for mask, a in zip(present, averages, strict=True)]
        torch._foreach_mul_(averages, masks)


def _keeping_zeros(average: _Average) -> _Average:
    def update(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        if not current.is_floating_point():
            return current
        keep = (current == 0) | (current == averaged)
        return torch.where(keep, current, average(averaged, current, count))

    return update


def _keeping_zeros_of_all(average: _AverageAll) -> _AverageAll:
    def update(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        if not current[0].is_floating_point():  # they come grouped by dtype
            torch._foreach_copy_(averaged, current)
            return
        keep = [(c == 0) | (c == a) for a, c in zip(averaged, current, strict=True)]
        average(averaged, current, count)
        for a, c, kept in zip(averaged, current, keep, strict=True):
            a.copy_(torch.where(kept, c, a))

    return update
