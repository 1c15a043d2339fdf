"""Words of the command line that are understood before the parser sees them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path

import yaml

from lit_sparse.errors import UsageError

CONFIGS = "lit_sparse://"
"""What the name of a configuration begins with that comes with the package."""

_OPTIONS = ("-c", "--config")


def with_packaged_configs(words: Sequence[str]) -> list[str]:
    """Put the package's own file where ``--config lit_sparse://quickstart.yaml`` asks for it.

    Raises:
        UsageError: If there is none of that name.
    """
    changed = list(words)
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name not in _OPTIONS:
            continue
        if equals:
            changed[place] = f"{name}={_found(value)}"
        elif place + 1 < len(words):
            changed[place + 1] = _found(words[place + 1])
    return changed


def without_quiet(words: Sequence[str]) -> list[str]:
    """The words but ``--quiet``, for commands whose parsers do not know it."""
    return [word for word in words if word != "--quiet"]


def spelled_out(words: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Options of a command as its parser knows them: ``--require-final`` is ``--require_final=true``.

    Args:
        words: As typed, after the name of the command.
        command: What the command calls. Dashes in names of its arguments may stand for underscores, and an argument
            whose default is true or false needs no value.
    """
    options = inspect.signature(command).parameters
    changed = []
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in options:
            changed.append(word)
            continue
        if not equals and isinstance(options[name].default, bool) and following.startswith("-"):
            equals, value = "=", "true"
        changed.append(f"--{name}{equals}{value}")
    return changed


def _found(value: str) -> str:
    if not value.startswith(CONFIGS):
        return value
    folder = Path(str(files("lit_sparse"))) / "configs"
    file = folder / value.removeprefix(CONFIGS)
    known = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.yaml"))
    if file.relative_to(folder).as_posix() not in known:
        raise UsageError(f"There is no configuration {value!r} in the package; there are {', '.join(known)}.")
    return str(file)


def require_readable(words: Sequence[str]) -> None:
    """Refuse a file of configuration that is no YAML: the parser does not say which file it means."""
    for option, following in zip(words, [*words[1:], ""], strict=True):
        name, equals, value = option.partition("=")
        file = Path(value if equals else following)
        if name not in _OPTIONS or not file.is_file():
            continue
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UsageError(f"{file} is no YAML in UTF-8: {error}") from error
        if not isinstance(content, dict):
            found = "empty" if content is None else f"a {type(content).__name__}"
            raise UsageError(f"{file} is {found}, not a configuration: model, data and trainer with their arguments.")
