"""The part of a run in which a method prunes, as its ``begin`` and ``end``."""

from __future__ import annotations

import math

from lit_sparse.errors import UsageError
from lit_sparse.functional.schedules import resolve_step

FIRST_SCORES = 3
"""The first step with informative gradients in every run: B leaves zero at the first step, or at the second one if a
warm-up starts with a learning rate of zero."""


def require_points(begin: int | float, end: int | float) -> None:
    """Check ``begin`` and ``end`` when a method is made.

    Raises:
        UsageError: If one is neither a share of a run nor a number of steps, or ``begin`` comes after ``end``.
    """
    for value in (begin, end):
        resolve_step(value, 1)
    if type(begin) is type(end) and begin > end:
        raise UsageError(f"begin must not be after end; got begin={begin} and end={end}.")


def require_end(begin: int | float, end: int | float, total: int | None) -> None:
    """Check that a run whose shares ``begin`` or ``end`` are has an end.

    Raises:
        UsageError: If it has none.
    """
    if total is None and (isinstance(begin, float) or isinstance(end, float)):
        raise UsageError(
            f"begin={begin} and end={end} are shares of the run, but this run has no end: set the "
            "Trainer's max_epochs or max_steps, or give begin and end as whole numbers of steps."
        )


def decided_at(end: int | float, total: int | None) -> int:
    """The step at which a choice that lasts is made: ``end``, but no step before scores tell entries apart."""
    return max(math.ceil(resolve_step(end, length_of(total))), FIRST_SCORES)


def length_of(total: int | None) -> int:
    """Steps of a run, for its schedule. Without an end, ``begin`` and ``end`` are steps, and any number does."""
    return 1 if total is None else total
