"""lit_sparse.functional.piecewise: pieces of any size give what one piece gives, bit for bit."""

import math
from collections.abc import Callable
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_sparse.functional import piecewise, update_moving_average_
from lit_sparse.functional.changes import Rows
from lit_sparse.methods.masks import keep_top_share_

modest = settings(max_examples=100, deadline=None)
limits = st.sampled_from([1, 8, 20, 50])
T = TypeVar("T")


@st.composite
def layers(draw: st.DrawFn, odd: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Scores of A and Bᵀ of some layers, many of equal width, with ties and rows of zeros; ``odd``: not finite too."""
    values = [0.0, 0.0, 1.0, 2.0, 1e-30, *((math.inf, -math.inf, math.nan) if odd else ())]
    number = st.sampled_from(values) | st.floats(0, 4, width=32)
    shapes = draw(st.lists(st.tuples(st.integers(0, 4), *[st.sampled_from([1, 3, 7])] * 2), min_size=1, max_size=7))

    def matrix(rows: int, width: int) -> Tensor:
        row = st.just([0.0] * width) | st.lists(number, min_size=width, max_size=width)
        return torch.tensor(draw(st.lists(row, min_size=rows, max_size=rows))).view(rows, width)

    return [matrix(r, a) for r, a, _ in shapes], [matrix(r, b) for r, _, b in shapes]


def cut(limit: int, work: Callable[[], T]) -> T:
    """What ``work`` gives with pieces of so many entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(piecewise, "_AT_HAND", limit)
        return work()


def bits(tensors: list[Tensor]) -> list[list[int]]:
    return [t.view(torch.uint8 if t.dtype == torch.bool else torch.int32).flatten().tolist() for t in tensors]


@modest
@given(layers(odd=True), limits)
def test_every_tensor_is_in_one_piece_with_others_of_its_width(scores: tuple[list[Tensor], ...], limit: int) -> None:
    pieces = cut(limit, lambda: piecewise.piecewise(*scores))
    assert sorted(i for piece in pieces for i in piece) == list(range(len(scores[0])))
    for piece in pieces:
        assert piece == sorted(piece)
        for half in scores:
            torch.cat([half[i] for i in piece])
        assert len(piece) == 1 or sum(half[i].numel() for half in scores for i in piece) <= limit


@modest
@given(layers(odd=True), limits, st.floats(0.01, 1))
def test_the_largest_of_every_row_are_the_same(scores: tuple[list[Tensor], ...], limit: int, density: float) -> None:
    matrices = scores[0] + scores[1]

    def masked() -> list[Tensor]:
        torch.manual_seed(0)
        weights = [torch.randn_like(matrix) for matrix in matrices]
        masks = [torch.empty_like(matrix, dtype=torch.bool) for matrix in matrices]
        keep_top_share_(weights, matrices, density, masks)
        return weights + masks

    assert bits(cut(limit, masked)) == bits(masked())


@modest
@given(layers(odd=True), limits, st.floats(0, 0.9))
def test_averages_are_the_same(values: tuple[list[Tensor], list[Tensor]], limit: int, beta: float) -> None:
    def averaged() -> list[Tensor]:
        torch.manual_seed(0)
        averages = [torch.rand_like(value) for value in values[0] + values[1]]
        update_moving_average_(averages, values[0] + values[1], beta)
        return averages

    assert bits(cut(limit, averaged)) == bits(averaged())


@modest
@given(layers(odd=False), limits, st.integers(0, 60), st.booleans(), st.booleans())
def test_what_one_threshold_keeps_is_the_same(
    scores: tuple[list[Tensor], list[Tensor]], limit: int, most: int, gated: bool, unseen: bool
) -> None:
    opened = [torch.arange(len(A)) % 3 > 0 for A in scores[0]] if gated else None

    def chosen() -> list[Tensor]:
        rows = Rows(*scores, opened)
        threshold = rows.lowest_threshold(most, torch.full((len(scores[0]),), 1.5))
        masks = [[torch.empty_like(s, dtype=torch.bool) for s in half] for half in scores]
        rows.mark_(masks[0], masks[1], threshold, unseen)
        return [threshold.view(1), rows.changes(threshold).int(), *masks[0], *masks[1]]

    assert bits(cut(limit, chosen)) == bits(chosen())
