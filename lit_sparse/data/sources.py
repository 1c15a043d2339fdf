"""Where rows come from: local files, folders and the hub, with errors that name what is wrong."""

import glob
import os
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from lit_sparse.data.csv_rows import other_delimiter
from lit_sparse.data.files import SPLITS, ending, local_path, matching, split_name
from lit_sparse.data.readers import Kind, Kinds, Place, Reader, RowError, per_row
from lit_sparse.data.tables import ENDINGS, count_rows, read_files
from lit_sparse.errors import UsageError, reason_of
from lit_sparse.interchange.metadata import means_path

DataFiles = dict[str, str | list[str]]  # split → file or pattern, or a list: files of one kind, read one after another


TABLES: Kinds = dict.fromkeys(ENDINGS, Kind(read_files, count_rows))

_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")  # how the hub names the parts of a split
_FAMILIES = {".tsv": ".csv", ".jsonl": ".json", ".ndjson": ".json"}  # endings of which a split may have both


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
        data_files: Split → file or pattern, or list of files and patterns.
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
        return {split: Reader(partial(loaded.__getitem__, split)) for split in loaded}
    refuse_hub_arguments(path or "data_files", name, revision)
    readers = {}
    for split, parts in files.items():
        kind = kinds[ending(parts[0])]
        readers[split] = Reader(partial(kind.read, parts, split), parts, kind.count)
    return readers


def refuse_hub_arguments(source: str, name: str | None, revision: str | None) -> None:
    """Refuse arguments that local files have no use for."""
    if name or revision:
        raise UsageError(
            f"name and revision choose within a data set of the hub, but {source} names local files: leave out "
            f"name={name!r} and revision={revision!r}."
        )


def require_columns(rows: Dataset, split: str, columns: Sequence[str], files: Sequence[Path] = ()) -> None:
    """Require that rows have certain columns.

    Args:
        rows: Rows of a split.
        split: Its name.
        columns: Names of the columns.
        files: The files of the split, if it is in files.

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
            f"The split {split!r} has no column {', '.join(map(repr, missing))}; its columns are {rows.column_names}"
            f"{named(files)}{other_delimiter(rows.column_names)}."
        )


def named(files: Sequence[Path]) -> str:
    """The files of a split in parentheses, for errors; empty if it is in no files."""
    return f" ({', '.join(map(str, files[:3]))}{' …' if len(files) > 3 else ''})" if files else ""


def _chat_columns(rows: Dataset) -> list[str]:
    """Columns of lists of turns, in the form of OpenAI (role, content) or of ShareGPT (from, value)."""
    kinds = {name: type(feature).__name__ for name, feature in rows.features.items()}
    nested = [name for name, kind in kinds.items() if kind in ("List", "LargeList", "list", "Json")]
    if not nested or not len(rows):
        return []
    first = rows.select_columns(nested)[0]  # no other columns: images would be decoded
    found = {n: turns[0].keys() for n, turns in first.items() if turns and isinstance(turns[0], dict)}
    return [name for name, keys in found.items() if {"role", "content"} <= keys or {"from", "value"} <= keys]


def distinct(rows: Dataset, column: str, files: Sequence[Path] = ()) -> list[Any]:
    """The different values of a column.

    Args:
        rows: Rows of a split.
        column: Name of the column.
        files: The files of the split, if it is in files.

    Raises:
        UsageError: If they are lists, dictionaries, or of several kinds, which cannot be compared.
    """
    try:
        return list(rows.unique(column))
    except pyarrow.ArrowNotImplementedError as error:
        raise UsageError(
            f"The column {column!r} has values that are no single words or numbers, or some of each "
            f"({rows.features[column]}): mend the file{named(files)}, or name another column."
        ) from error


def require_text(value: object, column: str, *, blank: bool = False) -> str:
    """Return ``value`` if it is a string and, unless ``blank`` is allowed, more than white space."""
    if not isinstance(value, str) or not (blank or value.strip()):
        advice = "fill it in or remove the row"
        if isinstance(value, (int, float)):
            advice = f'write numbers as texts, such as "{value}" in JSON Lines; a CSV column of numbers has none'
        raise RowError(f"has no text in the column {column!r} but {value!r}: {advice}.")
    return value


def require_texts(values: list[Any], column: str, places: Sequence[Place], *, blank: bool = False) -> list[str]:
    """:func:`require_text` for several rows."""
    return per_row(partial(require_text, column=column, blank=blank), values, places)


def _files_at(path: str, known_splits: Sequence[str], kinds: Kinds) -> dict[str, list[Path]]:
    """Split → files; empty if ``path`` is not a file and not a folder with files named by split."""
    place = local_path(path)
    if place.is_file():
        return {"train": [_of_known_kind(place, kinds)]}
    if place.is_dir():
        return files_named_by_split(place, known_splits, kinds)
    if glob.has_magic(path) and ending(place) in kinds:
        raise UsageError(f"The path {path!r} does not exist: give a pattern of files to a split in data_files.")
    if ending(place) in kinds or means_path(path):
        raise UsageError(f"The path {path!r} does not exist: give an existing file or folder, or a hub id.")
    return {}


def files_named_by_split(folder: Path, known_splits: Sequence[str], kinds: Kinds = TABLES) -> dict[str, list[Path]]:
    """Find the files of each split in a folder; several per split are the parts of a data set of the hub.

    Files named dev, val or valid are the validation split.

    Raises:
        UsageError: If a split has several files that are no such parts.
    """
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        stem, end = split_name(file)
        name = _SHARD.sub("", stem)
        split = name if name in known_splits else SPLITS.get(name, name)
        if end in kinds and split in known_splits:
            files.setdefault(split, []).append(file)
    for split, parts in files.items():
        one_name = len({_SHARD.sub("", part.stem) for part in parts}) == 1
        if len(parts) > 1 and not (one_name and all(_SHARD.search(part.stem) for part in parts)):
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
        ends = [ending(_of_known_kind(part, kinds)) for part in parts]
        if len({_FAMILIES.get(end, end) for end in ends}) > 1:
            raise UsageError(
                f"The files of the split {split!r} must be of one kind; data_files has {list(map(str, parts))}."
            )
        twice = [str(part) for number, part in enumerate(parts) if part in parts[:number]]
        if twice:
            raise UsageError(f"data_files gives the split {split!r} the file {twice[0]} more than once.")
    return files


def _paths_of(given: str | list[str], split: str) -> list[Path]:
    names = given if isinstance(given, (list, tuple)) else [given]
    if not names or not all(isinstance(name, (str, os.PathLike)) for name in names):
        raise UsageError(f"data_files gives each split a file or a list of files; the split {split!r} has {given!r}.")
    found = {name: matching(name) for name in names}
    for name, files in found.items():
        if not files:
            raise UsageError(f"data_files gives the split {split!r} the pattern {str(name)!r}, which no file matches.")
    return [file for name in names for file in found[name]]


def _of_known_kind(file: Path, kinds: Kinds) -> Path:
    if ending(file) not in kinds:
        raise UsageError(
            f"{file} cannot be read: files of rows end in {', '.join(kinds)}, and .gz or .zst if they are compressed."
        )
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
            f"The data set {path!r} could not be loaded ({reason_of(cause)}): "
            f"check path, name and revision; without a network, give a local copy as path."
        ) from error
