"""Errors of other libraries that only their text tells apart: the one place where this package reads such text.

``tests/test_foreign_errors.py`` provokes each of these errors, and so notices another wording.
"""

from __future__ import annotations

import errno
import re

from torch import distributed

_LOST_CONNECTION = re.compile(r"gloo.*(read|write) error|connection (reset|closed)", re.IGNORECASE | re.DOTALL)
_UNKNOWN_KEY = re.compile(r"(?:class_path '([\w.]+)':\s+)?(?:[Oo]ption '|[Kk]ey '|arguments: (?=--))([\w.-]+)")
_UNKNOWN_CLASS = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'|dot import path string: (\w+)")
_CHOICES = re.compile(r"\ba typing\.Literal\[(.*?)\]")
_OBJECT = re.compile(r"\.? Got value: Namespace\(.*")
_REFUSED = re.compile(r"(?:Got|Given) value: (.*)")
_REQUIRED_MODEL = re.compile(r"arguments are required: \w+\.model\b")
_NOISE = re.compile(
    r"(- )?Does not validate against any of the Union subtypes|Subtypes: .*|Errors:|- Expected a <class 'NoneType'>"
    r"|- Expected a path but .* either not accessible or invalid|Given value type: .*"
    r"|Given value: \[?(NestedArg|Namespace)\(.*|- Not a valid subclass of .*|Subclass types expect one of:"
    r"|- a (class path|dict) (\(str\)|with|without) ?.*|Given value: \[?\{'class_path'.*"
)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or an exhausted quota caused an error; safetensors has the number in its text only."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if number in (errno.ENOSPC, errno.EDQUOT) or f"(os error {errno.ENOSPC})" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_lost_process(error: BaseException) -> bool:
    """Whether a collective failed because another process is gone; torch's gloo raises a plain RuntimeError."""
    if isinstance(error, distributed.DistError):
        return True
    return isinstance(error, RuntimeError) and _LOST_CONNECTION.search(str(error)) is not None


def refused_global(error: BaseException) -> str | None:
    """The line that names the class or function which ``torch.load(weights_only=True)`` refused to load, if any."""
    return next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line), None)


def is_size_mismatch(error: BaseException) -> bool:
    """Whether transformers refused weights of other shapes than the model's."""
    return "ignore_mismatched_sizes" in str(error)


def unknown_key(message: str) -> tuple[str, str] | None:
    """The key or ``--option`` that jsonargparse does not know, if that is its error, after the class path or ""."""
    found = _UNKNOWN_KEY.search(message)
    return (found[1] or "", found[2]) if found else None


def unknown_choice(message: str) -> tuple[str, list[str]] | None:
    """The value that jsonargparse refused, and those that it accepts, if that is its error."""
    choices, value = _CHOICES.findall(message), _REFUSED.search(message)
    return (value[1], re.findall("'(.*?)'", " ".join(choices))) if choices and value else None


def unknown_class(message: str) -> tuple[str, str] | None:
    """The module and the name of a class that jsonargparse did not find, if that is its error; "" for a bare name."""
    found = _UNKNOWN_CLASS.search(message)
    return (found[1] or "", found[2] or found[3]) if found else None


def lacks_model(message: str) -> bool:
    """Whether jsonargparse's error is that a command was given no model."""
    return _REQUIRED_MODEL.search(message) is not None


def without_noise(message: str) -> str:
    """Jsonargparse's error in one line, without the lines that list the types it tried and its own objects."""
    lines = (line.strip() for line in _OBJECT.sub("", _CHOICES.sub(r"one of \1", message)).splitlines())
    return " ".join(line for line in lines if not _NOISE.fullmatch(line))
