"""What a method is told of the run and of each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a method sees it.

    Args:
        index: Number of this step, counted from 1; steps that a gradient scaler skips do not count.
        total: Optimizer steps of the whole run, None when the Trainer has no end.
        optimizer: The optimizer that takes it.
        group_of: Index in ``optimizer.param_groups`` of each of its parameters.
    """

    index: int
    total: int | None
    optimizer: Optimizer
    group_of: Mapping[nn.Parameter, int]

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
