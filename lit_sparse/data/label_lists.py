"""Any number of labels per row: a column of lists, or a column of zeros and ones for each label."""

from collections.abc import Sequence
from typing import Any

from datasets import LargeList, List

from lit_sparse.data.labels import Classes, labels_in
from lit_sparse.data.sources import Place, Reader, distinct
from lit_sparse.errors import UsageError

_ZEROS, _ONES = (0, "0"), (1, "1")  # texts: in a CSV one cell that is no number makes the whole column texts


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


def vectors_of_lists(
    values: Sequence[Any], column: str, classes: Classes, places: Sequence[Place]
) -> list[list[float]]:
    """For each row as many numbers as there are classes: 1 for those in its list, 0 for the others.

    Raises:
        UsageError: If a row has no list, a label that is none of the classes, or one of them twice.
    """
    vectors = []
    for value, place in zip(values, places, strict=True):
        labels = labels_in(value, column, place)
        numbers = [classes.number_of(label, column, place) for label in labels]
        if len(set(numbers)) < len(numbers):
            raise UsageError(
                f"{place} has a label twice in the column {column!r}, {labels}: mend the row. Zeros and ones are read "
                "from columns, one for each label, which label lists."
            )
        vectors.append([float(number in numbers) for number in range(len(classes.names))])
    return vectors


def vectors_of_columns(rows: dict[str, list[Any]], columns: list[str], places: Sequence[Place]) -> list[list[float]]:
    """For each row the zeros and ones in its columns.

    Raises:
        UsageError: If a cell is neither.
    """
    for column in columns:
        for value, place in zip(rows[column], places, strict=True):
            if value not in (*_ZEROS, *_ONES):
                raise UsageError(f"{place} has {value!r} in the column {column!r}, which must be 0 or 1: mend the row.")
    return [[float(rows[column][i] in _ONES) for column in columns] for i in range(len(places))]
