"""One text or a pair of texts per row, with a class or a number to predict."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from datasets import Dataset

from lit_sparse.data.labels import Classes, holds_lists, learn_classes, vector_of_columns, vector_of_list
from lit_sparse.data.readers import Place, Reader, RowError, Rows, per_row, single_rows
from lit_sparse.data.sources import require_texts
from lit_sparse.data.text import TextData
from lit_sparse.errors import UsageError


@dataclass(kw_only=True, eq=False, repr=False)
class TextClassificationData(TextData):
    """Texts or pairs of texts with a label each, from files or from the hub.

    Batches hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, and
    ``labels``: class ids (long) or, for regression, numbers (float). Test splits whose labels are all
    hidden (-1), as in many benchmarks, give batches without labels; so does prediction.

    Rows may have any number of labels each (multi-label classification). Then ``labels`` has a column for each label
    that holds 1 where it applies and 0 elsewhere (float). ``multi_label`` says so after setup.

    Args:
        text: Column of the text.
        text_pair: Column of the second text of a pair; None where rows have one text.
        label: Column of the label. If it holds lists of names or ids, each row has any number of labels; an empty list
            says that none applies. In a CSV these are lists in JSON: ``["toxic", "insult"]``. Or several columns, one
            for each label, that hold 0 or 1.
        labels: Names of the classes in the order of their ids; the column may hold names or ids. None takes the names
            that the source gives, or else the sorted distinct values of the training split.
        regression: Whether labels are numbers to predict instead of classes.
        metrics: Names of the metrics to report: accuracy, f1 and matthews; for regression pearson and spearman; for
            several labels accuracy, f1_macro, f1_micro and auroc. None leaves the choice to the model.
        max_length: Longest row in tokens; longer ones are cut, in a pair the longer text first. The tokenizer's own
            limit holds if it is lower. 128 holds most sentence pairs; attention costs time with the square of the
            length.
    """

    text: str = "text"
    text_pair: str | None = None
    label: str | list[str] = "label"
    labels: list[str] | None = None
    regression: bool = False
    metrics: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._classes = Classes([], {})
        self.multi_label: bool | None = None if isinstance(self.label, str) else True
        if isinstance(self.label, str):
            return
        if len(set(self.label)) < 2 or len(set(self.label)) < len(self.label):
            raise UsageError(f"label is one column, or several different columns of zeros and ones; got {self.label}.")
        if self.labels is not None or self.regression:
            other = "labels" if self.labels else "regression"
            raise UsageError(f"The columns {self.label} in label are the labels: leave out {other}.")

    def _columns(self, labelled: bool) -> list[str]:
        labels = [self.label] if isinstance(self.label, str) else self.label
        return [*self._texts(), *labels] if labelled else self._texts()

    def _texts(self) -> list[str]:
        return [self.text] if self.text_pair is None else [self.text, self.text_pair]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self._texts(), self.label, self.regression, self._classes.recipe()]

    def _is_labelled(self, rows: Dataset, role: str) -> bool:
        if self.multi_label or not isinstance(self.label, str):
            return role != "predict"
        return self._classes.is_labelled(rows, role, self.label)

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        if self.regression:
            self.num_labels, self.multi_label = 1, False
            return
        if isinstance(self.label, str):
            # Names that are given spare a stage that does not train the reading of the training split.
            among = readers if self.labels is None else {split: readers[split] for split in self._stage_splits}
            self.multi_label = holds_lists(among, self.label)
            lists = bool(self.multi_label)
            hint = " For numbers to predict set regression to true."
            self._classes = learn_classes(readers, self.label, self.labels, self._source, of_lists=lists, hint=hint)
        else:
            self._classes = Classes(self.label, {})
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        texts = [require_texts(rows[column], column, places, blank=True) for column in self._texts()]
        encoded = dict(self._tokenizer(*texts, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            encoded["labels"] = self._encoded_labels(rows, places)
        return encoded

    def _encoded_labels(self, rows: Rows, places: Sequence[Place]) -> list[Any]:
        column = self.label
        if not isinstance(column, str):
            return per_row(partial(vector_of_columns, columns=column), single_rows(rows), places)
        label_of: Callable[[Any], Any] = self._number
        if self.multi_label:
            label_of = partial(vector_of_list, column=column, classes=self._classes)
        elif not self.regression:
            label_of = partial(self._classes.number_of, column=column)
        return per_row(label_of, rows[column], places)

    def _number(self, value: object) -> float:
        # Texts too: in a CSV one value that is no number makes the whole column texts.
        with contextlib.suppress(ValueError):
            if isinstance(value, (int, float, str)) and math.isfinite(float(value)):
                return float(value)
        raise RowError(
            f"has the label {value!r} in the column {self.label!r}, but regression needs a finite number: mend or "
            "remove the row."
        )
