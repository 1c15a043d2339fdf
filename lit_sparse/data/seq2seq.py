"""Pairs of a source and the target that an encoder-decoder learns to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_sparse.data.padding import pad
from lit_sparse.data.rows import Collator, Rows
from lit_sparse.data.sources import Place, require_texts
from lit_sparse.data.text import TextData
from lit_sparse.data.tokenizers import added_tokens
from lit_sparse.errors import require_range


@dataclass(kw_only=True, eq=False, repr=False)
class Seq2SeqData(TextData):
    """Pairs of texts for encoder-decoders, such as articles and summaries or sentences and translations.

    Batches hold ``input_ids`` and ``attention_mask`` of the sources and, except in prediction, ``labels``: the tokens
    of the targets with an eos at their end, padded with -100. A target that is too long loses its end and its eos.
    Batches of validation and test also hold ``targets``, the uncut tokens, with which generated texts are compared. The
    model makes its decoder's input from the labels.

    Args:
        source: Column of the text that the model reads.
        target: Column of the text that the model writes.
        prefix: Text before every source; T5 was trained with prefixes such as ``"summarize: "``.
        max_length: Longest source in tokens; longer ones are cut at their end. The tokenizer's own limit holds if
            it is lower. 512 is what T5 was trained with.
        max_target_length: Longest target in tokens for training and for the measured loss; the tokenizer's own limit
            holds if it is lower. 128 holds most one-paragraph summaries.
    """

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    max_length: int = 512
    max_target_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("max_target_length", self.max_target_length, at_least=1)

    def _columns(self, labelled: bool) -> list[str]:
        return [self.source, self.target] if labelled else [self.source]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self.source, self.target, self.prefix]

    def _collator(self, role: str) -> Collator:
        limit = min(self.max_target_length, self._tokenizer.model_max_length)
        return PadSourceAndTarget(super()._collator(role), limit, keep_targets=role in ("validation", "test"))

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        sources = [self.prefix + text for text in require_texts(rows[self.source], self.source, places)]
        encoded = dict(self._tokenizer(sources, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            encoded["labels"] = self._targets(require_texts(rows[self.target], self.target, places))
        return encoded

    def _targets(self, texts: list[str]) -> list[list[int]]:
        """Tokens of the targets with an eos at their end, once."""
        eos = self._tokenizer.eos_token_id
        # text_target: the tokenizers of translation models mark the language of the target.
        before, after = added_tokens(self._tokenizer, "text_target")
        if eos is not None and eos not in after:
            after = [*after, eos]
        bare = self._tokenizer(text_target=texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [before + (ids[:-1] if after and ids[-1:] == after[:1] else ids) + after for ids in bare]


@dataclass(frozen=True)
class PadSourceAndTarget:
    """Makes a batch of encoder inputs and, if the rows have them, ``labels``, padded to the longest of each.

    Args:
        pad_source: Pads the encoder inputs.
        max_target_length: Tokens after which labels are cut.
        keep_targets: Whether to add the uncut labels as ``targets``.
    """

    pad_source: Collator
    max_target_length: int
    keep_targets: bool

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long; labels and targets are padded with -100."""
        batch = dict(self.pad_source([{k: v for k, v in row.items() if k != "labels"} for row in rows]))
        if "labels" in rows[0]:
            batch["labels"] = pad([row["labels"][: self.max_target_length] for row in rows])
            if self.keep_targets:
                batch["targets"] = pad([row["labels"] for row in rows])
        return batch
