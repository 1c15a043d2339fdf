"""The errors that a user can mend by changing an argument, a file or a configuration."""

from collections.abc import Iterable


class UsageError(ValueError):
    """Something the user asked for cannot be done; the message says what was found and what to do.

    The command line prints these in one line, without a traceback. From Python it is an ordinary ``ValueError``.
    """


class TrainingError(RuntimeError):
    """Training ran into a state from which going on would only destroy what was learned.

    Printed by the command line as :class:`UsageError` is.
    """


def some(names: Iterable[str]) -> str:
    """A list that fits into a message."""
    ordered = sorted(names)
    shown = ", ".join(repr(name) for name in ordered[:6])
    more = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return f"[{shown}]{more}"
