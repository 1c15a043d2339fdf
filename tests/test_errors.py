"""Helpers for error messages."""

import math
import re

import pytest

from lit_sparse.errors import UsageError, listed, require_choice, require_range


@pytest.mark.parametrize(
    ("value", "bounds"),
    [
        (1, {"at_least": 1}),
        (1e9, {"above": 0}),
        (0.0, {"at_least": 0, "below": 1}),
        (1.0, {"above": 0, "at_most": 1}),
        (None, {"at_least": 1}),
    ],
)
def test_a_value_in_its_range_or_not_set_passes(value, bounds):
    require_range("share", value, **bounds)


@pytest.mark.parametrize(
    ("value", "bounds", "wanted"),
    [
        (0, {"at_least": 1}, "at least 1"),
        (0.0, {"above": 0}, "above 0"),
        (1, {"at_least": 0, "below": 1}, "at least 0 and below 1"),
        (1.5, {"above": 0, "at_most": 1}, "above 0 and at most 1"),
        (math.inf, {"at_least": 0}, "finite and at least 0"),
        (math.nan, {"at_least": 0}, "at least 0"),
        (-math.inf, {"below": 1}, "finite and below 1"),
        (math.inf, {}, "finite"),
    ],
)
def test_a_value_outside_is_named_with_the_range(value, bounds, wanted):
    with pytest.raises(UsageError, match=f"^share must be {wanted}; got {value}.$"):
        require_range("share", value, **bounds)


@pytest.mark.parametrize("value", ["2", [2], {}])
def test_what_is_no_number_is_said_to_be_none(value):
    with pytest.raises(UsageError, match=f"^share must be a number; got {re.escape(repr(value))}.$"):
        require_range("share", value, at_least=1)


def test_a_long_list_is_cut():
    assert listed("ba") == "['a', 'b']"
    assert listed(map(str, range(8))) == "['0', '1', '2', '3', '4', '5'] and 2 more"


def test_a_choice():
    require_choice("mode", "max", ("max", "min"))
    with pytest.raises(UsageError, match="spacing must be 'a', 'b' or 'c'; got 'd'"):
        require_choice("spacing", "d", ("a", "b", "c"))
