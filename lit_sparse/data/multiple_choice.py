"""Questions with several choices, one of which is right."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from lit_sparse.data.readers import Place, Reader, RowError, Rows, errors_in, per_row, single_rows
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import distinct, require_columns, require_text
from lit_sparse.data.text import TextData
from lit_sparse.errors import UsageError

_HIDDEN = {-1, "-1", "", None}  # stands where a benchmark keeps the labels of its test split to itself


@dataclass(kw_only=True, eq=False, repr=False)
class MultipleChoiceData(TextData):
    """Questions with the same number of choices each, for models that score every choice on its own.

    Each choice is tokenised as the second text of a pair with the question. Batches hold ``input_ids``,
    ``attention_mask`` and ``token_type_ids`` where the tokenizer gives them, of shape (rows, choices, tokens), and
    ``labels``, the numbers of the right choices from 0. Test splits whose labels are all hidden (-1 or empty) give
    batches without labels; so does prediction. The columns of well-known sets:

    ==================  =========================  ======================================  =========
    set                 ``question``               ``choices``                             ``label``
    ==================  =========================  ======================================  =========
    SWAG                [sent1, sent2]             [ending0, ending1, ending2, ending3]    label
    HellaSwag           ctx                        endings                                 label
    CommonsenseQA       question                   choices                                 answerKey
    RACE                [article, question]        options                                 answer
    PIQA                goal                       [sol1, sol2]                            label
    ==================  =========================  ======================================  =========

    Args:
        question: Column of the question, or several columns whose texts are joined by spaces.
        choices: Column of the choices: a list of texts, or a dictionary of the lists ``text`` and ``label``, the names
            of the choices. Or several columns with a choice each.
        label: Column of the right choice: its number, counted from 0, or its name. Choices without names have the names
            A, B, C … A value that could be either is taken for a name.
        max_length: Longest question and choice together, in tokens; the longer of the two is cut. The tokenizer's own
            limit holds if it is lower. Attention costs time with the square of the length.
        batch_size: Training rows per batch and device; the model sees all choices of each.
    """

    question: str | list[str] = "question"
    choices: str | list[str] = "choices"
    label: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._questions = [self.question] if isinstance(self.question, str) else self.question
        if not self._questions:
            raise UsageError("question names no column: give one or more.")

    def _columns(self, labelled: bool) -> list[str]:
        choices = [self.choices] if isinstance(self.choices, str) else self.choices
        return [*self._questions, *choices, *([self.label] if labelled else [])]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self._questions, self.choices, self.label, self.num_labels]

    def _is_labelled(self, rows: Dataset, role: str) -> bool:
        if role != "test" or self.label not in rows.column_names:
            return role != "predict"
        return not set(distinct(rows, self.label)) <= _HIDDEN

    def _collator(self, role: str) -> Collator:
        return PadChoices(super()._collator(role))

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        """The number of choices: that of the first row."""
        if isinstance(self.choices, str):
            split = "train" if "train" in readers else next(iter(readers))
            rows = readers[split]()
            require_columns(rows, split, [self.choices], readers[split].files)
            with errors_in(Place(split, 0, len(rows), readers[split])):
                self.num_labels = len(_texts_and_names(rows[0][self.choices], self.choices)[0])
        else:
            self.num_labels = len(self.choices)
        if self.num_labels < 2:
            raise UsageError(f"choices={self.choices!r} gives {self.num_labels} choices: give at least two.")

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        found = per_row(partial(self._parts_of, labelled=labelled), single_rows(rows), places)
        questions = [question for question, texts, _ in found for _ in texts]
        choices = [text for _, texts, _ in found for text in texts]
        flat = self._tokenizer(questions, choices, truncation=True, max_length=self._token_limit)
        count = len(choices) // len(places)  # the same in all rows
        encoded: Rows = {k: [v[i : i + count] for i in range(0, len(v), count)] for k, v in flat.items()}
        encoded["length"] = [max(map(len, row)) for row in encoded["input_ids"]]
        return {**encoded, "labels": [label for _, _, label in found]} if labelled else encoded

    def _parts_of(self, row: dict[str, Any], labelled: bool) -> tuple[str, list[str], int | None]:
        """The question, the choices and the number of the right one."""
        # One of several columns may be empty, such as the second half of the context in HellaSwag.
        parts = [require_text(row[column], column, blank=True) for column in self._questions]
        question = require_text(" ".join(filter(None, parts)), ", ".join(self._questions))
        if isinstance(self.choices, str):
            texts, names = _texts_and_names(row[self.choices], self.choices)
        else:
            texts = [require_text(row[column], column) for column in self.choices]
            names = list(string.ascii_uppercase[: len(texts)])
        if len(texts) != self.num_labels:
            raise RowError(
                f"has {len(texts)} choices, but the first row has {self.num_labels}: all rows need equally many, so "
                "remove the row."
            )
        return question, texts, self._number_of(row[self.label], names) if labelled else None

    def _number_of(self, value: Any, names: list[str]) -> int:
        if value in names:
            return names.index(value)
        found = int(value) if isinstance(value, str) and value.isdecimal() else value
        if isinstance(found, int) and 0 <= found < len(names):
            return found
        raise RowError(
            f"has the label {value!r} in the column {self.label!r}, which is neither the name of a choice, {names}, "
            f"nor a number from 0 to {len(names) - 1}: mend or remove the row."
        )


def _texts_and_names(value: Any, column: str) -> tuple[list[str], list[str]]:
    texts = value.get("text") if isinstance(value, dict) else value
    if not isinstance(texts, list):
        raise RowError(
            f"has no choices in the column {column!r} but {value!r}: give a list of texts, or a dictionary with the "
            "lists text and label. If each choice has a column, list the columns in choices."
        )
    texts = [require_text(text, column) for text in texts]
    names = value.get("label") if isinstance(value, dict) else None
    if names is None:
        names = list(string.ascii_uppercase[: len(texts)])
    if len(names) != len(texts):
        raise RowError(f"has {len(texts)} texts but {len(names)} labels in the column {column!r}: mend or remove it.")
    return texts, names


@dataclass(frozen=True)
class PadChoices:
    """Makes a batch of rows in which each model input is a list with one entry per choice.

    Args:
        pad: Pads single choices to the longest of them.
    """

    pad: Collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, choices, longest choice), and (rows,) of single numbers, of type long."""
        names = [name for name, value in rows[0].items() if isinstance(value, list)]
        choices = [{name: row[name][i] for name in names} for row in rows for i in range(len(row["input_ids"]))]
        batch = {name: tokens.view(len(rows), -1, tokens.shape[-1]) for name, tokens in self.pad(choices).items()}
        single = [name for name in rows[0] if name not in names]
        return batch | {name: torch.tensor([row[name] for row in rows]) for name in single}
