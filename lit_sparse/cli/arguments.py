"""Arguments of the command line: configuration files, and options as users spell them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from lit_sparse.errors import UsageError

CONFIGS = "lit_sparse://"
"""Prefix of the configurations that the package contains."""

_BOOLEANS = ("true", "false", "yes", "no", "null")  # values of a switch; any other word after it is not its value


class ConfigFile(ActionConfigFile):
    """``--config FILE``, where ``lit_sparse://quickstart.yaml`` is a file of the package."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Read the file.

        Raises:
            UsageError: If the package has no such file, or it holds no configuration.
        """
        if values.startswith(CONFIGS):
            values = str(packaged(values))
        file = Path(values)
        if file.is_file():  # jsonargparse takes a text of YAML too
            _require_mapping(file)
        super().__call__(parser, cfg, values, option_string)  # type: ignore[no-untyped-call]


def spelled_out(words: Sequence[str], command: Callable[..., object]) -> list[str]:
    """Options of a command as its parser knows them: ``--require-final`` becomes ``--require_final=true``.

    Args:
        words: The words after the name of the command.
        command: The function that the command calls. Options may have dashes in place of underscores, and those with
            a boolean default need no value.
    """
    options = inspect.signature(command).parameters
    changed = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in options:
            changed.append(word)
            continue
        if not equals and isinstance(options[name].default, bool) and following.lower() not in _BOOLEANS:
            equals, value = "=", "true"
        changed.append(f"--{name}{equals}{value}")
    return changed


def packaged(name: str) -> Path:
    """The file of a configuration of the package, such as ``lit_sparse://quickstart.yaml``."""
    folder = Path(str(files("lit_sparse"))) / "configs"
    known = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.yaml"))}
    if name.removeprefix(CONFIGS) not in known:
        raise UsageError(f"There is no configuration {name!r} in the package; there are {', '.join(known)}.")
    return known[name.removeprefix(CONFIGS)]


def _require_mapping(file: Path) -> None:
    """Refuse a file that is not a YAML mapping: the parser would not name the file."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{file} is not YAML in UTF-8: {error}") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"{file} is {found}, not a configuration: model, data and trainer with their arguments.")
