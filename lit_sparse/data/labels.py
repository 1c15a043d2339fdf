"""Classes of rows: their names, the number of each value, and any number of them per row, in lists or columns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset, LargeList, List

from lit_sparse.data.readers import Place, Reader, RowError, errors_in
from lit_sparse.data.sources import distinct, require_columns
from lit_sparse.errors import UsageError, parse_json

_HIDDEN = -1  # stands where a benchmark keeps the labels of its test split to itself
_SHOWN = 20  # labels in a message
_ZEROS, _ONES = (0, "0"), (1, "1")  # texts: in a CSV one cell that is no number makes the whole column texts


@dataclass(frozen=True)
class Classes:
    """The classes of a column.

    Args:
        names: Names in the order of the classes' numbers.
        numbers: Value that may stand in the column → number of its class.
    """

    names: list[str]
    numbers: dict[Any, int]

    def number_of(self, value: Any, column: str) -> int:
        """The number of one value."""
        if value in self.numbers:
            return self.numbers[value]
        # A column may hold numbers in one file and texts in another, where some label is no number.
        for known, number in self.numbers.items():
            if str(known) == str(value):
                return number
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        raise RowError(
            f"has the label {value!r} in the column {column!r}, which is none of the labels {self.names[:_SHOWN]}"
            f"{more}: mend the row, or give all names in labels."
        )

    def recipe(self) -> list[Any]:
        """The numbers, as JSON."""
        return [[repr(value), number] for value, number in self.numbers.items()]

    def is_labelled(self, rows: Dataset, role: str, column: str) -> bool:
        """Whether batches hold labels: not in prediction, nor where a benchmark hides all labels of a test split."""
        if role != "test" or column not in rows.column_names or _HIDDEN in self.numbers:
            return role != "predict"
        return distinct(rows, column) != [_HIDDEN]


def learn_classes(
    readers: dict[str, Reader],
    column: str,
    names: list[str] | None,
    source: str,
    *,
    of_lists: bool = False,
    numbers_need_names: bool = False,
    hint: str = "",
) -> Classes:
    """Find out which classes there are.

    Args:
        readers: Split → how to read it.
        column: Column of the labels.
        names: Names of the classes in the order of their numbers; None takes those that the column itself names,
            otherwise the sorted distinct values of the training split.
        source: Where the rows are, for errors.
        of_lists: Whether a row has a list of labels instead of one.
        numbers_need_names: Whether numbers in the column are refused without ``names``.
        hint: A sentence for errors: what the column may hold instead of classes.

    Raises:
        UsageError: If there are fewer than two classes, or no training rows to learn them from.
    """
    names = names or _names_in_features(readers, column)
    if names is None:
        values = _training_labels(readers, column, source, of_lists)
        _require_classes(values, column, readers["train"], numbers_need_names, hint)
        values = [int(value) if isinstance(value, float) else value for value in values]
        values = sorted(values, key=lambda value: (isinstance(value, str), value))  # lists may hold both kinds
        names, numbers = [str(value) for value in values], {value: i for i, value in enumerate(values)}
    else:
        numbers = {**{i: i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(
            f"Classification needs at least two different labels, but the column {column!r} or labels has {names}: "
            f"give rows of other classes.{hint}"
        )
    return Classes(names, numbers)


def _names_in_features(readers: dict[str, Reader], column: str) -> list[str] | None:
    split = "train" if "train" in readers else next(iter(readers))
    feature = readers[split]().features.get(column)
    feature = getattr(feature, "feature", feature)  # that of the items of a list
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _training_labels(readers: dict[str, Reader], column: str, source: str, of_lists: bool) -> list[Any]:
    """Distinct labels of the training split; where one is missing, the lookup will name the row."""
    if "train" not in readers:
        raise UsageError(
            f"{source} has no training split to learn the labels from: give their names in labels, in the order "
            f"that the model was trained with."
        )
    rows = readers["train"]()
    require_columns(rows, "train", [column], readers["train"].files)
    values = (
        _distinct_in_lists(rows, column, readers["train"])
        if of_lists
        else distinct(rows, column, readers["train"].files)
    )
    return [value for value in values if value is not None and value == value]


def _distinct_in_lists(rows: Dataset, column: str, reader: Reader) -> list[Any]:
    """The different labels in a column of lists."""
    found: dict[Any, None] = {}
    values = (value for part in rows.select_columns([column]).iter(1000) for value in part[column])
    for number, value in enumerate(values):
        if value is not None:  # it is named when the row is encoded
            with errors_in(Place("train", number, len(rows), reader)):
                found.update(dict.fromkeys(labels_in(value, column)))
    return list(found)


def labels_in(value: Any, column: str) -> list[str | int | float]:
    """The labels in a cell of a column of lists.

    Raises:
        RowError: If it holds no list of labels.
    """
    labels = list_in(value)
    if labels is None or not all(isinstance(x, (str, int, float)) and not isinstance(x, bool) for x in labels):
        raise RowError(
            f"has {value!r} in the column {column!r}, where other rows have a list of labels: mend the row. An empty "
            'list says that no label applies, and a list in a text is JSON, such as ["a", "b"].'
        )
    return labels


def list_in(value: Any) -> list[Any] | None:
    """The list that is the value of a cell, or the list that is its text in JSON, as in a CSV; None for others."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = parse_json(value)
        except ValueError:
            return None
    return value if isinstance(value, list) else None


def holds_lists(readers: dict[str, Reader], column: str) -> bool | None:
    """Whether a column holds lists, also as JSON in texts, as in a CSV; None if no split has the column.

    The first split that has it decides, and the training split before others.
    """
    for split in sorted(readers, key=lambda split: split != "train"):
        rows = readers[split]()
        feature = rows.features.get(column)
        if feature is None:
            continue
        if isinstance(feature, (List, LargeList)) or type(feature).__name__ == "Json":  # older versions have no Json
            return True
        texts = distinct(rows, column) if getattr(feature, "dtype", None) == "string" else []
        given = [text.strip() for text in texts if text is not None]
        return bool(given) and all(text.startswith("[") and text.endswith("]") for text in given)
    return None


def vector_of_list(value: Any, column: str, classes: Classes) -> list[float]:
    """As many numbers as there are classes: 1 for those in the list of a cell, 0 for the others.

    Raises:
        RowError: If there is no list, or it has a label that is none of the classes, or one of them twice.
    """
    labels = labels_in(value, column)
    numbers = [classes.number_of(label, column) for label in labels]
    if len(set(numbers)) < len(numbers):
        raise RowError(
            f"has a label twice in the column {column!r}, {labels}: mend the row. Zeros and ones are read from "
            "columns, one for each label, which label lists."
        )
    return [float(number in numbers) for number in range(len(classes.names))]


def vector_of_columns(row: Mapping[str, Any], columns: Sequence[str]) -> list[float]:
    """The zeros and ones in the columns of a row.

    Raises:
        RowError: If a cell is neither.
    """
    for column in columns:
        if row[column] not in (*_ZEROS, *_ONES):
            raise RowError(f"has {row[column]!r} in the column {column!r}, which must be 0 or 1: mend the row.")
    return [float(row[column] in _ONES) for column in columns]


def _require_classes(values: list[Any], column: str, reader: Reader, numbers_need_names: bool, hint: str) -> None:
    numbers = [value for value in values if not isinstance(value, str)]
    if numbers_need_names and numbers:
        raise UsageError(
            f"{_place_of(numbers[0], column, reader)} holds {numbers[0]!r} in the column {column!r} and nothing says "
            "what it stands for: give the names in labels, in the order of their ids."
        )
    fractions = [value for value in numbers if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise UsageError(
            f"{_place_of(fractions[0], column, reader)} holds {fractions[0]} in the column {column!r}: such numbers "
            f"are no classes. Name the column of the classes in label.{hint}"
        )


def _place_of(label: Any, column: str, reader: Reader) -> Place:
    """The first training row with this label."""
    rows = reader()
    values = (value for part in rows.select_columns([column]).iter(1000) for value in part[column])
    number = next(number for number, value in enumerate(values) if label == value or label in (list_in(value) or []))
    return Place("train", number, len(rows), reader)
