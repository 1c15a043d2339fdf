"""Multiple choice: which of several answers fits the question."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForMultipleChoice

from lit_sparse.errors import UsageError
from lit_sparse.modules.classification import Classification


class MultipleChoice(Classification):
    """Choose among the answers of each row: the model gives each of them a score.

    ``num_labels`` is the number of choices; :class:`~lit_sparse.MultipleChoiceData` has it. Other arguments and
    errors are those of :class:`~lit_sparse.SequenceClassification`.
    """

    auto_class = AutoModelForMultipleChoice

    def _head_arguments(self) -> dict[str, Any]:
        return {"ignore_mismatched_sizes": True}  # one score per choice, whatever their number

    def _known_num_labels(self) -> int:
        # A built model's configuration has two labels unless it says otherwise: no number of choices.
        if self.num_labels is None:
            raise UsageError(
                "The number of choices is not known: give num_labels, or fit with a data module that has it."
            )
        if self.num_labels < 2:
            raise UsageError(f"There is nothing to choose among {self.num_labels} choices: num_labels is at least 2.")
        return self.num_labels
