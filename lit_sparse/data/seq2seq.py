"""Pairs of a source and the target that an encoder-decoder learns to write."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lit_sparse.data.padding import PadRows
from lit_sparse.data.readers import Place, Rows
from lit_sparse.data.rows import Collator
from lit_sparse.data.sources import require_texts
from lit_sparse.data.text import TextData
from lit_sparse.data.tokenizers import Prompt, added_tokens
from lit_sparse.errors import UsageError, require_range


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

    def encode_prompts(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """A batch of sources, each with the ``prefix`` before it. After setup."""
        sources = [self.prefix + prompt for prompt in prompts if isinstance(prompt, str)]
        if len(sources) < len(prompts):
            raise UsageError("Seq2SeqData takes prompts that are texts; one of them is a list of messages.")
        return dict(self._tokenizer(sources, padding=True, return_tensors="pt"))

    def _columns(self, labelled: bool) -> list[str]:
        return [self.source, self.target] if labelled else [self.source]

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self.source, self.target, self.prefix, self.max_target_length]

    def _collator(self, role: str) -> Collator:
        return PadRows(self.pad_token_id, left_out=("targets",) if role == "train" else ())

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        sources = [self.prefix + text for text in require_texts(rows[self.source], self.source, places)]
        encoded = dict(self._tokenizer(sources, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            encoded["targets"] = self._targets(require_texts(rows[self.target], self.target, places))
            limit = min(self.max_target_length, self._tokenizer.model_max_length)
            encoded["labels"] = [target[:limit] for target in encoded["targets"]]
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
