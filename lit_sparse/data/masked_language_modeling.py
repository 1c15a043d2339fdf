"""Texts of which some tokens are hidden, for a model to find."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForLanguageModeling, DataCollatorWithPadding

from lit_sparse.data.sources import DataFiles, require_text
from lit_sparse.data.text import Collator, Rows, TextData
from lit_sparse.errors import UsageError

IGNORED = -100  # the label that torch's cross entropy leaves out


class MaskedLMData(TextData):
    """Texts for masked language models: a share of the tokens is hidden, and ``labels`` say which they were.

    Of the hidden tokens 80 % become the mask token, 10 % a random token and 10 % stay, as for BERT; the labels of
    all others are -100. Training hides other tokens each time, at least one per batch. Validation and test hide
    the same ones each time, whatever the batch size and the number of processes, and at least one in every row.

    Prediction hides nothing: its texts hold mask tokens (``[MASK]``, ``<mask>``) to fill in.

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
        mlm_probability: Probability that a token is hidden, in (0, 1); 0.15 is BERT's.
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut at their end. The tokenizer's own limit holds if it
            is lower. Attention costs time with the square of the length.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        length_grouped: Whether a training batch holds rows of like length, which saves most of the padding.
            If not, rows are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one.
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
        mlm_probability: float = 0.15,
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
        if not 0 < mlm_probability < 1:
            raise UsageError(f"mlm_probability is the share of tokens to hide, in (0, 1); got {mlm_probability}.")
        self.text = text
        self.mlm_probability = mlm_probability

    @property
    def mask_token_id(self) -> int:
        """The token that stands in the place of a hidden one. After setup."""
        return int(self._tokenizer.mask_token_id)

    def _columns(self, labelled: bool) -> list[str]:  # noqa: ARG002 - a text is its own label
        return [self.text]

    def _recipe(self) -> list[Any]:
        return [self.text]

    def _load_tokenizer(self) -> None:
        super()._load_tokenizer()
        if self._tokenizer.mask_token_id is None:
            raise UsageError(
                f"The tokenizer {self.tokenizer or self._backbone()!r} has no mask token to hide others by: give that "
                "of a masked language model such as BERT or RoBERTa."
            )

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        texts = [
            require_text(text, self.text, split, n, blank=False)
            for text, n in zip(rows[self.text], numbers, strict=True)
        ]
        encoded = dict(
            self._tokenizer(texts, truncation=True, max_length=self._token_limit, return_special_tokens_mask=labelled)
        )
        if labelled:
            self._require_tokens(encoded["special_tokens_mask"], texts, numbers, split)
            encoded["number"] = numbers  # seeds the choice of hidden tokens where that is the same each time
        else:
            self._require_masks(encoded["input_ids"], texts, numbers, split)
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def _require_tokens(self, special: list[list[int]], texts: list[str], numbers: list[int], split: str) -> None:
        for marks, text, number in zip(special, texts, numbers, strict=True):
            if all(marks):
                raise UsageError(
                    f"Row {number} (counted from 0) of the split {split!r} has no token in the column {self.text!r} "
                    f"that could be hidden: the tokenizer makes none of {text[:50]!r}. Remove the row."
                )

    def _require_masks(self, ids: list[list[int]], texts: list[str], numbers: list[int], split: str) -> None:
        for tokens, text, number in zip(ids, texts, numbers, strict=True):
            if self.mask_token_id not in tokens:
                raise UsageError(
                    f"Row {number} (counted from 0) of the split {split!r} has no {self._tokenizer.mask_token} among "
                    f"the first {self._token_limit} tokens of the column {self.text!r} ({text[:50]!r}): prediction "
                    "fills such places, so write one into the text."
                )

    def _collator(self, role: str) -> Collator:
        if role == "predict":
            return super()._collator(role)
        hide = DataCollatorForLanguageModeling(self._tokenizer, mlm_probability=self.mlm_probability)
        return HideTokens(hide) if role == "train" else HideSameTokens(hide)


@dataclass(frozen=True)
class HideTokens:
    """Makes a padded batch in which random tokens are hidden, others each time.

    Args:
        hide: Hides tokens of rows and pads them.
    """

    hide: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long; at least one label is not -100."""
        rows = [{k: v for k, v in row.items() if k != "number"} for row in rows]
        batch = dict(self.hide(rows))
        while (batch["labels"] == IGNORED).all():  # few short rows: a loss of no token would be no number
            batch = dict(self.hide(rows))
        return batch


@dataclass(frozen=True)
class HideSameTokens:
    """Makes a padded batch in which the tokens that are hidden in a row depend on its ``number`` alone.

    Args:
        hide: Hides tokens of rows and pads them.
    """

    hide: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long; in each row a label is not -100."""
        hidden = [self._hide_in(row) for row in rows]
        inputs = [{k: v[0] for k, v in row.items() if k != "labels"} for row in hidden]
        batch = dict(DataCollatorWithPadding(self.hide.tokenizer)(inputs))
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        batch["labels"][batch["attention_mask"].bool()] = torch.cat([row["labels"][0] for row in hidden])
        return batch

    def _hide_in(self, row: dict[str, Any]) -> dict[str, Tensor]:
        # A generator of its own: a seed for all of torch would repeat itself in dropout and in the order of rows.
        self.hide.generator = torch.Generator().manual_seed(row["number"])
        return HideTokens(self.hide)([row])
