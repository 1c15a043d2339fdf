"""Read the rows of local files, with one type for each column over all of its rows."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset, Features
from datasets.arrow_writer import ArrowWriter

from lit_sparse._version import __version__
from lit_sparse.data.csv_rows import texts_of
from lit_sparse.data.files import ending
from lit_sparse.data.json_rows import JsonRows
from lit_sparse.errors import UsageError, reason_of

_CHUNK_ROWS = 1_000  # rows of parquet that are read at a time

# Numbers as a program writes them. Other text, such as 007, +5 or an id of 19 digits, would not come back as it was.
_NUMBERS = {
    pa.int64(): r"\A(0|-?[1-9][0-9]{0,17})\z",
    pa.float64(): r"\A-?((0|[1-9][0-9]{0,14})(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?\z",
}


def fingerprint(made_of: list[Any]) -> str:
    """A name for the cache of `datasets`, which depends on ``made_of`` alone.

    Args:
        made_of: Everything that decides what is cached; must be JSON.
    """
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32]


def read_files(files: Sequence[Path], split: str) -> Dataset:
    """Read the files of one split, all of one kind, one after another.

    They are read into the cache of `datasets`, once for each state of the files. A column has the type that holds all
    of its values, wherever they stand: numbers are fractions if one of them is, and text if one value is text.

    Args:
        files: Files that end in one of ``ENDINGS``, and in .gz or .zst if they are compressed.
        split: Name of the split, for errors.

    Raises:
        UsageError: If a file cannot be read or holds no rows.
    """
    try:
        states = [[str(file.absolute()), (stat := file.stat()).st_mtime_ns, stat.st_size] for file in files]
    except OSError as error:
        raise UsageError(f"The files of the split {split!r} cannot be read: {error}.") from error
    digest = fingerprint([states, __version__])
    cached = Path(datasets.config.HF_DATASETS_CACHE) / "lit_sparse" / f"{digest}.arrow"
    if not cached.is_file():
        kind = _learn(files, split)
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Another name until it is complete: several processes may read the same files at once.
        with tempfile.TemporaryDirectory(dir=cached.parent, prefix=digest) as folder:
            unfinished = Path(folder) / "rows.arrow"
            with ArrowWriter(features=kind.features(), path=str(unfinished)) as writer:
                for table in (table for file in files for table in _tables(kind, file, split)):
                    writer.write_table(table)
                writer.finalize()
            unfinished.replace(cached)
    rows: Dataset = Dataset.from_file(str(cached))
    rows._fingerprint = digest
    return rows


def count_rows(file: Path) -> int:
    """The number of rows of a file that :func:`read_files` can read."""
    return _KINDS[ending(file)]().count(file)


def _learn(files: Sequence[Path], split: str) -> _Kind:
    kind = _KINDS[ending(files[0])]()
    for file in files:
        with _named(file, split):
            kind.learn(file)
    with _named(files[0], split):  # some of several files may have no rows
        if any("\0" in name for name in kind.features()):
            raise ValueError("the name of a column holds a NUL byte")
    return kind


def _tables(kind: _Kind, file: Path, split: str) -> Iterator[pa.Table]:
    tables = kind.tables(file)
    while True:
        with _named(file, split):
            table = next(tables, None)
        if table is None:
            return
        yield table


@contextmanager
def _named(file: Path, split: str) -> Iterator[None]:
    """Name the file in errors of reading it."""
    try:
        yield
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = reason_of(error)
        kind = "json" if "json" in ending(file) else ending(file)[1:]
        raise UsageError(
            f"The split {split!r} is empty or cannot be read as {kind} from {file} ({reason}): mend the file."
        ) from error


class _Kind(Protocol):
    """Reads all files once to learn the types of their columns, and again to read the rows with these types."""

    def learn(self, file: Path) -> None: ...
    def features(self) -> Features: ...
    def tables(self, file: Path) -> Iterator[pa.Table]: ...
    def count(self, file: Path) -> int: ...


class _Csv:
    def __init__(self) -> None:
        self._possible: dict[str, list[pa.DataType]] = {}  # column -> the types of number that all values have
        self._rows = 0

    def learn(self, file: Path) -> None:
        for texts in texts_of(file):
            self._rows += len(texts)
            for name, column in zip(texts.column_names, texts.columns, strict=True):
                possible = self._possible.setdefault(name, list(_NUMBERS))
                # None: all cells are missing.
                while possible and pc.all(pc.match_substring_regex(column, _NUMBERS[possible[0]])).as_py() is False:
                    possible.pop(0)

    def features(self) -> Features:
        if not self._rows:
            raise ValueError("it has no rows")
        return Features.from_arrow_schema(self._schema())

    def _schema(self) -> pa.Schema:
        return pa.schema({name: [*possible, pa.string()][0] for name, possible in self._possible.items()})

    def tables(self, file: Path) -> Iterator[pa.Table]:
        for texts in texts_of(file):
            missing = [name for name in self._possible if name not in texts.column_names]
            if missing:
                raise ValueError(f"it lacks the column {missing[0]!r}, which another file of the split has")
            yield texts.select(list(self._possible)).cast(self._schema())

    def count(self, file: Path) -> int:
        return sum(map(len, texts_of(file)))


class _Parquet:
    def __init__(self) -> None:
        self._schemas: list[pa.Schema] = []
        self._rows = 0

    def learn(self, file: Path) -> None:
        self._rows += self.count(file)
        self._schemas.append(pq.read_schema(file))

    def features(self) -> Features:
        if not self._rows:
            raise ValueError("it has no rows")
        return Features.from_arrow_schema(pa.unify_schemas(self._schemas, promote_options="permissive"))

    def tables(self, file: Path) -> Iterator[pa.Table]:
        with pq.ParquetFile(file) as opened:
            for batch in opened.iter_batches(_CHUNK_ROWS):
                yield pa.Table.from_batches([batch])

    def count(self, file: Path) -> int:
        return int(pq.read_metadata(file).num_rows)


_KINDS: dict[str, Callable[[], _Kind]] = {
    **dict.fromkeys((".csv", ".tsv"), _Csv),
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), JsonRows),
    ".parquet": _Parquet,
}
ENDINGS = tuple(_KINDS)
