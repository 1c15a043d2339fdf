"""The base of the text data modules: tokenise rows once, serve padded batches."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import DataCollatorWithPadding

from lit_sparse._version import __version__
from lit_sparse.data.sampling import LengthGroupedSampler
from lit_sparse.data.sources import Reader, open_source, require_columns
from lit_sparse.data.tokenizers import identify_tokenizer, load_tokenizer
from lit_sparse.errors import UsageError

Rows = dict[str, list[Any]]  # a batch of rows, column by column
Collator = Callable[[list[dict[str, Any]]], Any]

_CARVING_SEED = 0  # not the argument `seed`: runs that differ in it share one validation set


class TextData(LightningDataModule):
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
        data_files: Split → file, for files that are not named by split.
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

    num_labels: int | None = None
    label_names: list[str] | None = None
    regression: bool = False
    metrics: tuple[str, ...] = ()

    _validation_splits: tuple[str, ...] = ("validation",)
    _test_splits: tuple[str, ...] = ("test",)

    def __init__(
        self,
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: dict[str, str] | None = None,
        validation_fraction: float | None = None,
        tokenizer: str | None = None,
        max_length: int = 128,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.path = path
        self.name = name
        self.revision = revision
        self.data_files = data_files
        self.validation_fraction = validation_fraction
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.length_grouped = length_grouped
        self.num_workers = num_workers
        self.seed = seed
        self._prepared: dict[str, list[Dataset]] = {}

    @property
    def validation_names(self) -> tuple[str, ...]:
        """One name per validation data loader; "" where there is a single one."""
        return tuple(split.removeprefix("validation").removeprefix("_") for split in self._validation_splits)

    @property
    def pad_token_id(self) -> int:
        """What short rows are padded with; a model that looks for the last real token must know it. After setup."""
        return int(self._tokenizer.pad_token_id)

    def decode(self, tokens: Tensor) -> list[str]:
        """The texts of rows of token ids, without special tokens. After setup."""
        return self._tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def prepare_data(self) -> None:
        """Read and tokenise what the Trainer's stage needs (without a Trainer: fit), in one process."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        self._prepare("fit" if stage is None else stage.value)

    def setup(self, stage: str) -> None:
        """Map the tokenised rows of ``stage`` (fit, validate, test or predict) into memory."""
        self._prepared.update(self._prepare(stage))

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, sharded over the processes of the Trainer."""
        (rows,) = self._prepared["train"]
        shard: dict[str, Any] = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None:  # the property is None in a single process
            shard = self.trainer.distributed_sampler_kwargs or shard
        # Lightning leaves both samplers alone but for telling them the epoch: they are DistributedSamplers.
        sampler: DistributedSampler[Any]
        if self.length_grouped:
            sampler = LengthGroupedSampler(list(rows["length"]), self.batch_size, **shard, seed=self.seed)
        else:
            sampler = DistributedSampler(rows, **shard, seed=self.seed)
        return self._loader(rows, "train", sampler)

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation batches in the order of the file; a list where there are several validation sets."""
        return self._loaders("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Test batches in the order of the file."""
        return self._loaders("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches without labels, in the order of the file."""
        return self._loaders("predict")

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

    def _readers(self) -> dict[str, Reader]:
        """How to read each split that the source has."""
        return open_source(self.path, self.name, self.revision, self.data_files, self._split_names())

    def _split_names(self) -> tuple[str, ...]:
        return ("train", *self._validation_splits, *self._test_splits, "predict")

    def _wanted(self, stage: str, readers: dict[str, Reader]) -> dict[str, Sequence[str]]:
        """Role → the splits that play it in the stage, all of which the source has."""
        self._check_fraction(readers)
        tests_only = "predict" not in readers and all(split in readers for split in self._test_splits)
        splits: dict[str, Sequence[str]] = {
            "train": ("train",),
            "validation": self._validation_splits if self.validation_fraction is None else ("train",),
            "test": self._test_splits,
            "predict": self._test_splits if tests_only else ("predict",),
        }
        roles = {"fit": ("train", "validation"), "validate": ("validation",)}.get(stage, (stage,))
        for role in roles:
            missing = [split for split in splits[role] if split not in readers]
            if missing:
                can_carve = role == "validation" and "train" in readers
                raise UsageError(
                    f"The stage {stage!r} needs the split {', '.join(map(repr, missing))}, but "
                    f"{self.path or 'data_files'} only has {', '.join(map(repr, readers))}: give a file for it"
                    f"{', or validation_fraction to hold rows out of the training split' if can_carve else ''}."
                )
        return {role: splits[role] for role in roles}

    def _check_fraction(self, readers: dict[str, Reader]) -> None:
        fraction = self.validation_fraction
        if fraction is None:
            return
        if not 0 < fraction < 1:
            raise UsageError(f"validation_fraction is a share of 'train' in (0, 1); got {fraction}.")
        present = [split for split in self._validation_splits if split in readers]
        if present:
            raise UsageError(
                f"validation_fraction={fraction} is for a source without validation split, but this one "
                f"has {', '.join(map(repr, present))}: leave out one of the two."
            )

    def _load_tokenizer(self) -> None:
        self._tokenizer = load_tokenizer(self.tokenizer or self._backbone())
        self._tokenizer_hash = identify_tokenizer(self._tokenizer)
        self._token_limit = min(self.max_length, self._tokenizer.model_max_length)

    def _backbone(self) -> str:
        module = self.trainer.lightning_module if self.trainer is not None else None
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, str):
            raise UsageError(
                "No tokenizer is given, and there is no LightningModule with a backbone whose tokenizer could "
                "be used: give tokenizer, a hub id or a folder."
            )
        return backbone

    def _tokenise(self, rows: Dataset, split: str, role: str) -> Dataset:
        if len(rows) == 0:
            raise UsageError(f"The split {split!r} of {self.path or 'data_files'} is empty: give it some rows.")
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

    def _carve(self, rows: Dataset, role: str) -> Dataset:
        """The part of ``rows`` that plays ``role`` when the validation split is held out of 'train'."""
        # Rows are cut apart after they were tokenised, so that errors number them as in the file.
        if self.validation_fraction is None or role not in ("train", "validation"):
            return rows
        try:
            parts = rows.train_test_split(self.validation_fraction, seed=_CARVING_SEED)
        except ValueError as error:
            raise UsageError(
                f"validation_fraction={self.validation_fraction} of the {len(rows)} rows of 'train' leaves nothing "
                f"on one side: give more rows or a validation file."
            ) from error
        return parts["train" if role == "train" else "test"]

    def _loaders(self, role: str) -> DataLoader[Any] | list[DataLoader[Any]]:
        loaders = [self._loader(rows, role) for rows in self._prepared[role]]
        return loaders[0] if len(loaders) == 1 else loaders

    def _loader(self, rows: Dataset, role: str, sampler: DistributedSampler[Any] | None = None) -> DataLoader[Any]:
        return DataLoader(
            rows.remove_columns("length"),
            batch_size=self.batch_size if role == "train" else self.eval_batch_size or self.batch_size,
            sampler=sampler,
            collate_fn=self._collator(role),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
