"""The files of an exported folder: ``lit_sparse.json``, which says what it holds, and safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_sparse.errors import UsageError, parse_json

METADATA = "lit_sparse.json"


def keep_name(model: Any, name: str) -> None:
    """Let exports of a model name its backbone in a way that other machines know, instead of by its folder on this one.

    Args:
        model: The model.
        name: What :func:`~lit_sparse.from_pretrained` loads it by.
    """
    model.portable_name = name


def name_of(model: Any) -> str | None:
    """The name of a model's backbone for other machines, by :func:`keep_name`; else where it was loaded from."""
    return getattr(model, "portable_name", None) or getattr(model, "name_or_path", None) or None


def means_path(name: str) -> bool:
    """Whether a name is meant as a path on this machine, not as an id on the hub, which has one slash at most."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def write_metadata(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write the file; values that JSON lacks are written as text."""
    (folder / METADATA).write_text(json.dumps(entries, indent=2, default=str) + "\n", encoding="utf-8")


def read_metadata(folder: Path) -> dict[str, Any]:
    """Read the file; empty where another program wrote the folder.

    Raises:
        UsageError: If it is damaged.
    """
    file = folder / METADATA
    try:
        entries: Any = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
    if not isinstance(entries, dict):
        raise UsageError(f"{file} cannot be read: it holds no names.")
    return entries


def require_version(entries: Mapping[str, Any], newest: int, what: str) -> None:
    """Check the version of a format.

    Args:
        entries: Metadata with the number ``version``.
        newest: The newest version that can be read; all from 1 on can.
        what: What was read, for messages.

    Raises:
        UsageError: If the version is newer, no number, or missing.
    """
    version = entries.get("version")
    if type(version) is not int or version < 1:
        found = f"its version is {version!r}, not a number from 1 on" if "version" in entries else "it has no version"
        raise UsageError(f"{what} is damaged: {found}.")
    if version > newest:
        raise UsageError(
            f"{what} is of version {version} of its format, and {newest} is known here: load it with lit_sparse "
            f"{entries.get('lit_sparse_version')}."
        )


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        UsageError: If it does not exist or is damaged.
    """
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{file} cannot be read: {error}.") from error
