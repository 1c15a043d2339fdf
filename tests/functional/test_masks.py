"""lit_sparse.functional.masks against slow, obvious references."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sparse.errors import UsageError
from lit_sparse.functional import kept_entries, piecewise, top_fraction_mask

modest = settings(max_examples=100, deadline=None)
fractions = st.floats(0.01, 1)


def slow_mask(scores: torch.Tensor, keep: int, dim: int) -> torch.Tensor:
    """Sort every slice in Python, largest first and lower index first among equals, and keep the head."""
    last = scores.movedim(dim, -1)
    mask = torch.zeros(last.shape, dtype=torch.bool)
    for where in itertools.product(*map(range, last.shape[:-1])):
        row = last[where].tolist()
        ranked = sorted(range(len(row)), key=lambda i: (math.inf if math.isnan(row[i]) else -row[i], i))
        for i in ranked[:keep]:
            mask[(*where, i)] = True
    return mask.movedim(-1, dim)


@st.composite
def scores_with_ties(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    numbers = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-30, math.inf, -math.inf, math.nan])
    size = math.prod(shape)
    values = draw(st.lists(numbers | st.floats(0, 3, width=32), min_size=size, max_size=size))
    return torch.tensor(values).reshape(shape), draw(st.integers(-len(shape), len(shape) - 1))


@modest
@given(scores_with_ties(), fractions)
def test_the_mask_is_the_head_of_a_stable_sort(drawn, fraction):
    scores, dim = drawn
    mask = top_fraction_mask(scores, fraction, dim)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, slow_mask(scores, kept_entries(fraction, scores.shape[dim]), dim))


@modest
@given(
    st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, math.nan]) | st.floats(0, 3, width=32), min_size=7, max_size=60),
    st.floats(0.01, 0.2),
)
def test_long_rows_of_which_few_entries_are_kept(row, fraction):
    scores = torch.tensor([row, row[::-1]])
    assert torch.equal(top_fraction_mask(scores, fraction, 1), slow_mask(scores, kept_entries(fraction, len(row)), 1))


@modest
@given(scores_with_ties(), fractions)
def test_every_slice_keeps_equally_many_and_none_below_a_dropped_score(drawn, fraction):
    scores, dim = drawn
    mask = top_fraction_mask(scores, fraction, dim)
    assert (mask.sum(dim) == kept_entries(fraction, scores.shape[dim])).all()
    known = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    worst_kept = known.masked_fill(~mask, math.inf).amin(dim)
    best_dropped = known.masked_fill(mask, -math.inf).amax(dim)
    assert (worst_kept >= best_dropped).all()


@modest
@given(scores_with_ties(), fractions)
def test_memory_layout_does_not_matter(drawn, fraction):
    scores, dim = drawn
    strided = scores.movedim(dim, 0).contiguous().movedim(0, dim)
    assert torch.equal(top_fraction_mask(strided, fraction, dim), top_fraction_mask(scores, fraction, dim))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "dim"), [((8, 300), 1), ((300, 8), 0), ((3, 8, 300), -1), ((3, 300, 8), -2)])
def test_large_batched_scores_equal_the_slow_mask(dtype, shape, dim):
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(dtype)  # half precision: many ties
    for fraction in (0.004, 0.05, 0.5, 1.0):
        expected = slow_mask(scores, kept_entries(fraction, 300), dim)
        assert torch.equal(top_fraction_mask(scores, fraction, dim), expected)


def test_equal_scores_go_to_the_lower_index():
    mask = top_fraction_mask(torch.tensor([[0.0] * 8, [1.0, 3, 2, 2, 2, 0, 0, 2]]), 3 / 8, dim=1)
    assert mask.int().tolist() == [[1, 1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0, 0]]


def test_nan_is_never_kept_before_a_finite_score():
    scores = torch.tensor([math.nan, 0.0, math.nan, 1e-30, 5.0])
    assert top_fraction_mask(scores, 0.6, dim=0).tolist() == [False, True, False, True, True]
    assert top_fraction_mask(scores, 0.8, dim=0).tolist() == [True, True, False, True, True]
    assert top_fraction_mask(torch.full((4,), math.nan), 0.5, dim=0).tolist() == [True, True, False, False]


def test_an_infinite_score_beats_the_largest_finite_one():
    largest = torch.finfo(torch.float32).max
    assert top_fraction_mask(torch.tensor([largest, math.inf]), 0.5, dim=0).tolist() == [False, True]
    assert top_fraction_mask(torch.tensor([-math.inf, -largest]), 0.5, dim=0).tolist() == [False, True]


def test_scores_without_slices_give_an_empty_mask():
    assert top_fraction_mask(torch.zeros(0, 6), 0.5, dim=1).shape == (0, 6)
    assert top_fraction_mask(torch.zeros(6, 0), 0.5, dim=0).shape == (6, 0)


def test_no_value_is_read_back_by_the_host():
    scores = torch.empty(3, 8, device="meta")  # reading a value would raise
    assert top_fraction_mask(scores, 0.5, dim=1).shape == (3, 8)


def test_the_mask_does_not_change_the_scores():
    scores = torch.tensor([math.nan, 2.0, math.inf])
    top_fraction_mask(scores, 0.5, dim=0)
    assert scores.isnan().tolist() == [True, False, False]
    assert scores[1:].tolist() == [2.0, math.inf]


@modest
@given(st.integers(1, 10_000), st.integers(1, 20_000))
def test_a_decimal_fraction_keeps_what_exact_arithmetic_says(numerator, length):
    expected = max(1, math.floor(Fraction(numerator, 10_000) * length))
    assert kept_entries(numerator / 10_000, length) == expected


def test_kept_entries_where_floating_point_alone_would_err():
    assert (kept_entries(0.07, 100), kept_entries(0.29, 100)) == (7, 29)
    assert (kept_entries(0.05, 384), kept_entries(0.001, 10), kept_entries(1.0, 7)) == (19, 1, 7)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.01, math.nan])
def test_a_fraction_outside_the_unit_interval_is_an_error(fraction):
    with pytest.raises(UsageError, match=rf"fraction must be above 0 and at most 1; got {fraction}\."):
        kept_entries(fraction, 10)
    with pytest.raises(UsageError, match=rf"fraction must be above 0 and at most 1; got {fraction}\."):
        top_fraction_mask(torch.ones(2, 3), fraction, dim=1)


def test_an_empty_dimension_is_an_error():
    with pytest.raises(UsageError, match="length must be at least 1; got 0"):
        kept_entries(0.5, 0)
    with pytest.raises(UsageError, match="length must be at least 1; got 0"):
        top_fraction_mask(torch.ones(3, 0), 0.5, dim=1)


@pytest.mark.parametrize("tied", [False, True])
def test_what_is_at_hand_is_masked_as_what_is_on_a_device(tied, monkeypatch):
    scores = torch.rand(6, 50)
    if tied:
        scores = (scores * 5).round()
    here = top_fraction_mask(scores, 0.1, -1)
    monkeypatch.setattr(piecewise, "is_at_hand", lambda _: False)
    assert torch.equal(top_fraction_mask(scores, 0.1, -1), here)
    assert (here.sum(1) == 5).all()
