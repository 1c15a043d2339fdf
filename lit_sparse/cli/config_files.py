"""Configuration files, of the user and of the package."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]

from lit_sparse.errors import UsageError

CONFIGS = "lit_sparse://"
"""Prefix of the configurations that the package contains."""


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
    try:
        json.dumps(content, default=str, skipkeys=True)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{file} has a value that is part of itself, or is nested too deeply.") from error
    if not isinstance(content, dict):
        found = "empty" if content is None else f"a {type(content).__name__}"
        raise UsageError(f"{file} is {found}, not a configuration: model, data and trainer with their arguments.")
