"""Errors of the command line in one line, and words that are spelt like a wrong one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterable
from typing import NoReturn


def fail(message: str, status: int) -> NoReturn:
    """Print an error in one line, and exit."""
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    raise SystemExit(status)


def closest(word: str, known: Iterable[str], form: str = "{!r}") -> str:
    """A sentence that suggests known words, in any case; empty if there are none.

    Args:
        word: What was typed.
        known: Words that are suggested if they are spelt like it, or else if they begin with it.
        form: Format of a suggested word.
    """
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower) or [name for name in lower if name.startswith(word.lower())]
    return f" Did you mean {' or '.join(form.format(lower[name]) for name in close[:3])}?" if close else ""
