"""Schedules as functions of the step: the share of entries kept, and the thresholds of successive stages."""

import math
from typing import Literal

from lit_sparse.errors import UsageError, require_choice, require_range


def resolve_step(value: int | float, total: int) -> int | float:
    """Turn a point in the run into steps: an int counts steps, a float is a share of ``total``.

    Args:
        value: Steps as an int, at least 0; or a share of the run as a float in [0, 1]. 1 is the first step
            and 1.0 is the end of the run.
        total: Optimizer steps in the whole run, at least 1.

    Returns:
        Steps, not necessarily whole.

    Raises:
        UsageError: If ``value`` is no int or float, a negative int or a float outside [0, 1], or ``total`` is below 1.

    Example:
        >>> resolve_step(20, total=200), resolve_step(0.2, total=200)
        (20, 40.0)
    """
    require_range("total", total, at_least=1)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(f"A point in the run must be a number of steps or a share of the run; got {value}.")
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise UsageError(f"A float is a share of the run, from 0.0 to 1.0; got {value}. Give steps as an int.")
        return round(value * total, 9)  # 0.29 · 100 is 28.999999999999996; 29 is meant
    require_range("A number of steps", value, at_least=0)
    return value


def cubic_density(step: int, total: int, density: float, begin: int | float, end: int | float) -> float:
    """Share of entries to keep at ``step``: 1 up to ``begin``, ``density`` from ``end``, a cubic between.

    The cubic is density + (1 − density)·(1 − (step − begin)/(end − begin))³: it falls fast at first, while many entries
    are left to prune. If ``begin`` equals ``end``, the share jumps right after ``begin``.

    Args:
        step: Optimizer steps taken.
        total: Optimizer steps in the whole run, at least 1.
        density: τ, the final share to keep, unitless, in (0, 1].
        begin: t_i, the last step with everything kept; steps as an int or a share of the run as a float.
        end: t_f, the first step at the final density; likewise, not before ``begin``.

    Returns:
        A share in [density, 1] that never rises with ``step``.

    Raises:
        UsageError: If ``density`` is outside (0, 1], ``begin`` or ``end`` is no point in the run (see
            :func:`resolve_step`), or ``begin`` comes after ``end``.

    Example:
        >>> [cubic_density(step, total=100, density=0.5, begin=0, end=1.0) for step in (0, 50, 100)]
        [1.0, 0.5625, 0.5]

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), the schedule of τ⁽ᵗ⁾.
    """
    require_range("density", density, above=0, at_most=1)
    first, last = resolve_step(begin, total), resolve_step(end, total)
    if first > last:
        raise UsageError(
            f"begin = {begin} comes after end = {end}: they are steps {first:g} and {last:g} of {total}. A float is a "
            "share of the run, an int counts steps."
        )
    if step <= first:
        return 1.0
    if step >= last:
        return float(density)
    return density + (1 - density) * (1 - (step - first) / (last - first)) ** 3


def threshold_stages(
    first: float, last: float, count: int, spacing: Literal["linear", "log_linear", "exp_linear"]
) -> list[float]:
    """Increasing thresholds ξ₁ < ξ₂ < …, one for each stage of SoRA's sparsifying schedule.

    Args:
        first: ξ₁, at least 0; above 0 for ``"exp_linear"``.
        last: The largest threshold, above ``first``.
        count: Number of stages; 1 only when ``first`` equals ``last``.
        spacing: ``"linear"`` for equal differences, ``"exp_linear"`` for equal ratios, ``"log_linear"`` for
            equal differences of exp ξ (so the steps shrink, noticeably only for ξ of order 1).

    Returns:
        ``count`` thresholds, starting exactly at ``first`` and ending exactly at ``last``.

    Raises:
        UsageError: If ``spacing`` is unknown, ``count`` is below 1, ``first`` is negative or not finite,
            ``first`` is 0 with ``"exp_linear"``, or ``last`` is not finite and above ``first`` (equal to it
            for one stage).

    Example:
        >>> threshold_stages(0.0, 6.0, count=4, spacing="linear")
        [0.0, 2.0, 4.0, 6.0]

    Source:
        Ding et al. 2023 (SoRA, arXiv:2311.11696), Algorithm 1; the spacings are the release's.
    """
    require_choice("spacing", spacing, ("linear", "log_linear", "exp_linear"))
    require_range("count", count, at_least=1)
    require_range("first", first, at_least=0)
    if count == 1:
        if first != last:
            raise UsageError(f"With one stage, first and last must be equal; got {first} and {last}.")
        return [first]
    require_range("last", last, above=first)
    if spacing == "exp_linear" and first == 0:
        raise UsageError("'exp_linear' has equal ratios, so first must be above 0; got 0. Try 'linear'.")
    between = [_between(first, last, index / (count - 1), spacing) for index in range(1, count - 1)]
    return [first, *between, last]


def _between(first: float, last: float, share: float, spacing: str) -> float:
    """The threshold that lies ``share`` of the way from ``first`` to ``last``."""
    if spacing == "linear":
        return first + share * (last - first)
    if spacing == "exp_linear":
        return float(first ** (1 - share) * last**share)
    # log((1 − share)·exp(first) + share·exp(last)), without overflow and exact for small thresholds.
    return last + math.log1p((1 - share) * math.expm1(first - last))
