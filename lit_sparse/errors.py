"""Errors that a user can fix by changing an argument, a file or a configuration."""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


class UsageError(ValueError):
    """The user's request cannot be carried out; the message names the cause and how to fix it.

    The command line prints these in one line, without a traceback. From Python it is an ordinary ``ValueError``.
    """


class TrainingError(RuntimeError):
    """Training was stopped because further steps would destroy the trained weights.

    Printed by the command line as :class:`UsageError` is.
    """


def listed(names: Iterable[str]) -> str:
    """Up to six names, sorted and quoted, and how many more there are: a list for an error message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:6])
    more = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return f"[{shown}]{more}"


def reason_of(error: BaseException) -> str:
    """The text of an error in one line; the name of its class if it has none."""
    return " ".join(str(error).split()) or type(error).__name__


def require_range(
    name: str,
    value: float | None,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    at_most: float = math.inf,
    below: float = math.inf,
) -> None:
    """Check that a numeric argument is in its range.

    Args:
        name: The argument's name.
        value: Its value. None passes: the argument is not set.
        at_least: Smallest value that is allowed.
        above: Bound that the value must exceed.
        at_most: Largest value that is allowed.
        below: Bound that the value must stay under.

    Raises:
        UsageError: If the value is no number, outside, infinite or NaN.
    """
    try:
        if value is None or (at_least <= value <= at_most and above < value < below):
            return
        finite = ["finite"] if math.isinf(value) else []
    except TypeError:
        raise UsageError(f"{name} must be a number; got {value!r}.") from None
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    limits = [f"{phrase} {bound:g}" for phrase, bound in bounds.items() if math.isfinite(bound)]
    raise UsageError(f"{name} must be {' and '.join(finite + limits)}; got {value}.")


def require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise a UsageError unless an argument has one of the given values.

    Args:
        name: The argument's name.
        value: Its value.
        choices: The allowed values, at least two.
    """
    if value not in choices:
        *others, last = map(repr, choices)
        raise UsageError(f"{name} must be {', '.join(others)} or {last}; got {value!r}.")


def parse_json(text: str) -> Any:
    """``json.loads`` with one kind of error; a byte-order mark at the start is skipped.

    Raises:
        ValueError: If the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
