"""Rows of JSON files, with one type for each column over all of its rows."""

from __future__ import annotations

import io
import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json
from datasets import Features

from lit_sparse.errors import parse_json

_CHUNK = 10 << 20  # bytes that are parsed at a time
_NULL_ROW = re.compile(rb"^[ \t\r]*null", re.MULTILINE)
_NULL_FIRST = re.compile(rb"\A\s*null")


class JsonRows:
    """JSON Lines, a list of objects, or a single object."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}  # None: no type holds all values

    def learn(self, file: Path) -> None:
        """Widen the types by those of the values in ``file``."""
        _require_no_null_row(file)
        for part in _json_parts(file, None):
            if isinstance(part, pa.Table):
                part.validate(full=True)  # this parser takes bytes that are no UTF-8
                for field in part.schema:
                    self._widen(field.name, _without_times(field.type))
            else:
                for name in dict.fromkeys(name for row in part for name in row):
                    for kind in _types_of([row.get(name) for row in part]):
                        self._widen(name, kind)

    def _widen(self, name: str, new: pa.DataType | None) -> None:
        old = self._types.get(name, pa.null())
        if old is None or new is None:
            self._types[name] = None
            return
        try:
            fields = [pa.schema([(name, kind)]) for kind in (old, new)]
            self._types[name] = pa.unify_schemas(fields, promote_options="permissive").field(0).type
        except (pa.ArrowTypeError, pa.ArrowInvalid):
            self._types[name] = None if pa.types.is_nested(old) or pa.types.is_nested(new) else pa.string()

    def features(self) -> Features:
        """The columns and their types; a column of values that no type holds has Python's objects."""
        if not self._types:
            raise ValueError("it has no rows")
        mixed = [name for name, kind in self._types.items() if kind is None]
        if mixed and not hasattr(datasets, "Json"):  # older versions
            raise ValueError(f"the column {mixed[0]!r} holds values of several types")
        known = {name: kind for name, kind in self._types.items() if kind is not None}
        features = Features.from_arrow_schema(pa.schema(known))
        return Features({name: features.get(name) or datasets.Json() for name in self._types})

    def tables(self, file: Path) -> Iterator[pa.Table]:
        """The rows of ``file`` in parts, with these types."""
        anything = [name for name, kind in self._types.items() if kind is None]
        schema = pa.schema({name: kind or pa.string() for name, kind in self._types.items()})
        for part in _json_objects(file) if anything else _json_parts(file, schema):
            if isinstance(part, pa.Table):
                yield part.select(schema.names).cast(schema)
            else:
                columns = {
                    field.name: _column([row.get(field.name) for row in part], field.type, field.name in anything)
                    for field in schema
                }
                yield pa.table(columns, schema=schema)


def _require_no_null_row(file: Path) -> None:
    """A row that is null ends the process where it is the first of what pyarrow (26) parses at once."""
    if file.stat().st_size == 0:
        return
    pattern = _NULL_ROW if file.suffix == ".jsonl" else _NULL_FIRST
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = pattern.search(content)
        if found is not None:
            line = content[: found.start()].count(b"\n") + 1
            raise ValueError(f"null where a row is wanted, in line {line}")


def _json_parts(file: Path, schema: pa.Schema | None) -> Iterator[pa.Table | list[dict[str, Any]]]:
    """The rows of a JSON file: as tables or, where they do not fit ``schema`` or each other, as Python's objects."""
    if not _has_lines(file):
        yield _document(file)
        return
    for lines, block in _blocks(file):
        try:
            yield pa.json.read_json(
                io.BytesIO(block),
                pa.json.ReadOptions(block_size=len(block)),
                pa.json.ParseOptions(explicit_schema=schema),
            )
        except pa.ArrowInvalid:
            yield _lines(block, lines)


def _json_objects(file: Path) -> Iterator[list[dict[str, Any]]]:
    """The rows of a JSON file as Python's objects."""
    if not _has_lines(file):
        yield _document(file)
    else:
        yield from (_lines(block, lines) for lines, block in _blocks(file))


def _has_lines(file: Path) -> bool:
    """Whether the file has an object on each line, rather than one list or object over several lines."""
    with file.open("rb") as stream:
        first = next((line for line in stream if line.strip(b"\xef\xbb\xbf \t\r\n")), b"{}")
    try:
        return isinstance(parse_json(first.decode("utf-8-sig")), dict)
    except ValueError:
        return False


def _document(file: Path) -> list[dict[str, Any]]:
    content = parse_json(file.read_text(encoding="utf-8-sig"))
    return _objects([content] if isinstance(content, dict) else content)


def _blocks(file: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file, with the number of lines before them."""
    lines = 0
    with file.open("rb") as stream:
        while block := stream.read(_CHUNK) + stream.readline():
            yield lines, block
            lines += block.count(b"\n")


def _lines(block: bytes, before: int) -> list[dict[str, Any]]:
    """The objects in ``block``, one a line; ``before`` lines of the file are before it."""
    rows = []
    for number, line in enumerate(block.decode("utf-8-sig").split("\n"), start=before + 1):
        try:
            rows += [parse_json(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
    return _objects(rows)


def _objects(rows: Any) -> list[dict[str, Any]]:
    if not isinstance(rows, list):
        raise ValueError(f"it holds {str(rows)[:50]!r}, and no objects with columns")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}, counted from 0, is {str(row)[:50]!r}, and no object with columns")
    return rows


def _types_of(values: list[Any]) -> list[pa.DataType | None]:
    """The type that holds all values, or the different types of single values."""
    kind = _type_of(values)
    return [kind.value_type] if kind is not None else list(dict.fromkeys(_type_of(value) for value in values))


def _type_of(value: Any) -> pa.DataType | None:
    """The type of a value; None for lists and objects of values that no type holds."""
    try:
        return pa.array([value]).type
    except OverflowError:  # a number that no type holds
        return None if isinstance(value, (list, dict)) else pa.string()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None


def _column(values: list[Any], kind: pa.DataType, anything: bool) -> pa.Array:
    if anything:
        values = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
    elif pa.types.is_string(kind):
        values = [
            value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in values
        ]
    return pa.array(values, kind)


def _without_times(kind: pa.DataType) -> pa.DataType:
    """``kind`` with text in the place of times: JSON has none, but the parser takes text such as 2020-01-01 for one."""
    if pa.types.is_timestamp(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_without_times(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_times(field.type)) for field in kind])
    return kind
