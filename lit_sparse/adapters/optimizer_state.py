"""Cut the state of an optimizer when parameters lose rows, and refuse optimizers whose state cannot be cut."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.errors import UsageError

_AVERAGES = {"exp_avg", "momentum_buffer", "grad_avg"}
_SQUARES = {"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"}
"""How torch's optimizers call averages or sums of gradients and of their squares."""


def require_cuttable(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Refuse an optimizer whose state cannot be cut to the rows that ``parameters`` keep.

    Raises:
        UsageError: If an entry of the state cannot be cut.
    """
    cut: set[Tensor] = set(parameters)
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            # LBFGS keeps lists for all parameters in the state of the first one.
            if isinstance(value, list | tuple | dict) or (parameter in cut and _has_rows(value, parameter) is None):
                _refuse(optimizer, key, value, parameter)


def require_cuttable_after_a_step(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """As :func:`require_cuttable`, before the first step: a copy of the optimizer takes a step on copied parameters.

    Raises:
        UsageError: If an entry of the state cannot be cut, or the copy cannot take a step.
    """
    wanted = set(parameters)
    twins: dict[int, nn.Parameter | None] = {}
    for group in optimizer.param_groups:
        seen: set[torch.Size] = set()
        for parameter in group["params"]:
            new = parameter in wanted and parameter.shape not in seen
            twins[id(parameter)] = nn.Parameter(torch.zeros_like(parameter)) if new else None
            seen.add(parameter.shape)
    kept = [twin for twin in twins.values() if twin is not None]
    try:
        trial = _copy(optimizer, twins)
        for twin in kept:
            twin.grad = torch.ones_like(twin)
        trial.step(lambda: 0.0)
    except Exception as error:  # an optimizer that cannot be copied may raise anything
        raise UsageError(
            f"Ranks cannot be taken out while {type(optimizer).__name__} trains: a step of a copy, to see what it "
            f"remembers, failed ({error}). Compact after training, or use another optimizer, such as AdamW."
        ) from error
    require_cuttable(trial, kept)


def keep_rows(optimizer: Optimizer, parameter: nn.Parameter, places: Tensor) -> None:
    """Cut the state of ``parameter`` to these rows. Call this before the parameter itself is cut."""
    state = optimizer.state.get(parameter, {})
    for key, value in state.items():
        if _has_rows(value, parameter):
            state[key] = value[places]


def mix_rows(optimizer: Optimizer, parameter: nn.Parameter, matrices: Tensor) -> None:
    """Let the averages of gradients that an optimizer keeps follow a change of variables.

    Args:
        optimizer: State under other names than those of torch's optimizers stays as it is.
        parameter: Shape ``(copies · rows, …)``.
        matrices: What each new row's gradient takes of the old rows' ones, shape ``(copies, rows, rows)``. Averages of
            squares take its squares, as if gradients of different rows had nothing in common. A row of zeros forgets
            the average, and takes the mean of the copy's squares, so that steps keep their size.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if key not in _AVERAGES | _SQUARES or value is None or value.shape != parameter.shape:
            continue
        rows = value.double().view(*matrices.shape[:2], -1)
        if key in _AVERAGES:
            mixed = matrices @ rows
        else:
            mixed = matrices.square() @ rows
            mixed = torch.where(matrices.any(2, keepdim=True), mixed, rows.mean(1, keepdim=True))
        value.copy_(mixed.view_as(value))


def move_entries(optimizer: Optimizer, parameter: nn.Parameter, sources: Tensor) -> None:
    """Let what an optimizer keeps for each entry follow entries that moved; it is zero for new ones.

    Args:
        optimizer: Any.
        parameter: Shape ``(count,)``.
        sources: For each entry, where it stood before, or -1.

    Raises:
        UsageError: If the optimizer keeps something else than a number for each entry, such as quantized moments.
    """
    for key, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if type(value) is not Tensor or value.shape != parameter.shape or not value.is_floating_point():
            raise UsageError(
                f"Entries cannot move while {type(optimizer).__name__} trains: it keeps {key!r} of shape "
                f"{tuple(value.shape)} and {value.dtype} for {len(parameter)} entries. Use AdamW, or let "
                "entries stay: SHiRA, or LIFT without update_every."
            )
        value.copy_(value[sources.clamp(min=0)].where(sources >= 0, 0))


def _has_rows(value: Any, parameter: Tensor) -> bool | None:
    """Whether ``value`` has a row for each of the parameter's; None if its type and shape do not tell.

    Moments have the parameter's shape. Adafactor's factors lack a dimension or have it of size 1. Quantized moments are
    integers or a tensor sub-class, and their scales belong to blocks that may span rows.
    """
    if not isinstance(value, Tensor):
        return False if value is None or isinstance(value, bool | int | float | str) else None
    if value.ndim == 0 or (value.numel() == 1 and parameter.numel() != 1):
        return False
    if type(value) not in (Tensor, nn.Parameter) or not value.is_floating_point():
        return None
    found = {rows for shape, rows in _reduced(parameter.shape) if shape == value.shape}
    return found.pop() if len(found) == 1 else None


def _reduced(shape: torch.Size) -> Iterator[tuple[torch.Size, bool]]:
    """All shapes with dimensions of ``shape`` left out or set to 1, and whether the first dimension is unchanged."""
    shapes: list[tuple[tuple[int, ...], bool]] = [((), True)]
    for index, size in enumerate(shape):
        shapes = [
            ((*before, *kept), rows and (index > 0 or kept == (size,)))
            for before, rows in shapes
            for kept in {(size,), (1,), ()}
        ]
    for found, rows in shapes:
        yield torch.Size(found), rows


def _copy(optimizer: Optimizer, twins: dict[int, nn.Parameter | None]) -> Optimizer:
    """A copy without state and hooks, with ``twins`` in place of the parameters with these ids."""
    attributes = {
        name: value
        for name, value in vars(optimizer).items()
        # Hooks, and step as a learning-rate scheduler wraps it, belong to the run.
        if name != "state" and not name.startswith("_optimizer_") and not callable(value)
    }
    attributes = copy.deepcopy(attributes, dict(twins))
    for group in attributes["param_groups"]:
        group["params"][:] = [twin for twin in group["params"] if twin is not None]
    trial: Optimizer = object.__new__(type(optimizer))
    trial.__setstate__({**attributes, "state": defaultdict(dict)})
    return trial


def _refuse(optimizer: Optimizer, key: str, value: Any, parameter: Tensor) -> None:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        kind += f" of shape {tuple(value.shape)} and {value.dtype}"
    raise UsageError(
        f"Ranks cannot be taken out while {type(optimizer).__name__} trains: it keeps {key!r}, a {kind}, for a "
        f"parameter of shape {tuple(parameter.shape)}, and nothing tells which part belongs to which rank. Compact "
        "after training, or use another optimizer, such as AdamW."
    )
