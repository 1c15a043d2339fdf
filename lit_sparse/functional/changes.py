"""Which entries of A and B are kept when all layers share a number of weights that may change."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_sparse.functional.density import product_density
from lit_sparse.functional.piecewise import piecewise

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

    Layers are worked through piece by piece. What grows with their number is a few values for each rank, and 257 for
    each layer while a threshold is sought.

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
        self._pieces = piecewise(scores_A, scores_B_t)
        self._blocks = []
        for piece in self._pieces:
            halves = [[scores[i] for i in piece] for scores in (scores_A, scores_B_t)]
            if halves[0][0].shape[1] == halves[1][0].shape[1]:
                halves = [halves[0] + halves[1]]
            gates = None if opened is None else [opened[i] for i in piece] * (2 // len(halves))
            self._blocks.append([_Block(matrices, gates) for matrices in halves])
        ranks = tuple(tuple((i, len(scores_A[i])) for i in piece) for piece in self._pieces)
        self._owners = _owners(ranks, scores_A[0].device)

    def changes(self, threshold: Tensor) -> Tensor:
        """Changed weights of each layer if its ranks changed different ones, whole numbers, shape ``(layers,)``."""
        return self._products(1, lambda block: block.kept(threshold).sum(1, keepdim=True)).squeeze(1)

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
        found = torch.zeros((), dtype=torch.int64, device=overlaps.device)
        for shift in _SHIFTS:
            found = found << 8
            count = functools.partial(_Block.reaching, below=found - 1, shift=shift)
            too_many = (self._products(257, count) / overlaps.unsqueeze(1)).sum(0) > limit
            found = found + (too_many.sum() - 1).clamp(min=0)
        return ((found + 1) << _SHIFTS[-1]).clamp(max=_INFINITY).int().view(torch.float32)

    def mark_(
        self, masks_A: Sequence[Tensor], masks_B_t: Sequence[Tensor], threshold: Tensor, unseen: bool = False
    ) -> None:
        """Write into masks what is kept of A and of Bᵀ.

        Args:
            masks_A: Booleans shaped as the scores of A, changed in place.
            masks_B_t: Likewise for Bᵀ.
            threshold: A scalar above 0.
            unseen: Keep the rows with only zero scores whole.
        """
        for piece, blocks in zip(self._pieces, self._blocks, strict=True):
            parts = [part for block in blocks for part in block.kept(threshold, unseen).split(block.ranks)]
            torch._foreach_copy_([masks[i] for masks in (masks_A, masks_B_t) for i in piece], parts)

    def _products(self, n: int, count: Callable[[_Block], Tensor]) -> Tensor:
        """What each layer changes by what its rows keep, for n thresholds, shape ``(layers, n)``."""
        changes = self._owners[0].new_zeros(sum(map(len, self._pieces)), n)
        for owners, blocks in zip(self._owners, self._blocks, strict=True):
            of_A, of_B = torch.cat([count(block) for block in blocks]).chunk(2)
            changes.index_add_(0, owners, of_A * of_B)
        return changes


class _Block:
    """Rows of A, of Bᵀ, or of both where they are equally wide, of the layers of a piece."""

    def __init__(self, matrices: list[Tensor], opened: list[Tensor] | None) -> None:
        self.ranks = [len(matrix) for matrix in matrices]
        self._matrices, self._opened = matrices, None if opened is None else torch.cat(opened).unsqueeze(1)
        rows = self._rows()
        self._largest = rows.amax(1, keepdim=True)
        self._at_most = self._largest.masked_fill(self._largest == 0, math.inf)
        self._at_least = (rows == self._at_most).sum(1, keepdim=True)

    def _rows(self) -> Tensor:
        rows = torch.cat(self._matrices).float()
        return rows if self._opened is None else rows.mul_(self._opened)

    def kept(self, threshold: Tensor, unseen: bool = False) -> Tensor:
        return self._rows() >= threshold.minimum(self._largest if unseen else self._at_most)

    def reaching(self, below: Tensor, shift: int) -> Tensor:
        """How many entries each of 257 thresholds keeps: those after ``below``, times 2 to the power of ``shift``."""
        digits = ((self._rows().view(torch.int32) >> shift) - below).clamp_(0, 257)  # 257: above the last
        counts = digits.new_zeros(len(digits), 258).scatter_add_(1, digits, digits.new_ones(()).expand_as(digits))
        return (digits.shape[1] - counts.cumsum(1)[:, :-1]).maximum(self._at_least)


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
    """How many weights of each layer change, shape ``(layers,)``; the support of BA is formed, layer after layer.

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
def _owners(ranks: tuple[tuple[tuple[int, int], ...], ...], device: torch.device) -> list[Tensor]:
    """The layer of each rank, for pieces of layers with so many ranks; kept, as copying to a device waits."""
    owners = [layer for piece in ranks for layer, count in piece for _ in range(count)]
    counts = [sum(count for _, count in piece) for piece in ranks]
    return list(torch.tensor(owners, dtype=torch.int64, device=device).split(counts))
