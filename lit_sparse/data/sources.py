"""Where rows come from: local files, folders and the hub, with errors that name what is wrong."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from lit_sparse.data.tables import ENDINGS, read_files
from lit_sparse.errors import UsageError

Reader = Callable[[], Dataset]  # reads one split
DataFiles = dict[str, str | list[str]]  # split → file, or files of one kind that are read one after another
Kinds = Mapping[str, Callable[[Sequence[Path], str], Dataset]]  # ending of a file → reads the files of a split

TABLES: Kinds = dict.fromkeys(ENDINGS, read_files)

_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")  # how the hub names the parts of a split


class Place(NamedTuple):
    """A row of a source, which errors name."""

    split: str
    number: int

    def __str__(self) -> str:
        return f"Row {self.number} (counted from 0) of the split {self.split!r}"


def open_source(
    path: str | None,
    name: str | None,
    revision: str | None,
    data_files: DataFiles | None,
    known_splits: Sequence[str],
    kinds: Kinds = TABLES,
) -> dict[str, Reader]:
    """Find the splits of a source.

    Args:
        path: Hub id, folder or file; see ``RowData``.
        name: Configuration on the hub.
        revision: Branch, tag or commit on the hub.
        data_files: Split → file, or list of files.
        known_splits: Names of splits to look for in a folder and to accept in ``data_files``.
        kinds: The kinds of files that can be read.

    Returns:
        Split → function that reads it. Local files are not read before that; a hub data set is loaded whole.

    Raises:
        UsageError: If a file or folder is missing or of an unknown kind, the hub cannot be reached, or the
            arguments contradict each other.
    """
    if (path is None) == (data_files is None):
        found = "neither" if path is None else "both"
        raise UsageError(f"Give either path (hub id, folder or file) or data_files (split → file); got {found}.")
    if path is not None:
        files = _files_at(path, known_splits, kinds)
    else:
        files = _listed_files(data_files or {}, known_splits, kinds)
    if not files:
        loaded = _load_dataset_of_hub_form(str(path), name, revision)
        return {split: partial(loaded.__getitem__, split) for split in loaded}
    refuse_hub_arguments(path or "data_files", name, revision)
    return {split: partial(kinds[parts[0].suffix], parts, split) for split, parts in files.items()}


def refuse_hub_arguments(source: str, name: str | None, revision: str | None) -> None:
    """Refuse arguments that local files have no use for."""
    if name or revision:
        raise UsageError(
            f"name and revision choose within a data set of the hub, but {source} names local files: leave out "
            f"name={name!r} and revision={revision!r}."
        )


def require_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """Require that rows have certain columns.

    Raises:
        UsageError: If a column is missing, or holds conversations.
    """
    missing = [column for column in columns if column not in rows.column_names]
    chats = _chat_columns(rows)
    if chats and (missing or set(chats) & set(columns)):
        raise UsageError(
            f"The split {split!r} holds conversations, in the column {chats[0]!r}: lit_sparse.ChatData reads these, by "
            "the tokenizer's chat template, for a causal language model."
        )
    if missing:
        raise UsageError(
            f"The split {split!r} has no column {', '.join(map(repr, missing))}; its columns are {rows.column_names}."
        )


def _chat_columns(rows: Dataset) -> list[str]:
    """Columns of lists of turns, in the form of OpenAI (role, content) or of ShareGPT (from, value)."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    nested = [name for name, kind in kinds.items() if kind in ("List", "LargeList", "list", "Json")]
    if not nested or not len(rows):
        return []
    first = rows.select_columns(nested)[0]  # no other columns: images would be decoded
    return [name for name, turns in first.items() if isinstance(turns, list) and turns and _is_turn(turns[0])]


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and ({"role", "content"} <= value.keys() or {"from", "value"} <= value.keys())


def distinct(rows: Dataset, column: str) -> list[Any]:
    """The different values of a column.

    Raises:
        UsageError: If they are lists, dictionaries, or of several kinds, which cannot be compared.
    """
    try:
        return list(rows.unique(column))
    except pyarrow.ArrowNotImplementedError as error:
        raise UsageError(
            f"The column {column!r} has values that are no single words or numbers, or some of each "
            f"({rows.features[column]}): mend the file, or name another column."
        ) from error


def require_text(value: object, column: str, place: Place, *, blank: bool = False) -> str:
    """Return ``value`` if it is a string and, unless ``blank`` is allowed, more than white space."""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise UsageError(f"{place} has no text in the column {column!r} but {value!r}: fill it in or remove the row.")
    return value


def require_texts(values: list[Any], column: str, places: Sequence[Place], *, blank: bool = False) -> list[str]:
    """:func:`require_text` for several rows."""
    return [require_text(value, column, place, blank=blank) for value, place in zip(values, places, strict=True)]


def _files_at(path: str, known_splits: Sequence[str], kinds: Kinds) -> dict[str, list[Path]]:
    """Split → files; empty if ``path`` is not a file and not a folder with files named by split."""
    place = local_path(path)
    if place.is_file():
        return {"train": [_of_known_kind(place, kinds)]}
    if place.is_dir():
        return files_named_by_split(place, known_splits, kinds)
    if place.suffix in kinds or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UsageError(f"The path {path!r} does not exist: give an existing file or folder, or a hub id.")
    return {}


def files_named_by_split(folder: Path, known_splits: Sequence[str], kinds: Kinds = TABLES) -> dict[str, list[Path]]:
    """Find the files of each split in a folder; several per split are the parts of a data set of the hub.

    Raises:
        UsageError: If a split has several files that are no such parts.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        split = _SHARD.sub("", file.stem)
        if file.suffix in kinds and split in known_splits:
            files.setdefault(split, []).append(file)
    for split, parts in files.items():
        if len(parts) > 1 and not all(_SHARD.search(part.stem) for part in parts):
            raise UsageError(
                f"The split {split!r} must be one file, but {folder} has {[part.name for part in parts]}: remove "
                f"all but one, or name one in data_files."
            )
    return files


def _listed_files(data_files: DataFiles, known_splits: Sequence[str], kinds: Kinds) -> dict[str, list[Path]]:
    if not data_files or not set(data_files) <= set(known_splits):
        raise UsageError(f"data_files gives files to some of {list(known_splits)}; got {data_files}.")
    files = {split: _paths_of(given, split) for split, given in data_files.items()}
    missing = [str(file) for parts in files.values() for file in parts if not file.is_file()]
    if missing:
        raise UsageError(f"data_files names files that do not exist: {', '.join(missing)}.")
    for split, parts in files.items():
        if len({_of_known_kind(part, kinds).suffix.replace(".jsonl", ".json") for part in parts}) > 1:
            raise UsageError(
                f"The files of the split {split!r} must be of one kind; data_files has {list(map(str, parts))}."
            )
    return files


def _paths_of(given: str | list[str], split: str) -> list[Path]:
    names = given if isinstance(given, (list, tuple)) else [given]
    if not names or not all(isinstance(name, (str, os.PathLike)) for name in names):
        raise UsageError(f"data_files gives each split a file or a list of files; the split {split!r} has {given!r}.")
    return [local_path(name) for name in names]


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path, from a user's home folder where it begins with ``~`` or ``~user``."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user: the file itself has this name
        return Path(name)


def _of_known_kind(file: Path, kinds: Kinds) -> Path:
    if file.suffix not in kinds:
        raise UsageError(f"{file} cannot be read: files of rows end in {', '.join(kinds)}.")
    return file


def _load_dataset_of_hub_form(path: str, name: str | None, revision: str | None) -> DatasetDict:
    folder = local_path(path).absolute()
    if folder.is_dir() and re.search(r"[][*?]|::", str(folder)):
        raise UsageError(
            f"The name of the folder {str(folder)!r} reads as a pattern, by which other folders would be found: rename "
            "it, or name its files in data_files."
        )
    try:
        return load_dataset(path, name, revision=revision)
    except (DatasetsError, OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
        raise UsageError(
            f"The data set {path!r} could not be loaded ({' '.join(str(cause).split()) or type(cause).__name__}): "
            f"check path, name and revision; without a network, give a local copy as path."
        ) from error
