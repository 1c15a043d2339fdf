"""Texts in which a model finds hidden tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from lit_sparse.data.padding import IGNORED, pad
from lit_sparse.data.readers import Place, RowError, Rows, per_row
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import require_texts
from lit_sparse.data.text import TextData
from lit_sparse.errors import UsageError, require_range


@dataclass(kw_only=True, eq=False, repr=False)
class MaskedLMData(TextData):
    """Texts for masked language models: a share of the tokens is hidden, and ``labels`` say which they were.

    As for BERT, 80 % of the hidden tokens become the mask token, 10 % a random token, and 10 % stay. The labels of all
    other tokens are -100. Training hides different tokens each time, at least one per batch. Validation and test hide
    the same tokens each time, whatever the batch size and the number of processes, and at least one in every row.

    Prediction hides nothing: its texts hold mask tokens (``[MASK]``, ``<mask>``) to fill in.

    Args:
        text: Column of the text.
        mlm_probability: Probability that a token is hidden, in (0, 1); 0.15 is BERT's.
    """

    text: str = "text"
    mlm_probability: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("mlm_probability", self.mlm_probability, above=0, below=1)

    @property
    def mask_token_id(self) -> int:
        """The token that replaces a hidden one. After setup."""
        return int(self._tokenizer.mask_token_id)

    def _columns(self, labelled: bool) -> list[str]:  # noqa: ARG002 - prediction reads the same column
        return [self.text]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self.text]

    def _load_processor(self) -> None:
        super()._load_processor()
        if self._tokenizer.mask_token_id is None:
            raise UsageError(
                f"The tokenizer {self._tokenizer_name!r} has no mask token: give the tokenizer of a masked language "
                "model such as BERT or RoBERTa."
            )

    def _collator(self, role: str) -> Collator:
        if role == "predict":
            return super()._collator(role)
        hide = DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=self.mlm_probability)
        return HideTokens(hide) if role == "train" else HideSameTokens(hide)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        texts = require_texts(rows[self.text], self.text, places)
        encoded = dict(
            self._tokenizer(texts, truncation=True, max_length=self._token_limit, return_special_tokens_mask=labelled)
        )
        if labelled:
            per_row(self._require_token, zip(encoded["special_tokens_mask"], texts, strict=True), places)
            encoded["number"] = [place.number for place in places]  # seeds the choice of hidden tokens in evaluation
        else:
            per_row(self._require_mask, zip(encoded["input_ids"], texts, strict=True), places)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def _require_token(self, marks_and_text: tuple[list[int], str]) -> None:
        marks, text = marks_and_text
        if all(marks):
            raise RowError(
                f"has no token in the column {self.text!r} that could be hidden: the tokenizer makes none of "
                f"{text[:50]!r}. Remove the row."
            )

    def _require_mask(self, ids_and_text: tuple[list[int], str]) -> None:
        ids, text = ids_and_text
        if self.mask_token_id not in ids:
            raise RowError(
                f"has no {self._tokenizer.mask_token} among the first {self._token_limit} tokens of the column "
                f"{self.text!r} ({text[:50]!r}): prediction fills mask tokens, so write one into the text."
            )


@dataclass(frozen=True)
class HideTokens:
    """Makes a padded batch in which random tokens are hidden, different ones each time.

    Args:
        hide: Hides tokens of rows and pads them.
    """

    hide: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long; at least one label is not -100."""
        rows = [{k: v for k, v in row.items() if k != "number"} for row in rows]
        batch = dict(self.hide(rows))
        while (batch["labels"] == IGNORED).all():  # few short rows: without a hidden token there is no loss
            batch = dict(self.hide(rows))
        return batch


@dataclass(frozen=True)
class HideSameTokens(HideTokens):
    """Makes a padded batch in which the tokens that are hidden in a row depend on its ``number`` alone."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long; in each row a label is not -100."""
        hidden = [self._hide_in(row) for row in rows]
        labels = [row.pop("labels")[0] for row in hidden]
        batch = DataCollatorWithPadding(self.hide.tokenizer)([{k: v[0] for k, v in row.items()} for row in hidden])
        return {**batch, "labels": pad(labels, left=self.hide.tokenizer.padding_side == "left")}

    def _hide_in(self, row: dict[str, Any]) -> dict[str, Tensor]:
        # Its own generator: a seed for all of torch would repeat itself in dropout and in the order of rows.
        self.hide.generator = torch.Generator().manual_seed(row["number"])
        return super().__call__([row])
