"""Errors that a user can mend by changing an argument, a file or a configuration."""

import json
import math
from collections.abc import Iterable
from typing import Any


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message says what was found and what to do.

    The command line prints these in one line, without a traceback. From Python it is an ordinary ``ValueError``.
    """


class TrainingError(RuntimeError):
    """Training ran into a state from which going on would only destroy what was learned.

    Printed by the command line as :class:`UsageError` is.
    """


def listed(names: Iterable[str]) -> str:
    """Up to six names, sorted and quoted, and how many more there are: a list for an error message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:6])
    more = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return f"[{shown}]{more}"


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
        UsageError: If the value is outside, infinite or NaN.
    """
    if value is None or (at_least <= value <= at_most and above < value < below):
        return
    bounds = {"at least": at_least, "above": above, "at most": at_most, "below": below}
    wanted = " and ".join(f"{phrase} {bound:g}" for phrase, bound in bounds.items() if math.isfinite(bound))
    raise UsageError(f"{name} must be {wanted}; got {value}.")


def parse_json(text: str) -> Any:
    """``json.loads`` with one kind of error; a byte-order mark at the start is skipped.

    Raises:
        ValueError: If the text is not JSON or is nested too deeply.
    """
    try:
        return json.loads(text.removeprefix("\ufeff"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
