"""Parameter groups and learning-rate schedules."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_sparse.adapters.injection import adapters_in, low_rank_in
from lit_sparse.adapters.token_rows import token_rows_in
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.method import Method

LrSchedule = Literal["linear", "cosine", "constant"]

_RATIO = "lr_ratio"
"""Key of a group whose learning rate is this multiple of the optimizer's."""


def parameter_groups(model: nn.Module, method: Method, lr: float | None = None) -> list[dict[str, Any]]:
    """Optimizer groups of everything that is trained.

    Matrices have the optimizer's weight decay. Biases, the weights of norms and the rows of new tokens, which start
    from the mean of the others, have none. Parameters such as gates are in groups that the method defines. With
    ``loraplus_lr_ratio``, the matrices B are a group with a learning rate of their own.

    Args:
        model: Model after injection.
        method: The injected method.
        lr: The optimizer's learning rate. Only ``loraplus_lr_ratio`` needs it.

    Returns:
        Non-empty groups that hold every parameter with ``requires_grad`` once.

    Raises:
        UsageError: If the method has a ``loraplus_lr_ratio`` other than 1 and ``lr`` is missing.
    """
    groups = relative_groups(model, method)
    for group in groups:
        ratio = group.pop(_RATIO, None)
        if ratio is not None and lr is None:
            raise UsageError(
                f"loraplus_lr_ratio {ratio:g} multiplies the optimizer's learning rate: give that rate to "
                "parameter_groups, too, as in AdamW(parameter_groups(model, method, lr=1e-4), lr=1e-4)."
            )
        if ratio is not None and lr is not None:
            group["lr"] = lr * ratio
    return groups


def relative_groups(model: nn.Module, method: Method) -> list[dict[str, Any]]:
    """The groups of :func:`parameter_groups` for :func:`make_optimizer`, which knows the optimizer's learning rate."""
    own = method.parameter_groups([adapter for _, adapter in adapters_in(model)])
    taken = {p for group in own for p in group["params"]}
    rest = [p for p in model.parameters() if p.requires_grad and p not in taken]
    rows = {layer.rows for _, layer in token_rows_in(model)}
    ratio = method.loraplus_lr_ratio if isinstance(method, SparseMethod) else 1.0
    raised = {a.lora_B_t for a in low_rank_in(model, "LoRA+ trains B faster").values()} if ratio != 1 else set()
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1 and p not in rows and p not in raised]},
        {"params": [p for p in rest if p in raised], _RATIO: ratio},
        {"params": [p for p in rest if p.ndim <= 1 or p in rows], "weight_decay": 0.0},
        *own,
    ]
    return [group for group in groups if group["params"]]


def make_optimizer(make: OptimizerCallable, groups: list[dict[str, Any]], lr: float | None = None) -> Optimizer:
    """Make an optimizer of :func:`relative_groups`.

    Args:
        make: Makes it of parameter groups.
        groups: The groups.
        lr: Learning rate of the groups that have none of their own; None: the one that ``make`` gives.

    Raises:
        UsageError: If the optimizer refuses its arguments, such as a negative learning rate, or has no learning rate
            that ``loraplus_lr_ratio`` could multiply.
    """
    if lr is not None:
        groups = [{"lr": lr, **group} for group in groups]
    try:
        optimizer = make(groups)
    except (TypeError, ValueError) as error:
        raise UsageError(f"The optimizer cannot be made: {error}") from error
    for group in optimizer.param_groups:
        ratio = group.pop(_RATIO, None)
        if ratio is not None and group.get("lr") is None:
            raise UsageError(
                f"loraplus_lr_ratio multiplies the optimizer's learning rate, and {type(optimizer).__name__} has none: "
                "give it one, or set loraplus_lr_ratio to 1."
            )
        if ratio is not None:
            group["lr"] = group["lr"] * ratio  # not in place: a rate that is a tensor may be shared by all groups
    return optimizer


def lr_scheduler(
    optimizer: Optimizer, schedule: LrSchedule, warmup: float, total: float, stages: Sequence[float] = (1.0,)
) -> LambdaLR:
    """Warm up linearly, then decay to zero or stay constant, in each stage of the run anew.

    Args:
        optimizer: The optimizer; its learning rates are the peak values.
        schedule: ``linear`` or ``cosine`` decay to zero at the end of the run, or ``constant``.
        warmup: Share of each stage in which the rate rises, in [0, 1).
        total: Optimizer steps of the run; infinite for a Trainer without end.
        stages: The stages' shares of the run, which add up to 1.

    Raises:
        UsageError: If the run has no end and the schedule needs one.
    """
    if total == float("inf"):
        if schedule != "constant" or warmup:
            raise UsageError(
                f"lr_schedule {schedule!r} with warmup {warmup:g} needs the length of the run: set the Trainer's "
                "max_epochs or max_steps, or lr_schedule constant and warmup 0."
            )
        total = 0
    ends = [round(share * int(total)) for share in itertools.accumulate(stages)]
    return LambdaLR(optimizer, partial(_share_of_peak, schedule=schedule, warmup=warmup, ends=ends))


def _share_of_peak(step: int, schedule: LrSchedule, warmup: float, ends: Sequence[int]) -> float:
    # Steps after the end of the last stage belong to it.
    stage = min(bisect.bisect_right(ends, step), len(ends) - 1)
    start = ends[stage - 1] if stage else 0
    steps = ends[stage] - start
    step, warm = step - start, round(warmup * steps)
    # The formulas of transformers' get_linear_schedule_with_warmup and get_cosine_schedule_with_warmup. Importing them
    # takes a second or more, as it imports peft and bitsandbytes where these are installed.
    if step < warm:
        return step / max(1, warm)
    if schedule == "constant":
        return 1.0
    done = (step - warm) / max(1, steps - warm)
    return max(0.0, 1 - done if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done)))
