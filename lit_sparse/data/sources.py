"""Where rows come from: local files, folders and the hub, with errors that name what is wrong."""

import mmap
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError

from lit_sparse.errors import UsageError

Reader = Callable[[], Dataset]  # reads one split

# Ending of a file -> the loader in `datasets` and its options. Left alone, the csv loader takes words such
# as "None", "NA" and "null" for missing values; they are words that a text may consist of.
_LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False, "na_values": [""]}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_NULL_ROW = re.compile(rb"^[ \t\r]*null", re.MULTILINE)
_NULL_FIRST = re.compile(rb"\A\s*null")
_SHARD = re.compile(r"-\d{5}-of-\d{5}.*$")  # how the hub names the parts of a split


def open_source(
    path: str | None,
    name: str | None,
    revision: str | None,
    data_files: dict[str, str] | None,
    known_splits: Sequence[str],
) -> dict[str, Reader]:
    """Say for each split that a source has how to read it.

    Args:
        path: Hub id, folder or file; see ``TextData``.
        name: Configuration on the hub.
        revision: Branch, tag or commit on the hub.
        data_files: Split → file.
        known_splits: Names of splits to look for in a folder and to accept in ``data_files``.

    Returns:
        Split → function that reads it. Local files are not read before that; a hub data set is loaded whole.

    Raises:
        UsageError: If a file or folder is missing or of an unknown kind, the hub cannot be reached, or the
            arguments contradict each other.
    """
    if (path is None) == (data_files is None):
        found = "neither" if path is None else "both"
        raise UsageError(f"Give either path (hub id, folder or file) or data_files (split → file); got {found}.")
    files = _files_at(path, known_splits) if path is not None else _listed_files(data_files or {}, known_splits)
    if not files:
        loaded = _load_dataset_of_hub_form(str(path), name, revision)
        return {split: partial(loaded.__getitem__, split) for split in loaded}
    if name or revision:
        raise UsageError(
            f"name and revision choose within a data set of the hub, but {path or 'data_files'} names local "
            f"files: leave out name={name!r} and revision={revision!r}."
        )
    return {split: partial(read_files, parts, split) for split, parts in files.items()}


def read_files(files: Sequence[Path], split: str) -> Dataset:
    """Read the files of one split, all of one kind.

    Raises:
        UsageError: If they hold nothing that can be read.
    """
    loader, options = _LOADERS[files[0].suffix]
    names = [str(file) for file in files]
    if loader == "json":
        _require_no_null_row(files, split)
    try:
        rows: Dataset = load_dataset(loader, data_files={split: names}, split=split, **options)
        if loader == "json":
            rows.data.table.validate(full=True)  # bytes that are no UTF-8 pass that reader, and no other
        return rows
    except (DatasetsError, OSError, ValueError, StopIteration) as error:  # StopIteration: a json without rows
        raise UsageError(
            f"The split {split!r} is empty or cannot be read as {loader} from {', '.join(names)} "
            f"({_one_line(error)}): mend the file."
        ) from error


def _require_no_null_row(files: Sequence[Path], split: str) -> None:
    """A row that is null ends the process where it is the first of what pyarrow (26) parses at once."""
    for file in files:
        pattern = _NULL_ROW if file.suffix == ".jsonl" else _NULL_FIRST
        if not file.is_file() or file.stat().st_size == 0:
            continue
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = pattern.search(content)
            if found is not None:
                line = content[: found.start()].count(b"\n") + 1
                raise UsageError(
                    f"The split {split!r} has null where a row is wanted, in line {line} of {file}: mend the file."
                )


def require_columns(rows: Dataset, split: str, columns: Sequence[str]) -> None:
    """Raise a UsageError that lists the columns of ``rows`` unless all of ``columns`` are among them."""
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise UsageError(
            f"The split {split!r} has no column {', '.join(map(repr, missing))}; its columns are {rows.column_names}."
        )


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


def require_text(value: object, column: str, split: str, number: int, *, blank: bool) -> str:
    """Return ``value`` if it is a string and, unless ``blank`` is allowed, more than white space."""
    if not isinstance(value, str) or not (blank or value.strip()):
        raise UsageError(
            f"Row {number} (counted from 0) of the split {split!r} has no text in the column {column!r} but "
            f"{value!r}: fill it in or remove the row."
        )
    return value


def _files_at(path: str, known_splits: Sequence[str]) -> dict[str, list[Path]]:
    """Split → files; empty if ``path`` is not a file and not a folder with files named by split."""
    place = Path(path).expanduser()
    if place.is_file():
        return {"train": [_of_known_kind(place)]}
    if place.is_dir():
        return _files_named_by_split(place, known_splits)
    if place.suffix in _LOADERS or path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise UsageError(f"The path {path!r} does not exist: give an existing file or folder, or a hub id.")
    return {}


def _files_named_by_split(folder: Path, known_splits: Sequence[str]) -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        split = _SHARD.sub("", file.stem)
        if file.suffix in _LOADERS and split in known_splits:
            files.setdefault(split, []).append(file)
    for split, parts in files.items():
        if len(parts) > 1 and not all(_SHARD.search(part.stem) for part in parts):
            raise UsageError(
                f"The split {split!r} must be one file, but {folder} has {[part.name for part in parts]}: remove "
                f"all but one, or name one in data_files."
            )
    return files


def _listed_files(data_files: dict[str, str], known_splits: Sequence[str]) -> dict[str, list[Path]]:
    if not data_files or not set(data_files) <= set(known_splits):
        raise UsageError(f"data_files gives files to some of {list(known_splits)}; got {data_files}.")
    files = {split: Path(file).expanduser() for split, file in data_files.items()}
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise UsageError(f"data_files names files that do not exist: {', '.join(missing)}.")
    return {split: [_of_known_kind(file)] for split, file in files.items()}


def _of_known_kind(file: Path) -> Path:
    if file.suffix not in _LOADERS:
        raise UsageError(f"{file} is none of the kinds that can be read, which are {', '.join(_LOADERS)}.")
    return file


def _load_dataset_of_hub_form(path: str, name: str | None, revision: str | None) -> DatasetDict:
    try:
        return load_dataset(path, name, revision=revision)
    except (DatasetsError, OSError, ValueError) as error:
        raise UsageError(
            f"The data set {path!r} could not be loaded ({_one_line(error)}): check path, name and revision; "
            f"without a network, give a local copy as path."
        ) from error


def _one_line(error: Exception) -> str:
    cause = error.__cause__ if isinstance(error, DatasetsError) and error.__cause__ else error
    return " ".join(str(cause).split()) or type(cause).__name__
