"""The base of the text data modules: tokenise rows once, serve padded batches."""

import hashlib
import json
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from lit_sparse._version import __version__
from lit_sparse.data.rows import Collator as Collator
from lit_sparse.data.rows import RowData
from lit_sparse.data.sampling import LengthGroupedSampler, RowSampler
from lit_sparse.data.sources import DataFiles, Reader, require_columns
from lit_sparse.data.tokenizers import identify_tokenizer, load_tokenizer
from lit_sparse.errors import UsageError

Rows = dict[str, list[Any]]  # a batch of rows, column by column


class TextData(RowData):
    """Reads rows, tokenises them once and serves padded batches; the base of the text data modules.

    Tokenised rows lie in the cache of ``datasets``, keyed by what they are made of (rows, tokenizer,
    columns, length limit), so later runs and the other processes of a run only map them into memory.

    A split plays up to four roles: "train" and "validation" in the stage fit, "validation", "test" and
    "predict" in the stages of that name. Only the splits that a stage needs are read. Prediction takes the
    split "predict", or the test split where there is none, and its batches hold no labels.

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
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut. The tokenizer's own limit holds if it is
            lower. 128 holds most sentence pairs; attention costs time with the square of the length.
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
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.tokenizer = tokenizer
        if max_length < 1:
            raise UsageError(f"max_length counts tokens, at least 1; got {max_length}.")
        self.max_length = max_length
        self.length_grouped = length_grouped

    @property
    def pad_token_id(self) -> int:
        """What short rows are padded with; a model that looks for the last real token must know it. After setup."""
        return int(self._tokenizer.pad_token_id)

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of token ids, without special tokens. After setup."""
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    # What a subclass says about its rows.

    def _columns(self, labelled: bool) -> list[str]:
        """Columns that :meth:`_encode` reads."""
        raise NotImplementedError

    def _recipe(self) -> list[Any]:
        """What decides, next to the row and the tokenizer, what :meth:`_encode` makes of a row; as JSON."""
        raise NotImplementedError

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        """Make token ids, ``length`` and, if ``labelled``, ``labels`` of rows, numbered from 0."""
        raise NotImplementedError

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        """Set ``num_labels``, ``label_names`` and ``metrics``."""

    def _is_labelled(self, rows: Dataset, role: str) -> bool:  # noqa: ARG002 - a subclass looks at rows
        """Whether the batches of these rows hold labels."""
        return role != "predict"

    def _collator(self, role: str) -> Collator:  # noqa: ARG002 - a subclass looks at the role
        """What makes a batch of rows."""
        return DataCollatorWithPadding(self._tokenizer)

    # From a source to tokenised rows.

    def _prepare(self, stage: str) -> dict[str, list[Dataset]]:
        readers = self._readers()
        wanted = self._wanted(stage, readers)
        self._load_tokenizer()
        self._learn_labels(readers)
        return {
            role: [self._carve(self._tokenise(readers[split](), split, role), role) for split in splits]
            for role, splits in wanted.items()
        }

    def _load_tokenizer(self) -> None:
        self._tokenizer = load_tokenizer(self.tokenizer or self._backbone(), self._new_tokens())
        self._tokenizer_hash = identify_tokenizer(self._tokenizer)
        self._token_limit = min(self.max_length, self._tokenizer.model_max_length)

    def _new_tokens(self) -> list[str]:
        """Those of the Trainer's module."""
        new: list[str] = getattr(getattr(self.trainer, "lightning_module", None), "new_tokens", None) or []
        if new and self.tokenizer is not None and self.tokenizer != self._backbone():
            raise UsageError(
                f"The module's new_tokens extend the tokenizer of its backbone {self._backbone()!r}, and the data "
                f"names {self.tokenizer!r}: leave tokenizer out."
            )
        return new

    def _backbone(self) -> str:
        return self._backbone_of("tokenizer")

    def _tokenise(self, rows: Dataset, split: str, role: str) -> Dataset:
        self._require_rows(rows, split)
        labelled = self._is_labelled(rows, role)
        require_columns(rows, split, self._columns(labelled))
        made_of = [
            rows._fingerprint,
            self._tokenizer_hash,
            self._token_limit,
            type(self).__qualname__,
            self._recipe(),
            labelled,
            __version__,
        ]
        return rows.map(
            partial(self._encode, split=split, labelled=labelled),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            # Left to itself, `datasets` hashes the tokenizer, whose state changes with its first use.
            new_fingerprint=hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32],
            desc=f"Tokenising {split}",
        )

    def _train_sampler(self, rows: Dataset, shard: dict[str, Any]) -> RowSampler:
        if self.length_grouped:
            return LengthGroupedSampler(list(rows["length"]), self.batch_size, **shard, seed=self.seed)
        return super()._train_sampler(rows, shard)

    def _loader(self, rows: Dataset, role: str, sampler: RowSampler | None = None) -> DataLoader[Any]:
        self._require_vocabulary(rows)
        return super()._loader(rows.remove_columns("length"), role, sampler)

    def _require_vocabulary(self, rows: Dataset) -> None:
        """Refuse rows with tokens that the backbone has no embedding for, which else ends in an index error."""
        model: Any = getattr(getattr(self.trainer, "lightning_module", None), "model", None)
        find = getattr(model, "get_input_embeddings", None)
        words = getattr(find() if find is not None else None, "num_embeddings", None)
        if words is None or "input_ids" not in rows.column_names or not len(rows):
            return
        ids = rows.data.column("input_ids")
        while pa.types.is_list(ids.type) or pa.types.is_large_list(ids.type):
            ids = pc.list_flatten(ids)
        largest = pc.max(ids).as_py()
        if largest is not None and largest >= words:
            raise UsageError(
                f"The rows hold the token {largest}, and the backbone has embeddings for {words}: its tokenizer is "
                "another model's, or was given more tokens. Name the right tokenizer, or the tokens in the model's "
                "new_tokens."
            )
