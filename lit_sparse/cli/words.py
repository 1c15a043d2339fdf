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


def closest(word: str, known: Iterable[str]) -> str:
    """A sentence that suggests known words which are spelt like ``word``, in any case; empty if there are none."""
    lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(word.lower(), lower)
    return f" Did you mean {' or '.join(repr(lower[name]) for name in close)}?" if close else ""
