"""Which entries of A and B are kept when all layers share a number of weights that may change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse.functional.density import product_density

_HALVINGS = 26
"""Of the range of float32's exponents: two scores that are told apart differ by 4e-6 of their size, or more."""

_SHIFTS = (23, 15)
"""Where the two digits of a threshold lie in the bits of float32: its exponent, and eight bits of its fraction."""

_INFINITY = 0x7F800000
"""Infinity as the bits of float32."""


class Rows:
    """The scores of all rows of A and Bᵀ, to be compared with one threshold.

    A row keeps the entries whose score reaches the threshold, and its largest one in any case. A row with only zero
    scores, whose entries cannot be told apart, keeps none. The row of A and the row of Bᵀ of one rank change as many
    weights as the product of what they keep.

    Args:
        scores_A: For each layer, finite and not negative, shape ``(ranks, in_features)``; compared in float32.
        scores_B_t: Likewise, shape ``(ranks, out_features)``.
        opened: For each layer, which ranks count, shape ``(ranks,)``; the scores of the others are taken as zero. None:
            all.

    Example:
        >>> rows = Rows([torch.tensor([[4.0, 1.0]])], [torch.tensor([[3.0, 2.0, 0.5]])])
        >>> rows.changes(torch.tensor(2.0))
        tensor([2])
    """

    def __init__(
        self, scores_A: Sequence[Tensor], scores_B_t: Sequence[Tensor], opened: Sequence[Tensor] | None = None
    ) -> None:
        self._matrices = [*scores_A, *scores_B_t]
        layout = _layout(tuple((len(m), m.shape[1]) for m in self._matrices), self._matrices[0].device)
        self._groups, self._places, self._layers = layout
        self._stacked = [torch.cat([self._matrices[i] for i in group]).float() for group in self._groups]
        for rows, group in zip(self._stacked, self._groups, strict=True) if opened is not None else ():
            rows.mul_(torch.cat([opened[i % len(opened)] for i in group]).unsqueeze(1))  # type: ignore[index, arg-type]
        self._largest = [rows.amax(1, keepdim=True) for rows in self._stacked]
        self._at_most = [values.masked_fill(values == 0, math.inf) for values in self._largest]

    def changes(self, threshold: Tensor) -> Tensor:
        """Changed weights of each layer if its ranks changed different ones, whole numbers, shape ``(layers,)``."""
        kept = [(s >= threshold.minimum(m)).sum(1) for s, m in zip(self._stacked, self._at_most, strict=True)]
        return self._products(torch.cat(kept).unsqueeze(1)).squeeze(1)

    def lowest_threshold(self, limit: float, overlaps: Tensor) -> Tensor:
        """The lowest threshold with which no more weights change than ``limit``, among those with 8 bits of fraction.

        One that is lower by more than 0.4 % lets too many change. Its two digits, as the bits of a float of that size,
        are found one after the other, each by a histogram of every row. No value is read back from the device.

        Args:
            limit: How many weights may change. If one entry of each row is too much, that is what remains.
            overlaps: What to divide the changes of each layer by, shape ``(layers,)``.

        Returns:
            A scalar above 0.
        """
        largest = [(s == m).sum(1, keepdim=True) for s, m in zip(self._stacked, self._at_most, strict=True)]
        at_least, bits = torch.cat(largest), [scores.view(torch.int32) for scores in self._stacked]
        found = torch.zeros((), dtype=torch.int64, device=at_least.device)
        for shift in _SHIFTS:
            # 0 is below what was found so far, 257 above.
            digits = [((b >> shift) - (found << 8)).clamp_(-1, 256).add_(1) for b in bits]
            counts = torch.cat(
                [d.new_zeros(len(d), 258).scatter_add_(1, d, d.new_ones(()).expand_as(d)) for d in digits]
            )
            reaching = (counts.sum(1, keepdim=True) - counts.cumsum(1)[:, :-1]).maximum(at_least)
            too_many = (self._products(reaching) / overlaps.unsqueeze(1)).sum(0) > limit
            found = (found << 8) + (too_many.sum() - 1).clamp(min=0)
        return ((found + 1) << _SHIFTS[-1]).clamp(max=_INFINITY).int().view(torch.float32)

    def masks(self, threshold: Tensor, unseen: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """What is kept of A and of Bᵀ: booleans shaped as the scores.

        Args:
            threshold: A scalar above 0.
            unseen: Keep the rows with only zero scores whole.
        """
        found: dict[int, Tensor] = {}
        limits = self._largest if unseen else self._at_most
        for group, scores, most in zip(self._groups, self._stacked, limits, strict=True):
            parts = (scores >= threshold.minimum(most)).split([len(self._matrices[i]) for i in group])
            found |= dict(zip(group, parts, strict=True))
        masks = [found[index] for index in range(len(self._matrices))]
        return masks[: len(masks) // 2], masks[len(masks) // 2 :]

    def _products(self, kept: Tensor) -> Tensor:
        """What each layer changes by what its rows keep, for n thresholds: ``(rows, n)`` to ``(layers, n)``."""
        of_A, of_B = kept[self._places]
        changes: Tensor = of_A.new_zeros(len(self._matrices) // 2, kept.shape[1])
        return changes.index_add_(0, self._layers, of_A * of_B)


def lowest_threshold(changes: Callable[[Tensor], Tensor], limit: float, device: torch.device) -> Tensor:
    """The lowest threshold with which no more weights change than ``limit``, found by bisection of its exponent.

    No value is read back from the device.

    Args:
        changes: How many weights change with a threshold, a scalar that does not rise with the threshold.
        limit: How many may.
        device: Of the threshold.

    Returns:
        A scalar. If even 2¹²⁸ is too low for ``limit``, which no score reaches, it is that.
    """
    low, high = (torch.full((), exponent, device=device) for exponent in (-126.0, 128.0))  # copying them would wait
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = changes(middle.exp2()) <= limit
        low, high = torch.where(fits, low, middle), torch.where(fits, middle, high)
    return high.exp2()


def union(masks_A: Sequence[Tensor], masks_B_t: Sequence[Tensor], copies: Sequence[int]) -> Tensor:
    """How many weights of each layer change, shape ``(layers,)``; the support of BA is formed.

    Args:
        masks_A: For each layer, shape ``(copies · rank, in_features)``.
        masks_B_t: Likewise, shape ``(copies · rank, out_features)``.
        copies: The matrices of each layer.
    """
    counts = []
    for mask_A, mask_B_t, n in zip(masks_A, masks_B_t, copies, strict=True):
        A, B = mask_A.unflatten(0, (n, -1)), mask_B_t.unflatten(0, (n, -1)).mT
        counts.append((product_density(A, B) * (A.shape[-1] * B.shape[-2])).round().long().sum())
    return torch.stack(counts)


@functools.lru_cache(maxsize=16)
def _layout(shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[list[list[int]], Tensor, Tensor]:
    """Groups of equal width, where the rows of A and of Bᵀ lie in them, and the layer of each; kept, for the copies."""
    by_width: dict[int, list[int]] = {}
    for index, (_, width) in enumerate(shapes):
        by_width.setdefault(width, []).append(index)
    groups = list(by_width.values())
    starts, start = {}, 0
    for index in (i for group in groups for i in group):
        starts[index], start = start, start + shapes[index][0]
    layers = len(shapes) // 2
    rows = [[starts[i] + row for i in half for row in range(shapes[i][0])] for half in _halves(layers)]
    owners = [layer for layer in range(layers) for _ in range(shapes[layer][0])]
    return groups, torch.tensor(rows, device=device), torch.tensor(owners, device=device)


def _halves(layers: int) -> tuple[range, range]:
    return range(layers), range(layers, 2 * layers)
