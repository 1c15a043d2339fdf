"""lit_sparse.functional.changes against loops over ranks and entries."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lit_sparse.functional.changes import Rows, lowest_threshold, union

modest = settings(max_examples=150, deadline=None)
CPU = torch.device("cpu")


def kept_in(row: list[float], threshold: float) -> list[bool]:
    """The entries at or above the threshold, or else the largest; none of a row of zeros."""
    least = min(threshold, max(row))
    return [value >= least > 0 for value in row]


def slow_changes(A: Tensor, B_t: Tensor, threshold: float) -> int:
    return sum(
        sum(kept_in(a, threshold)) * sum(kept_in(b, threshold)) for a, b in zip(A.tolist(), B_t.tolist(), strict=True)
    )


def slow_union(masks_A: Tensor, masks_B_t: Tensor) -> int:
    pairs = {
        (i, j)
        for a, b in zip(masks_A.tolist(), masks_B_t.tolist(), strict=True)
        for i, kept_i in enumerate(b)
        for j, kept_j in enumerate(a)
        if kept_i and kept_j
    }
    return len(pairs)


@st.composite
def layers(draw: st.DrawFn) -> tuple[list[Tensor], list[Tensor]]:
    """Scores of layers, some of equal width, with ties, zeros and rows of zeros."""
    number = st.sampled_from([0.0, 0.0, 1.0, 2.0, 1e-30]) | st.floats(0, 4, width=32)
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=4))

    def matrix(rows: int, width: int) -> Tensor:
        return torch.tensor(draw(st.lists(number, min_size=rows * width, max_size=rows * width))).view(rows, width)

    return [matrix(r, a) for r, a, _ in shapes], [matrix(r, b) for r, _, b in shapes]


def marked(
    rows: Rows, scores: tuple[list[Tensor], list[Tensor]], at: Tensor, unseen: bool = False
) -> tuple[list[Tensor], list[Tensor]]:
    masks_A, masks_B_t = ([torch.empty_like(s, dtype=torch.bool) for s in half] for half in scores)
    rows.mark_(masks_A, masks_B_t, at, unseen)
    return masks_A, masks_B_t


@modest
@given(layers(), st.floats(2.0**-60, 5, width=32))
def test_rows_keep_what_reaches_the_threshold(scores: tuple[list[Tensor], list[Tensor]], threshold: float) -> None:
    rows, at = Rows(*scores), torch.tensor(threshold)
    assert rows.changes(at).tolist() == [slow_changes(A, B_t, threshold) for A, B_t in zip(*scores, strict=True)]
    for given_scores, masks in zip(scores, marked(rows, scores, at), strict=True):
        for matrix, mask in zip(given_scores, masks, strict=True):
            assert mask.tolist() == [kept_in(row, threshold) for row in matrix.tolist()]
    for given_scores, masks in zip(scores, marked(rows, scores, at, unseen=True), strict=True):
        for matrix, mask in zip(given_scores, masks, strict=True):
            assert mask.tolist() == [kept_in(r, threshold) if any(r) else [True] * len(r) for r in matrix.tolist()]
    masks = marked(rows, scores, at)
    assert union(*masks, [1] * len(scores[0])).tolist() == [slow_union(A, B_t) for A, B_t in zip(*masks, strict=True)]


@modest
@given(layers(), st.integers(0, 60), st.integers(1, 4))
def test_the_threshold_is_the_lowest_that_the_limit_allows(
    scores: tuple[list[Tensor], list[Tensor]], limit: int, overlap: int
) -> None:
    rows = Rows(*scores)

    def changes(at: float) -> float:
        return sum(slow_changes(A, B_t, at) for A, B_t in zip(*scores, strict=True)) / overlap

    by_digits = rows.lowest_threshold(limit, torch.full((len(scores[0]),), float(overlap)))
    by_halves = lowest_threshold(lambda t: rows.changes(t).sum() / overlap, limit, CPU)
    for threshold, precision in ((float(by_digits), 2.0**-7), (float(by_halves), 1e-5)):
        assert threshold > 0
        if changes(math.inf) > limit:  # one entry of each row is too much
            assert threshold >= 2.0**127
            continue
        assert changes(threshold) <= limit
        lower = threshold * (1 - precision)
        if lower > 2.0**-125:
            assert changes(lower) > limit


def test_the_ranks_of_every_expert_change_weights_of_their_own() -> None:
    A, B = torch.rand(6, 5) < 0.5, torch.rand(6, 4) < 0.5
    found = union([A], [B], [3])
    assert int(found) == sum(slow_union(A[i : i + 2], B[i : i + 2]) for i in (0, 2, 4))


@pytest.mark.parametrize("ranks", [0, 2])
def test_layers_without_ranks_have_no_part(ranks: int) -> None:
    A, B = [torch.ones(2, 3), torch.rand(ranks, 3)], [torch.ones(2, 4), torch.rand(ranks, 4)]
    assert int(Rows(A, B).changes(torch.tensor(1.0))[0]) == 24
