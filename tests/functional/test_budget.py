"""lit_sparse.functional.budget against a loop that pays for one entry after the other."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sparse.errors import UsageError
from lit_sparse.functional import within_budget

modest = settings(max_examples=300, deadline=None)


def slow_within_budget(scores: list[float], costs: list[int], budget: int) -> list[bool]:
    ranked = sorted(range(len(scores)), key=lambda i: (math.inf if math.isnan(scores[i]) else -scores[i], i))
    kept = [False] * len(scores)
    for i in ranked:
        if costs[i] <= budget:
            kept[i], budget = True, budget - costs[i]
    return kept


@st.composite
def ranks(draw: st.DrawFn) -> tuple[list[float], list[int], list[int], int]:
    """Scores with ties, runs of costs, and a budget from nothing to more than all."""
    counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=8))
    costs = draw(st.lists(st.integers(1, 9), min_size=len(counts), max_size=len(counts)))
    number = st.sampled_from([0.0, -0.0, 1.0, 2.0, -1.0, 1e-30, math.inf, -math.inf, math.nan]) | st.floats(
        0, 3, width=32
    )
    scores = draw(st.lists(number, min_size=sum(counts), max_size=sum(counts)))
    most = sum(c * n for c, n in zip(costs, counts, strict=True))
    return scores, costs, counts, draw(st.integers(0, most + 2))


@modest
@given(ranks())
def test_the_kept_entries_are_those_of_the_loop(drawn: tuple[list[float], list[int], list[int], int]) -> None:
    scores, costs, counts, budget = drawn
    each = [cost for cost, count in zip(costs, counts, strict=True) for _ in range(count)]
    kept = within_budget(torch.tensor(scores), costs, counts, budget)
    assert kept.dtype == torch.bool
    assert kept.tolist() == slow_within_budget(scores, each, budget)
    spent = sum(cost for cost, is_kept in zip(each, kept.tolist(), strict=True) if is_kept)
    left_out = [cost for cost, is_kept in zip(each, kept.tolist(), strict=True) if not is_kept]
    assert spent <= budget
    assert all(cost > budget - spent for cost in left_out)


def test_every_cost_may_be_refused_in_its_turn() -> None:
    """As many passes as there are costs: each entry but the last is too dear when it is tried."""
    scores, costs = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], [50, 40, 30, 20, 10, 2]
    assert within_budget(torch.tensor(scores), costs, [1] * 6, 9).tolist() == [False] * 5 + [True]
    assert within_budget(torch.tensor(scores), costs, [1] * 6, 75).tolist() == [True, False, False, True, False, True]


def test_sums_beyond_float32() -> None:
    costs, counts = [2**40 + 1, 1], [3, 2]
    scores = torch.tensor([3.0, 2.0, 1.0, 0.5, 0.25])
    assert within_budget(scores, costs, counts, 3 * 2**40 + 3).tolist() == [True, True, True, False, False]
    assert within_budget(scores, costs, counts, 3 * 2**40 + 2).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("scores", "costs", "counts", "budget", "said"),
    [
        ([1.0], [1], [1], -1, "budget must be at least 0; got -1"),
        ([1.0], [0], [1], 1, "Give one cost of at least 1 for each count"),
        ([1.0], [1, 1], [1], 1, "Give one cost of at least 1 for each count"),
        ([1.0, 2.0], [1], [1], 1, r"costs for 1 entries; got scores of shape \(2,\)"),
    ],
)
def test_arguments(scores: list[float], costs: list[int], counts: list[int], budget: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        within_budget(torch.tensor(scores), costs, counts, budget)
