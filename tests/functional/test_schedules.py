"""lit_sparse.functional.schedules against slow, obvious references."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sparse.errors import UsageError
from lit_sparse.functional import cubic_density, resolve_step, threshold_stages

modest = settings(max_examples=100, deadline=None)


def slow_cubic(step: float, density: float, begin: float, end: float) -> float:
    """The three cases as the paper writes them, for begin < end."""
    if step <= begin:
        return 1.0
    if step > end:
        return density
    return density + (1 - density) * (1 - (step - begin) / (end - begin)) ** 3


@pytest.mark.parametrize(
    ("begin", "end", "steps"), [(3, 20, (3, 20)), (0.1, 0.8, (5, 40)), (0, 0.5, (0, 25)), (0.0, 1.0, (0, 50))]
)
def test_cubic_density_is_the_papers_schedule(begin, end, steps):
    for step in range(51):
        assert cubic_density(step, 50, 0.05, begin, end) == pytest.approx(slow_cubic(step, 0.05, *steps), abs=1e-12)


@modest
@given(st.floats(0.001, 1), st.integers(0, 40), st.integers(0, 40))
def test_cubic_density_never_rises_and_stays_between_its_ends(density, one, other):
    begin, end = min(one, other), max(one, other)
    shares = [cubic_density(step, 40, density, begin, end) for step in range(42)]
    assert all(later <= earlier for earlier, later in itertools.pairwise(shares))
    assert all(density <= share <= 1 for share in shares)
    assert shares[begin] == 1
    assert shares[41] == density


def test_begin_and_end_at_one_step_make_a_jump():
    assert [cubic_density(step, 10, 0.2, 4, 4) for step in (3, 4, 5)] == [1, 1, 0.2]
    assert [cubic_density(step, 10, 0.2, 0.4, 4) for step in (4, 5)] == [1, 0.2]


def test_a_share_of_the_run_lands_on_the_step_it_names():
    assert resolve_step(0.29, 100) == 29
    assert resolve_step(0.07, 100) == 7
    assert cubic_density(29, 100, 0.5, 0.29, 0.5) == 1
    assert (resolve_step(1, 100), resolve_step(1.0, 100), resolve_step(0.125, 100)) == (1, 100, 12.5)
    assert resolve_step(250, 100) == 250


@pytest.mark.parametrize(
    ("value", "total", "message"),
    [
        (True, 10, "a number of steps or a share of the run; got True"),
        (-1, 10, "A number of steps must be at least 0; got -1"),
        (-0.1, 10, r"share of the run, .*; got -0\.1"),
        (20.0, 10, r"share of the run, .*; got 20\.0\. Give steps as an int"),
        (math.nan, 10, r"share of the run, .*; got nan"),
        (0.5, 0, "total must be at least 1; got 0"),
    ],
)
def test_what_is_no_point_in_the_run_is_an_error(value, total, message):
    with pytest.raises(UsageError, match=message):
        resolve_step(value, total)
    with pytest.raises(UsageError, match=message):
        cubic_density(1, total, 0.5, value, 1.0)
    with pytest.raises(UsageError, match=message):
        cubic_density(1, total, 0.5, 0, value)


@pytest.mark.parametrize("density", [0.0, -0.5, 1.5, math.nan])
def test_a_density_outside_the_unit_interval_is_an_error(density):
    with pytest.raises(UsageError, match=rf"density must be above 0 and at most 1; got {density}\."):
        cubic_density(1, 10, density, 0, 5)


def test_pruning_that_ends_before_it_begins_is_an_error():
    with pytest.raises(UsageError, match=r"begin = 0\.5 comes after end = 20: they are steps 50 and 20 of 100"):
        cubic_density(1, 100, 0.5, 0.5, 20)


def test_linear_stages_have_equal_differences():
    assert threshold_stages(0.0, 6.0, 4, "linear") == [0, 2, 4, 6]
    assert threshold_stages(0.3, 0.9, 2, "linear") == [0.3, 0.9]  # 0.3 + (0.9 - 0.3) is not 0.9


def test_exp_linear_stages_have_equal_ratios():
    assert threshold_stages(1e-4, 1e-1, 4, "exp_linear") == pytest.approx([1e-4, 1e-3, 1e-2, 1e-1], rel=1e-12)


def test_log_linear_stages_have_equal_differences_of_their_exponentials():
    stages = [math.exp(stage) for stage in threshold_stages(0.5, 3.0, 5, "log_linear")]
    gaps = [b - a for a, b in itertools.pairwise(stages)]
    assert gaps == pytest.approx([(math.exp(3.0) - math.exp(0.5)) / 4] * 4, rel=1e-12)
    assert threshold_stages(0.0, 2000.0, 3, "log_linear") == pytest.approx([0, 2000 + math.log(0.5), 2000])


@modest
@given(
    st.floats(1e-6, 1),
    st.floats(1.01, 1e4),
    st.integers(2, 12),
    st.sampled_from(["linear", "log_linear", "exp_linear"]),
)
def test_stages_rise_from_exactly_the_first_to_exactly_the_last(first, ratio, count, spacing):
    stages = threshold_stages(first, first * ratio, count, spacing)
    assert (len(stages), stages[0], stages[-1]) == (count, first, first * ratio)
    assert all(a < b for a, b in itertools.pairwise(stages))


def test_one_stage_has_one_threshold():
    assert threshold_stages(0.3, 0.3, 1, "linear") == [0.3]
    with pytest.raises(UsageError, match=r"first and last must be equal; got 0\.1 and 0\.3"):
        threshold_stages(0.1, 0.3, 1, "linear")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0.1, 0.3, 0, "linear"), "count must be at least 1; got 0"),
        ((0.3, 0.3, 2, "linear"), r"last must be above 0\.3; got 0\.3"),
        ((0.3, 0.1, 2, "linear"), r"last must be above 0\.3; got 0\.1"),
        ((0.3, math.inf, 2, "linear"), r"last must be finite and above 0\.3; got inf"),
        ((-0.1, 0.3, 2, "linear"), r"first must be at least 0; got -0\.1"),
        ((math.nan, 0.3, 2, "linear"), "first must be at least 0; got nan"),
        ((0.0, 0.3, 2, "exp_linear"), "first must be above 0; got 0"),
        ((0.1, 0.3, 2, "cubic"), "'linear', 'log_linear' or 'exp_linear'; got 'cubic'"),
    ],
)
def test_impossible_stages_are_errors(arguments, message):
    with pytest.raises(UsageError, match=message):
        threshold_stages(*arguments)
