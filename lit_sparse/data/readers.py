"""What reads a split, and the errors that name its rows."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from datasets import Dataset

from lit_sparse.data.tables import count_rows
from lit_sparse.errors import UsageError

Rows = dict[str, list[Any]]  # several rows, column by column
Value = TypeVar("Value")
Result = TypeVar("Result")


class Kind(NamedTuple):
    """A kind of files.

    Args:
        read: Reads files, one after another, of the split that errors name.
        count: Number of rows of a file.
    """

    read: Callable[[Sequence[Path], str], Dataset]
    count: Callable[[Path], int]


Kinds = Mapping[str, Kind]  # ending of a file → its kind


@dataclass(frozen=True)
class Reader:
    """Reads one split.

    Args:
        read: Gives its rows.
        files: The files that the rows are in, one after another; empty for other sources.
        count: Number of rows of a file.
    """

    read: Callable[[], Dataset]
    files: Sequence[Path] = ()
    count: Callable[[Path], int] = count_rows

    def __call__(self) -> Dataset:
        """Read the rows."""
        return self.read()

    def locate(self, number: int, total: int) -> tuple[Path | None, int]:
        """The file of a row and the row's number in it; no file unless the files have ``total`` rows together."""
        if len(self.files) < 2:
            return (self.files[0] if self.files else None), number
        if self._ends[-1] != total:
            return None, number
        file = bisect_right(self._ends, number)
        return self.files[file], number - (self._ends[file - 1] if file else 0)

    @cached_property
    def _ends(self) -> list[int]:
        """The number of rows up to the end of each file."""
        return list(accumulate(map(self.count, self.files)))


class Place(NamedTuple):
    """A row of a source, which errors name.

    Args:
        split: The row's split.
        number: The row's number in the split, from 0.
        total: The number of rows of the split.
        reader: What reads the split; None: rows that are in no files.
    """

    split: str
    number: int
    total: int = 0
    reader: Reader | None = None

    def __str__(self) -> str:
        # Files are counted here and not before, because few rows are ever named.
        file, number = self.reader.locate(self.number, self.total) if self.reader else (None, self.number)
        where = f" in {file}" if file else ""
        return f"Row {number} (counted from 0{where}) of the split {self.split!r}"


class RowError(UsageError):
    """A row cannot be used. The message says why, and :func:`errors_in` puts the row before it."""


@contextmanager
def errors_in(place: Place | str) -> Iterator[None]:
    """Put a row, or a part of one, before the errors about it."""
    try:
        yield
    except RowError as error:
        raise RowError(f"{place} {error}") from error


def per_row(use: Callable[[Value], Result], values: Iterable[Value], places: Sequence[Place | str]) -> list[Result]:
    """Apply a function to a value of each row, such as its cell in a column; errors name the row."""
    found = []
    for value, place in zip(values, places, strict=True):
        with errors_in(place):
            found.append(use(value))
    return found


def single_rows(rows: Rows) -> list[dict[str, Any]]:
    """Rows one by one, each as its values by column."""
    return [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
