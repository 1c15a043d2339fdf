"""Sources with the targets that an encoder-decoder is to write."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding

from lit_sparse.data.sources import DataFiles, require_text
from lit_sparse.data.text import Collator, Rows, TextData
from lit_sparse.data.tokenizers import added_tokens
from lit_sparse.errors import UsageError

IGNORED = -100  # the label that torch's cross entropy leaves out


class Seq2SeqData(TextData):
    """Pairs of texts for encoder-decoders, such as articles and summaries or sentences and translations.

    Batches hold ``input_ids`` and ``attention_mask`` of the sources and, but in prediction, ``labels``: the tokens
    of the targets with an eos at their end, padded with -100. A target that is too long loses its end, eos
    included. Batches of validation and test also hold ``targets``, the tokens uncut, for generated texts to be
    compared with. The model itself makes its decoder's input of the labels.

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
        source: Column of the text that is read.
        target: Column of the text that is to be written.
        prefix: Put before every source: T5 was trained with such as ``"summarize: "``.
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest source in tokens; longer ones are cut at their end. The tokenizer's own limit holds if
            it is lower. 512 is what T5 was trained with.
        max_target_length: Longest target in tokens that a model trains on and has its loss measured on; the
            tokenizer's own limit holds if it is lower. 128 holds most one-paragraph summaries.
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
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        tokenizer: str | None = None,
        max_length: int = 512,
        max_target_length: int = 128,
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
        if max_target_length < 1:
            raise UsageError(f"max_target_length must be at least 1; got {max_target_length}.")
        self.source = source
        self.target = target
        self.prefix = prefix
        self.max_target_length = max_target_length

    def _columns(self, labelled: bool) -> list[str]:
        return [self.source, self.target] if labelled else [self.source]

    def _recipe(self) -> list[Any]:
        return [self.source, self.target, self.prefix]

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        sources = [self.prefix + text for text in self._filled(rows, self.source, numbers, split)]
        encoded = dict(self._tokenizer(sources, truncation=True, max_length=self._token_limit))
        encoded["length"] = [len(ids) for ids in encoded["input_ids"]]
        if labelled:
            targets = self._filled(rows, self.target, numbers, split)
            encoded["labels"] = self._targets(targets)
        return encoded

    def _filled(self, rows: Rows, column: str, numbers: list[int], split: str) -> list[str]:
        return [
            require_text(text, column, split, n, blank=False) for text, n in zip(rows[column], numbers, strict=True)
        ]

    def _targets(self, texts: list[str]) -> list[list[int]]:
        """Tokens of the targets with an eos at their end, once."""
        eos = self._tokenizer.eos_token_id
        # text_target: the tokenizers of translation models mark the language of what is written.
        before, after = added_tokens(self._tokenizer, "text_target")
        if eos is not None and eos not in after:
            after = [*after, eos]
        bare = self._tokenizer(text_target=texts, add_special_tokens=False, verbose=False)["input_ids"]
        return [before + (ids[:-1] if after and ids[-1:] == after[:1] else ids) + after for ids in bare]

    def _collator(self, role: str) -> Collator:
        limit = min(self.max_target_length, self._tokenizer.model_max_length)
        return PadSourceAndTarget(DataCollatorWithPadding(self._tokenizer), limit, role in ("validation", "test"))


@dataclass(frozen=True)
class PadSourceAndTarget:
    """Makes a batch of rows of encoder inputs and, perhaps, ``labels``, by padding to the longest of each.

    Args:
        pad_source: Pads what the encoder reads.
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
            targets = [torch.tensor(row["labels"], dtype=torch.long) for row in rows]
            batch["labels"] = _pad([target[: self.max_target_length] for target in targets])
            if self.keep_targets:
                batch["targets"] = _pad(targets)
        return batch


def _pad(sequences: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=IGNORED)
