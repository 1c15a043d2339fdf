"""What a method is told of the run and of each optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a method sees it.

    Args:
        index: Number of this step, counted from 1; steps that a gradient scaler skips do not count.
        total: Optimizer steps of the whole run, None when the Trainer has no end.
        optimizer: The optimizer that takes it.
        group_of: Index in ``optimizer.param_groups`` of each of its parameters.
        alone: Whether other processes train models of their own, if there are any.
    """

    index: int
    total: int | None
    optimizer: Optimizer
    group_of: Mapping[nn.Parameter, int]
    alone: bool = False

    def group(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter group that holds ``parameter``: its lr, betas and so on."""
        return self.optimizer.param_groups[self.group_of[parameter]]

    def lr_of(self, parameter: nn.Parameter) -> float | Tensor:
        """The learning rate that this step uses for ``parameter``."""
        return self.group(parameter)["lr"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Run:
    """What is known of a run before its first step.

    Args:
        done: Optimizer steps taken before, more than 0 in a resumed run.
        total: Optimizer steps of the whole run, None when the Trainer has no end.
        optimizer: The optimizer that holds the adapters.
        learning_rates: The learning rate of a parameter at every step of the run, as far as the schedule is known.
    """

    done: int
    total: int | None
    optimizer: Optimizer
    learning_rates: Callable[[nn.Parameter], Sequence[float]]


def require_ratio(ratio: float, adapters: Sequence[LowRankAdapter], optimizer: Optimizer) -> None:
    """Check ``loraplus_lr_ratio`` in an optimizer that may be built without :func:`lit_sparse.parameter_groups`.

    Raises:
        UsageError: If the learning rate of a B is not ``ratio`` times that of its A.
    """
    groups = [group for group in optimizer.param_groups if group.get("lr") is not None]
    rates = {p: float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    pairs = {(rates[a.lora_A], rates[a.lora_B_t]) for a in adapters if a.lora_A in rates and a.lora_B_t in rates}
    wrong = [(a, b) for a, b in pairs if not math.isclose(b, ratio * a, rel_tol=1e-6)]
    if wrong:
        raise UsageError(
            f"loraplus_lr_ratio is {ratio:g}, but the optimizer holds A with lr {wrong[0][0]:g} and B with lr "
            f"{wrong[0][1]:g}. Build it from lit_sparse.parameter_groups(model, method, lr)."
        )
