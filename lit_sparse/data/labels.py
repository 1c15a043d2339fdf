"""The classes of a column of labels: their names, and the number of each value."""

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from lit_sparse.data.sources import Place, Reader, distinct, require_columns
from lit_sparse.errors import UsageError

_HIDDEN = -1  # stands where a benchmark keeps the labels of its test split to itself
_SHOWN = 20  # labels in a message


@dataclass(frozen=True)
class Classes:
    """The classes of a column.

    Args:
        names: Names in the order of the classes' numbers.
        numbers: Value that may stand in the column → number of its class.
    """

    names: list[str]
    numbers: dict[Any, int]

    def number_of(self, value: Any, column: str, place: Place | str) -> int:
        """The number of one value; ``place`` names its row in the error."""
        if value in self.numbers:
            return self.numbers[value]
        # A column may hold numbers in one file and texts in another, where some label is no number.
        for known, number in self.numbers.items():
            if str(known) == str(value):
                return number
        more = f" and {len(self.names) - _SHOWN} more" if len(self.names) > _SHOWN else ""
        raise UsageError(
            f"{place} has the label {value!r} in the column {column!r}, which is none of the labels "
            f"{self.names[:_SHOWN]}{more}: mend the row, or give all names in labels."
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
    hint: str = "",
) -> Classes:
    """Find out which classes there are.

    Args:
        readers: Split → how to read it.
        column: Column of the labels.
        names: Names of the classes in the order of their numbers; None takes those that the column itself names,
            otherwise the sorted distinct values of the training split.
        source: Where the rows are, for errors.
        of_lists: Whether a row has a list of labels instead of one; then only names can be learned, no numbers.
        hint: A sentence for errors: what the column may hold instead of classes.

    Raises:
        UsageError: If there are fewer than two classes, or no training rows to learn them from.
    """
    names = names or _names_in_features(readers, column)
    if names is None:
        values = _training_labels(readers, column, source, of_lists)
        _require_classes(values, column, of_lists, hint)
        values = sorted(int(value) if isinstance(value, float) else value for value in values)
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
    require_columns(rows, "train", [column])
    if of_lists:
        lists = [labels if isinstance(labels, list) else [labels] for labels in rows[column]]
        values = list({label for labels in lists for label in labels})
    else:
        values = distinct(rows, column)
    return [value for value in values if value is not None and value == value]


def _require_classes(values: list[Any], column: str, of_lists: bool, hint: str) -> None:
    numbers = [value for value in values if not isinstance(value, str)]
    if of_lists and numbers:
        raise UsageError(
            f"The column {column!r} of the split 'train' holds {numbers[0]!r} and nothing says what it stands for: "
            "give the names in labels, in the order of their ids."
        )
    fractions = [value for value in numbers if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise UsageError(
            f"The column {column!r} of the split 'train' holds numbers such as {fractions[0]}, which are no classes: "
            f"name the column of the classes in label.{hint}"
        )
