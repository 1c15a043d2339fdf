"""Add up several changes of the same weights: TIES and DARE.

A change τ_t of source t is a flat tensor of the differences that it makes to the weights (a "task vector"), times the
weight of the source.

TIES (Yadav et al. 2023, arXiv:2306.01708, Algorithm 1):

1. Trim: τ̂_t keeps the entries of τ_t of largest magnitude, a share k of the whole change, and is 0 elsewhere.
2. Elect: γ = sgn(Σ_t τ̂_t), for each entry.
3. Disjoint mean: the mean of τ̂_t over the sources with sgn(τ̂_t) = γ ≠ 0; 0 where there is none.

The paper then scales by λ: give it as the weight of all sources.

DARE (Yu et al. 2024, arXiv:2311.03099, Eqs. (1)–(3)): with a drop rate p, m ~ Bernoulli(p) for each entry, and
τ̂_t = (1 − m) ∘ τ_t / (1 − p), so that the expected value stays. The changes are then added.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Rule = Literal["concatenate", "svd", "ties", "dare"]
"""How changes are added up."""

_HALF = 16  # bits


class Conflicts(NamedTuple):
    """How many entries several changes share.

    Args:
        shared: Entries that more than one change touches.
        opposed: Those of them that changes move in opposite directions.
    """

    shared: int
    opposed: int

    def __add__(self, other: object) -> Conflicts:
        """The sum over two parts."""
        if not isinstance(other, Conflicts):
            return NotImplemented
        return Conflicts(self.shared + other.shared, self.opposed + other.opposed)


def conflicts(changes: Tensor) -> Conflicts:
    """Count the entries that several changes touch.

    Args:
        changes: Shape ``(sources, entries)``, 0 where a source changes nothing.
    """
    up, down = (changes > 0).sum(0), (changes < 0).sum(0)
    return Conflicts(int((up + down > 1).sum()), int(((up > 0) & (down > 0)).sum()))


def trim_threshold(parts: Callable[[], Iterable[Tensor]], density: float) -> float:
    """The magnitude from which on TIES keeps the entries of a change.

    The change comes in parts, twice, so that no more than one of them is in memory. The number is exact, in float32.

    Args:
        parts: Yields the parts of the change, the same each time.
        density: Share of the entries other than 0 to keep, in (0, 1]; at least one is kept, and all that are equal to
            the smallest that is kept.

    Returns:
        The smallest magnitude that is kept; 0 for a change without entries.

    Example:
        >>> trim_threshold(lambda: [torch.tensor([0.5, -2.0, 0.0]), torch.tensor([1.0, 0.25])], 0.5)
        1.0
    """

    def counts(of: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.stack([torch.bincount(of(_bits(part)), minlength=2**_HALF).cpu() for part in parts()]).sum(0)

    # The bits of positive floats are in the order of their values: first the upper half of them, then the lower.
    upper = counts(lambda bits: bits[bits > 0] >> _HALF)
    if not bool(upper.any()):
        return 0.0
    wanted = max(1, math.floor(density * int(upper.sum())))
    first, above = _reaching(upper, wanted)
    lower = counts(lambda bits: bits[(bits >> _HALF == first) & (bits > 0)] & (2**_HALF - 1))
    last, _ = _reaching(lower, wanted - above)
    return float(torch.tensor((first << _HALF) + last, dtype=torch.int32).view(torch.float32))


def trimmed(change: Tensor, threshold: float) -> Tensor:
    """A change without the entries below the threshold."""
    return change.where(change.float().abs() >= threshold, 0.0)  # in the precision of the threshold


def ties_mean(changes: Tensor) -> Tensor:
    """Elect a sign for each entry of trimmed changes, and take the mean of those that have it.

    Args:
        changes: Shape ``(sources, entries)``.

    Returns:
        Shape ``(entries,)``.

    Example:
        >>> ties_mean(torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 0.0]])).tolist()
        [2.0, 2.0, 0.0]
    """
    elected = changes.sum(0).sign()
    agree = (changes.sign() == elected) & (elected != 0)
    return (changes * agree).sum(0) / agree.sum(0).clamp(min=1)


def merged(
    changes: Tensor,
    rule: Rule,
    thresholds: Sequence[float] = (),
    density: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Merge the changes of one weight by a rule.

    Args:
        changes: Shape ``(sources, entries)``.
        rule: ``ties``, ``dare``, or another one, which adds them up.
        thresholds: For TIES, of each source.
        density: For DARE.
        generator: For DARE.

    Returns:
        Shape ``(entries,)``.
    """
    if rule == "ties":
        return ties_mean(torch.stack([trimmed(c, least) for c, least in zip(changes, thresholds, strict=True)]))
    if rule == "dare":
        changes = torch.stack([drop_and_rescale(change, density, generator) for change in changes])
    return changes.sum(0)


def drop_and_rescale(change: Tensor, density: float, generator: torch.Generator | None = None) -> Tensor:
    """Keep each entry with the probability ``density``, divided by it, as DARE does.

    Args:
        change: Of any shape.
        density: The probability 1 − p, in (0, 1].
        generator: Draws the entries; None: torch's own.
    """
    return change * torch.bernoulli(torch.full_like(change, density), generator=generator) / density


def _bits(part: Tensor) -> Tensor:
    return part.flatten().float().abs().view(torch.int32)


def _reaching(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The largest bin down to which there are ``wanted`` entries, and the number of entries above it."""
    above = counts.flip(0).cumsum(0)
    steps = int((above < wanted).sum())
    return len(counts) - 1 - steps, int(above[steps] - counts.flip(0)[steps])
