"""One text or a pair of texts per row, with a class or a number to predict."""

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from lit_sparse.data.labels import Classes, learn_classes
from lit_sparse.data.rows import Rows
from lit_sparse.data.sources import Place, Reader, require_texts
from lit_sparse.data.text import TextData
from lit_sparse.errors import UsageError


@dataclass(kw_only=True, eq=False, repr=False)
class TextClassificationData(TextData):
    """Texts or pairs of texts with a label each, from files or from the hub.

    Batches hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, and
    ``labels``: class ids (long) or, for regression, numbers (float). Test splits whose labels are all
    hidden (-1), as in many benchmarks, give batches without labels; so does prediction.

    Args:
        text: Column of the text.
        text_pair: Column of the second text of a pair; None where rows have one text.
        label: Column of the label.
        labels: Names of the classes in the order of their ids; the column may hold names or ids. None takes the names
            that the source gives, or else the sorted distinct values of the training split.
        regression: Whether labels are numbers to predict instead of classes.
        metrics: Names of the metrics to report: accuracy, f1 and matthews; for regression pearson and spearman. None
            leaves the choice to the model.
        max_length: Longest row in tokens; longer ones are cut, in a pair the longer text first. The tokenizer's own
            limit holds if it is lower. 128 holds most sentence pairs; attention costs time with the square of the
            length.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"
    labels: list[str] | None = None
    regression: bool = False
    metrics: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._classes = Classes([], {})

    def _columns(self, labelled: bool) -> list[str]:
        return [*self._texts(), self.label] if labelled else self._texts()

    def _texts(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self._texts(), self.label, self.regression, self._classes.recipe()]

    def _is_labelled(self, rows: Dataset, role: str) -> bool:
        return self._classes.is_labelled(rows, role, self.label)

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        if self.regression:
            self.num_labels = 1
            return
        hint = " For numbers to predict set regression to true."
        self._classes = learn_classes(readers, self.label, self.labels, self._source, hint=hint)
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        texts = [require_texts(rows[column], column, places, blank=True) for column in self._texts()]
        encoded = dict(self._tokenizer(*texts, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            encoded["labels"] = [
                self._number(value, place) if self.regression else self._classes.number_of(value, self.label, place)
                for value, place in zip(rows[self.label], places, strict=True)
            ]
        return encoded

    def _number(self, value: object, place: Place) -> float:
        # Texts too: in a CSV one value that is no number makes the whole column texts.
        with contextlib.suppress(ValueError):
            if isinstance(value, (int, float, str)) and math.isfinite(float(value)):
                return float(value)
        raise UsageError(
            f"{place} has the label {value!r} in the column {self.label!r}, but regression needs a finite number: mend "
            "or remove the row."
        )
