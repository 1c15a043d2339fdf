"""One text or a pair of texts per row, with a class or a number to predict."""

import contextlib
import math
from typing import Any

from datasets import Dataset

from lit_sparse.data.labels import HIDDEN, Classes, has_labels, learn_classes
from lit_sparse.data.sources import DataFiles, Reader, require_text
from lit_sparse.data.text import Rows, TextData
from lit_sparse.errors import UsageError

_CLASS_METRICS = ("accuracy", "f1", "matthews")
_REGRESSION_METRICS = ("pearson", "spearman")


class TextClassificationData(TextData):
    """Texts or pairs of texts with a label each, from files or from the hub.

    Batches hold ``input_ids``, ``attention_mask``, ``token_type_ids`` where the tokenizer gives them, and
    ``labels``: class ids (long) or, for regression, numbers (float). A test split whose labels are all -1, as
    benchmarks hide them, gives batches without labels; so does prediction.

    Args:
        path: Where the rows are: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train, validation, test, predict; ending in .csv, .json, .jsonl or .parquet) or laid out
            like a data set of the hub; or one such file, which is then the training split. Give either this
            or ``data_files``.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, or list of files that are read one after another, for files that are not named by
            split.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        text: Column of the text.
        text_pair: Column of the second text of a pair; None where rows have one text.
        label: Column of the label.
        labels: Names of the classes in the order of their ids; labels are then names or ids. None takes them
            from the source if it names its classes, and otherwise the sorted distinct values of the training
            split.
        regression: Whether labels are numbers to predict instead of classes.
        metrics: Names of the metrics to report, among accuracy, f1, matthews, and for regression pearson and
            spearman; None leaves the choice to the model.
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut, of a pair the longer text first. The
            tokenizer's own limit holds if it is lower. 128 holds most sentence pairs; attention costs time
            with the square of the length.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        length_grouped: Whether a training batch holds rows of like length, which saves most of the padding.
            If not, rows are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one. Rows are tokenised already, which leaves
            workers nothing to do but padding.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles | None = None,
        validation_fraction: float | None = None,
        text: str = "text",
        text_pair: str | None = None,
        label: str = "label",
        labels: list[str] | None = None,
        regression: bool = False,
        metrics: list[str] | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            data_files=data_files,
            validation_fraction=validation_fraction,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            seed=seed,
        )
        self.text = text
        self.text_pair = text_pair
        self.label = label
        self.labels = labels
        self.regression = regression
        self.metrics = tuple(metrics or ())
        self._classes = Classes([], {})

    def _columns(self, labelled: bool) -> list[str]:
        texts = [self.text] if self.text_pair is None else [self.text, self.text_pair]
        return [*texts, self.label] if labelled else texts

    def _recipe(self) -> list[Any]:
        return [
            self.text,
            self.text_pair,
            self.label,
            self.regression,
            [[str(k), v] for k, v in self._classes.numbers.items()],
        ]

    def _is_labelled(self, rows: Dataset, role: str) -> bool:
        if role != "test" or HIDDEN in self._classes.numbers:
            return role != "predict"
        return has_labels(rows, self.label)

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        texts = [
            [require_text(text, column, split, n, blank=True) for text, n in zip(rows[column], numbers, strict=True)]
            for column in self._columns(labelled=False)
        ]
        encoded = dict(self._tokenizer(*texts, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            to_number = self._target if self.regression else self._class_of
            encoded["labels"] = [to_number(value, split, n) for value, n in zip(rows[self.label], numbers, strict=True)]
        return encoded

    def _class_of(self, value: Any, split: str, number: int) -> int:
        origin = f"Row {number} (counted from 0) of the split {split!r}"
        return self._classes.number_of(value, self.label, origin)

    def _target(self, value: object, split: str, number: int) -> float:
        # As text too: a CSV with one value that is none has a column of texts.
        with contextlib.suppress(ValueError):
            if isinstance(value, (int, float, str)) and math.isfinite(float(value)):
                return float(value)
        raise UsageError(
            f"Row {number} (counted from 0) of the split {split!r} has the label {value!r} in the column "
            f"{self.label!r}, but regression needs a finite number: mend or remove the row."
        )

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        allowed = _REGRESSION_METRICS if self.regression else _CLASS_METRICS
        unknown = [name for name in self.metrics if name not in allowed]
        if unknown:
            kind = "regression" if self.regression else "classification"
            raise UsageError(f"metrics has {unknown}, but the metrics of {kind} are {list(allowed)}.")
        if self.regression:
            self.num_labels = 1
            return
        hint = " For numbers to predict set regression to true."
        self._classes = learn_classes(readers, self.label, self.labels, self.path or "data_files", hint)
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)
