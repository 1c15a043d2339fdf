"""Averages of weights that are zero where the weights are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lit_sparse.errors import UsageError

_Average = Callable[[Tensor, Tensor, Tensor | int], Tensor]
_AverageAll = Callable[..., None]  # of lists of tensors, in place


def keep_averages_sparse(callbacks: list[Callback]) -> None:
    """Make ``WeightAveraging`` and its sub-classes keep zeros: call it once their averages exist, on fit start.

    Each time an average is updated, what is zero in the model becomes zero in it: the mean of a zero and what was
    there before would not be, and the model that is validated, saved and left at the end would be dense. What never
    changes, such as frozen weights, stays as it is to the last bit, and what is counted is copied.

    Raises:
        UsageError: If there is a ``StochasticWeightAveraging``, or an average cannot be found.
    """
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
