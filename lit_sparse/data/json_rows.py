"""Rows of JSON files, with one type for each column over all of its rows."""

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features

from lit_sparse.data.files import not_utf8, open_bytes
from lit_sparse.errors import parse_json

_CHUNK_ROWS = 1_000  # rows that become a table at a time


class JsonRows:
    """JSON Lines, a list of objects, or a single object."""

    def __init__(self) -> None:
        self._types: dict[str, pa.DataType | None] = {}  # None: no type holds all values

    def learn(self, file: Path) -> None:
        """Widen the types by those of the values in ``file``."""
        for part, rows in enumerate(_parts(file)):
            for name in dict.fromkeys(name for row in rows for name in row):
                values = [row.get(name) for row in rows]
                try:
                    kinds = _types_of(values)
                except UnicodeEncodeError as error:
                    number = part * _CHUNK_ROWS + next(i for i, value in enumerate(values) if not _is_text(value))
                    raise ValueError(
                        f"row {number}, counted from 0, has half of a surrogate pair in the column {name!r}"
                    ) from error
                for kind in kinds:
                    self._widen(name, kind)

    def _widen(self, name: str, new: pa.DataType | None) -> None:
        old = self._types.get(name, pa.null())
        if old is None or new is None or _holds_objects(new):
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
        for rows in _parts(file):
            yield pa.table({name: _column([row.get(name) for row in rows], kind) for name, kind in self._types.items()})

    def count(self, file: Path) -> int:
        """The number of rows of ``file``."""
        return sum(map(len, _parts(file)))


def _parts(file: Path) -> Iterator[list[dict[str, Any]]]:
    """The objects of a file."""
    with open_bytes(file) as stream:
        first = next(filter(bytes.strip, stream), b"{}")
    rows = _lines(file) if _is_object(first) else _document(file)
    while part := list(islice(rows, _CHUNK_ROWS)):
        yield part


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(parse_json(line.decode()), dict)
    except UnicodeDecodeError:
        return True  # reading lines will name this one
    except ValueError:  # an object or a list over several lines
        return False


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    with open_bytes(file) as stream:
        for number, content in enumerate(stream, start=1):
            try:
                line = content.decode()
                row = parse_json(line.rstrip("\n")) if line.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number} {not_utf8(error)}") from error
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
            if isinstance(row, dict):
                yield row
            elif line.strip():
                raise ValueError(f"line {number} is {line.strip()[:50]!r}, and no object with columns")


def _document(file: Path) -> Iterator[dict[str, Any]]:
    with open_bytes(file) as stream:
        text = stream.read()
    try:
        content = parse_json(text.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"line {text.count(bytes([10]), 0, error.start) + 1} {not_utf8(error)}") from error
    rows = [content] if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f"it holds {str(rows)[:50]!r}, and no objects with columns")
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}, counted from 0, is {str(row)[:50]!r}, and no object with columns")
        yield row


def _types_of(values: list[Any]) -> list[pa.DataType | None]:
    """The type that holds all values, or the different types of single values."""
    kind = _type_of(values)
    return [kind.value_type] if kind is not None else list(dict.fromkeys(map(_type_of, values)))


def _holds_objects(kind: pa.DataType) -> bool:
    """Whether a type is of lists of objects, which `datasets` can store as JSON instead.

    A type of objects has the keys of all of them, in one order, and turns 1 into 1.0 where another object has 2.5.
    Turns of a conversation and schemas of tools must stay as they were written.
    """
    return pa.types.is_list(kind) and pa.types.is_struct(kind.value_type) and hasattr(datasets, "Json")


def _type_of(value: Any) -> pa.DataType | None:
    """The type of a value; None for lists and objects of values that no type holds."""
    try:
        return pa.array([value]).type
    except OverflowError:  # a number that no type holds
        return None if isinstance(value, (list, dict)) else pa.string()
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError):
        return None


def _column(values: list[Any], kind: pa.DataType | None) -> pa.Array:
    """The values as an array; as JSON where no type holds them, and in a column of texts what is no text."""
    if kind is None or pa.types.is_string(kind):
        values = [
            value if value is None or (kind is not None and isinstance(value, str)) else _json(value)
            for value in values
        ]
    return pa.array(values, kind or pa.string())


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _is_text(value: Any) -> bool:
    """Whether UTF-8 can hold a value: JSON can spell half of a surrogate pair."""
    try:
        return bool(_json(value).encode())
    except UnicodeEncodeError:
        return False
