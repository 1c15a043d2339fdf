"""Keep averaged weights zero where the trained weights are zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import UsageError


class Pair(NamedTuple):
    """A parameter that is trained, and its average.

    Args:
        parameter: The parameter.
        average: Its average.
        gates: How a method computes gates from the parameter, if it does.
    """

    parameter: nn.Parameter
    average: nn.Parameter
    gates: Callable[[Tensor, bool], Tensor] | None = None


_Average = Callable[[Tensor, Tensor, Tensor | int], Tensor]
_AverageAll = Callable[..., None]  # of lists of tensors, in place


def keep_averages_sparse(callbacks: list[Callback], module: nn.Module) -> list[Pair]:
    """Make ``WeightAveraging`` and its sub-classes keep zeros. Call it on fit start, when their averages exist.

    The mean of a zero and earlier values is not zero: without this, the averaged model that is validated and saved
    would be dense. Weights that never change, such as frozen ones, keep every bit, and integers are copied. Where a
    method computes gates from a parameter, that of a gate at zero need not be zero, and its average takes its value.

    Args:
        callbacks: The Trainer's callbacks.
        module: Module with the adapters.

    Returns:
        Every parameter of an adapter with its average, for :func:`copy_zeros`.

    Raises:
        UsageError: If there is a ``StochasticWeightAveraging``, or an average cannot be found.
    """
    pairs: list[Pair] = []
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise UsageError(
                "StochasticWeightAveraging makes zeros non-zero and copies the model before configure_model has built "
                "it. Use lightning.pytorch.callbacks.WeightAveraging, which Sparsify keeps sparse."
            )
        if isinstance(callback, WeightAveraging):
            average = getattr(callback, "_average_model", None)
            if not isinstance(average, AveragedModel):
                raise UsageError(
                    f"{type(callback).__name__} has no AveragedModel in _average_model to keep sparse. Use "
                    "WeightAveraging of a tested version of lightning."
                )
            if average.multi_avg_fn is not None:
                average.multi_avg_fn = _keeping_zeros_of_all(average.multi_avg_fn)
            else:
                average.avg_fn = _keeping_zeros(average.avg_fn or get_swa_avg_fn())
            for (_, adapter), (_, averaged) in zip(adapters_in(module), adapters_in(average.module), strict=True):
                means = averaged.parameters(recurse=False)
                for (name, own), mean in zip(adapter.named_parameters(recurse=False), means, strict=True):
                    pairs.append(Pair(own, mean, getattr(adapter, "gate_function", None) if name == "gate" else None))
    return pairs


@torch.no_grad()
def copy_zeros(pairs: list[Pair]) -> None:
    """Zero the averages of zero weights, and close gates that are closed. Call it after every step.

    Averages may be updated less often.

    Args:
        pairs: What :func:`keep_averages_sparse` returned.
    """
    for parameter, average, gates in pairs:
        if gates is not None:
            closed = (gates(parameter.detach(), False) == 0).to(average.device)
            average.copy_(torch.where(closed, parameter.to(average.device), average))
    plain = [pair for pair in pairs if pair.gates is None]
    if plain:
        present = torch._foreach_abs(torch._foreach_sign([pair.parameter.detach() for pair in plain]))
        averages: list[Tensor] = [pair.average for pair in plain]
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
        if not current[0].is_floating_point():  # torch groups the tensors by dtype
            torch._foreach_copy_(averaged, current)
            return
        keep = [(c == 0) | (c == a) for a, c in zip(averaged, current, strict=True)]
        average(averaged, current, count)
        for a, c, kept in zip(averaged, current, keep, strict=True):
            a.copy_(torch.where(kept, c, a))

    return update
