"""The classes of a column of labels: their names, and the number of each value."""

from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Dataset

from lit_sparse.data.sources import Reader, distinct, require_columns
from lit_sparse.errors import UsageError

HIDDEN = -1  # what benchmarks write where they keep the labels of a test split to themselves


_SHOWN = 20  # labels in a message


@dataclass(frozen=True)
class Classes:
    """Names of the classes in the order of their numbers, and the number of all that may stand in the column."""

    names: list[str]
    numbers: dict[Any, int]

    def number_of(self, value: Any, column: str, origin: str) -> int:
        """The number of one value; ``origin`` names its row in the error."""
        # A column may be of numbers in one file and of text in another, where the same labels are among others.
        for known in (value, *(key for key in self.numbers if str(key) == str(value))):
            if known in self.numbers:
                return self.numbers[known]
        known = list(self.numbers)
        more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
        raise UsageError(
            f"{origin} has the label {value!r} in the column {column!r}, which is none of the labels "
            f"{known[:_SHOWN]}{more}: mend the row, or give all names in labels."
        )


def learn_classes(
    readers: dict[str, Reader], column: str, names: list[str] | None, source: str, hint: str = ""
) -> Classes:
    """Find out which classes there are.

    Args:
        readers: Split → how to read it.
        column: Column of the labels.
        names: Names of the classes in the order of their numbers; None takes those that the column itself names,
            otherwise the sorted distinct values of the training split.
        source: Where the rows are, for errors.
        hint: What else than classes the column may be meant to hold, a sentence for errors.

    Raises:
        UsageError: If there are fewer than two classes, or no training rows to learn them from.
    """
    names = names or _names_in_features(readers, column)
    if names is None:
        values = _distinct_values(readers, column, source, hint)
        names, numbers = [str(value) for value in values], {value: i for i, value in enumerate(values)}
    else:
        numbers = {**{i: i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(
            f"Classification needs at least two different labels, but the column {column!r} or labels has {names}: "
            f"give rows of other classes.{hint}"
        )
    return Classes(names, numbers)


def has_labels(rows: Dataset, column: str) -> bool:
    """Whether not all labels are hidden, as benchmarks hide those of test splits."""
    return column not in rows.column_names or bool(distinct(rows, column) != [HIDDEN])


def _names_in_features(readers: dict[str, Reader], column: str) -> list[str] | None:
    split = "train" if "train" in readers else next(iter(readers))
    feature = readers[split]().features.get(column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _distinct_values(readers: dict[str, Reader], column: str, source: str, hint: str) -> list[Any]:
    """Sorted labels of the training split; where one is missing, the lookup will name the row."""
    if "train" not in readers:
        raise UsageError(
            f"{source} has no training split to learn the labels from: give their names in labels, in the order "
            f"that the model was trained with."
        )
    rows = readers["train"]()
    require_columns(rows, "train", [column])
    values = [value for value in distinct(rows, column) if value is not None and value == value]
    fractions = [value for value in values if isinstance(value, float) and not value.is_integer()]
    if fractions:
        raise UsageError(
            f"The column {column!r} of the split 'train' holds numbers such as {fractions[0]}, which are no classes: "
            f"name the column of the classes in label.{hint}"
        )
    return sorted(int(value) if isinstance(value, float) else value for value in values)
