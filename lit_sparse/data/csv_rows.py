"""Rows of CSV and TSV files, as the texts that stand in their cells."""

import csv
import io
from collections.abc import Iterator, Sequence
from itertools import count, islice
from pathlib import Path

import pyarrow as pa

from lit_sparse.data.files import ending, not_utf8, open_bytes

_CHUNK_ROWS = 1_000  # rows that become a table at a time
_LONGEST = 2**31 - 1  # characters of a cell; Python's own limit of 131,072 is less than a document


def texts_of(file: Path) -> Iterator[pa.Table]:
    """The cells of a file as they are written; only empty ones are missing: "None", "NA" and "null" are words too.

    Cells are quoted as in RFC 4180, in .tsv as well. Blank lines are skipped.

    Raises:
        ValueError: If a row has more or fewer cells than the header, or is not quoted right; rows are counted from 0.
    """
    # A limit of the whole process, which is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))
    # Bytes that are not UTF-8 are kept, so that the message can name their row.
    with io.TextIOWrapper(open_bytes(file), "utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter="\t" if ending(file) == ".tsv" else ",", strict=True)
        try:
            names = _names(next(filter(None, rows), []))
        except csv.Error as error:
            raise ValueError(f"its header: {error}") from error
        checked = _checked(rows, names)
        for first in count(0, _CHUNK_ROWS):
            part = list(islice(checked, _CHUNK_ROWS))
            if not part:
                return
            columns = [[cell or None for cell in column] for column in zip(*part, strict=True)]
            yield _table(names, columns, first)


def other_delimiter(names: Sequence[str]) -> str:
    """A clause for errors if the names of all columns stand in one cell, such as ``text;label``; else empty."""
    (header, *others) = names or [""]
    found = next((mark for mark in ";,\t|" if mark in header), None)
    if others or found is None:
        return ""
    advice = "separate cells by ',' in .csv files and by tabs in .tsv files"
    return f"; the header {header!r} seems to be separated by {found!r}: {advice}"


def _names(header: list[str]) -> list[str]:
    if not header:
        raise ValueError("it is empty")
    names = [name or f"Unnamed: {number}" for number, name in enumerate(header)]  # as in pandas
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"its header names the column {name!r} twice")
        _require_utf8(name, "its header")
    return names


def _checked(rows: Iterator[list[str]], names: list[str]) -> Iterator[list[str]]:
    number, width = 0, len(names)
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(
                f"row {number}, counted from 0: {error}; put a text with quotes in quotes, and double each quote in it"
            ) from error
        if row is None:
            return
        if not row or (width > 1 and len(row) == 1 and not row[0].strip()):
            continue
        if len(row) != width:
            found = f"row {number}, counted from 0, has {len(row)} instead of {width} cells"
            raise ValueError(f"{found}{other_delimiter(names)}")
        yield row
        number += 1


def _table(names: list[str], columns: list[list[str | None]], first: int) -> pa.Table:
    try:
        return pa.table([pa.array(column, pa.string()) for column in columns], names)
    except UnicodeEncodeError:
        for name, column in zip(names, columns, strict=True):
            for number, cell in enumerate(column, start=first):
                _require_utf8(cell or "", f"row {number}, counted from 0, in the column {name!r}")
        raise


def _require_utf8(cell: str, place: str) -> None:
    try:
        cell.encode("utf-8", "surrogateescape").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} {not_utf8(error)}") from error
