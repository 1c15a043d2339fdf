"""The base of the data modules: splits, the roles they play, and batches of their rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_sparse._version import __version__
from lit_sparse.data.readers import Place, Reader, Rows
from lit_sparse.data.sampling import ResumableLoader, RowSampler
from lit_sparse.data.sources import DataFiles, named, open_source, require_columns
from lit_sparse.data.tables import fingerprint
from lit_sparse.errors import UsageError, require_range

Collator = Callable[[list[dict[str, Any]]], Any]

_HELD_OUT_SEED = 0  # not the argument `seed`: runs that differ in it share one validation set


@dataclass(kw_only=True, eq=False, repr=False)
class RowData(LightningDataModule):
    """Reads the splits that a stage needs, encodes their rows and serves them in batches; the base of data modules.

    A split plays up to four roles: "train" and "validation" in the stage fit, "validation", "test" and "predict" in
    the stages of that name. Only the splits that a stage needs are read: with ``limit_val_batches=0`` of the Trainer,
    fit needs none for validation. Prediction takes the split "predict", or the test split where there is none, and its
    batches hold no labels.

    Rows, and what they are encoded to, are kept in the cache of ``datasets`` under names that say how they were made,
    so later runs and the other processes of a run only map them into memory. Files are read and encoded a thousand rows
    at a time. Memory holds all of a .json file while it is read, and the lengths and the order of the training rows.

    Args:
        path: Where the rows are. One of: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train; validation, valid, val or dev; test; predict; ending in .csv, .tsv, .json, .jsonl, .ndjson or
            .parquet, and in .gz or .zst if they are compressed); a folder laid out like a data set of the hub; a single
            file, which is then the training split. Give either ``path`` or ``data_files``.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, for files that are not named by split. Also a pattern such as ``parts/*.csv``, whose
            files are read in the order of their names, or a list of files and patterns, read one after another. The
            files of a split are of one kind.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the source
            has none. Every run holds out the same rows.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction. None is ``batch_size``; more rows
            fit, because evaluation keeps no gradients.
        num_workers: Processes that assemble batches; 0 is the training process.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    path: str | None = field(default=None, kw_only=False)
    name: str | None = None
    revision: str | None = None
    data_files: DataFiles | None = None
    validation_fraction: float | None = None
    batch_size: int = 32
    eval_batch_size: int | None = None
    num_workers: int = 0
    seed: int = 0

    _rows_at_once: ClassVar[int] = 1000  # rows that `_encode` gets

    def __post_init__(self) -> None:
        super().__init__()
        require_range("batch_size", self.batch_size, at_least=1)
        require_range("eval_batch_size", self.eval_batch_size, at_least=1)
        require_range("num_workers", self.num_workers, at_least=0)
        require_range("validation_fraction", self.validation_fraction, above=0, below=1)
        self._validation_splits: tuple[str, ...] = ("validation",)
        self._test_splits: tuple[str, ...] = ("test",)
        self.num_labels: int | None = None
        self.label_names: list[str] | None = None
        self._prepared: dict[str, list[Dataset]] = {}
        self._train_loader: DataLoader[Any] | None = None
        self._train_position: dict[str, int] | None = None

    @property
    def validation_names(self) -> tuple[str, ...]:
        """One name per validation data loader; "" where there is a single one."""
        return tuple(split.removeprefix("validation").removeprefix("_") for split in self._validation_splits)

    def prepare_data(self) -> None:
        """Read and encode in one process what the Trainer's stage needs; without a Trainer, what fit needs."""
        stage = self.trainer.state.fn if self.trainer is not None else None
        self._prepare("fit" if stage is None else stage.value)

    def setup(self, stage: str) -> None:
        """Map the rows of ``stage`` (fit, validate, test or predict) into memory."""
        self._prepared.update(self._prepare(stage))

    def train_dataloader(self) -> DataLoader[Any]:
        """Training batches, sharded over the processes of the Trainer."""
        (rows,) = self._prepared["train"]
        shard: dict[str, Any] = {"num_replicas": 1, "rank": 0}
        if self.trainer is not None:  # the property is None in a single process
            shard = self.trainer.distributed_sampler_kwargs or shard
        self._train_loader = loader = self._loader(rows, "train", self._train_sampler(rows, shard))
        position, self._train_position = self._train_position, None
        if position is not None and isinstance(loader, ResumableLoader):
            loader.load_state_dict(position)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """The position of the training loader in its epoch."""
        # Lightning also asks the loader itself, but restores its state only if nobody asked for the length of the run
        # before, and schedules do.
        loader = self._train_loader
        return {"train_loader": loader.state_dict()} if isinstance(loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next training loader continue from that position."""
        self._train_position = state_dict.get("train_loader")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation batches in the order of the file; a list where there are several validation sets."""
        return self._loaders("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Test batches in the order of the file."""
        return self._loaders("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches without labels, in the order of the file."""
        return self._loaders("predict")

    # What a sub-class defines.

    def _load_processor(self) -> None:
        """Load the tokenizer, or whatever else makes model inputs."""

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        """Set ``num_labels`` and ``label_names``."""

    def _is_labelled(self, rows: Dataset, role: str) -> bool:  # noqa: ARG002 - a sub-class looks at rows
        """Whether the batches of these rows hold labels."""
        return role != "predict"

    def _columns(self, labelled: bool) -> list[str]:
        """Columns that :meth:`_encode` reads."""
        raise NotImplementedError

    def _recipe(self) -> list[Any]:
        """Everything but the rows that changes the result of :meth:`_encode`; must be JSON."""
        raise NotImplementedError

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        """Make model inputs and, if ``labelled``, ``labels`` of some rows of a split."""
        raise NotImplementedError

    def _collator(self, role: str) -> Collator:
        """Makes a batch of a list of encoded rows."""
        raise NotImplementedError

    def _train_sampler(self, rows: Dataset, shard: dict[str, Any]) -> RowSampler:
        """The order of the training rows; ``shard`` holds the rank and the number of processes."""
        # Lightning keeps a DistributedSampler as it is and only tells it the epoch.
        return RowSampler(rows, **shard, seed=self.seed)

    # From a source to the encoded rows of a role.

    def _prepare(self, stage: str) -> dict[str, list[Dataset]]:
        """Role → its encoded rows."""
        readers = self._readers()
        wanted = self._wanted(stage, readers)
        self._split_readers = readers
        self._stage_splits = list(dict.fromkeys(split for splits in wanted.values() for split in splits))
        self._load_processor()
        self._learn_labels(readers)
        return {
            role: [self._hold_out(self._encoded(readers[split](), split, role), role) for split in splits]
            for role, splits in wanted.items()
        }

    def _readers(self) -> dict[str, Reader]:
        """How to read each split that the source has."""
        return open_source(self.path, self.name, self.revision, self.data_files, self._split_names())

    def _split_names(self) -> tuple[str, ...]:
        return ("train", *self._validation_splits, *self._test_splits, "predict")

    @property
    def _source(self) -> str:
        """The name of the source in errors."""
        return self.path or "data_files"

    def _wanted(self, stage: str, readers: dict[str, Reader]) -> dict[str, Sequence[str]]:
        """Role → the splits that play it in the stage, all of which the source has."""
        present = [split for split in self._validation_splits if split in readers]
        if self.validation_fraction is not None and present:
            raise UsageError(
                f"validation_fraction={self.validation_fraction} is for a source without validation split, but this "
                f"one has {', '.join(map(repr, present))}: leave out one of the two."
            )
        tests_only = "predict" not in readers and all(split in readers for split in self._test_splits)
        splits: dict[str, Sequence[str]] = {
            "train": ("train",),
            "validation": self._validation_splits if self.validation_fraction is None else ("train",),
            "test": self._test_splits,
            "predict": self._test_splits if tests_only else ("predict",),
        }
        validates = self.trainer is None or self.trainer.limit_val_batches != 0
        fit = ("train", "validation") if validates else ("train",)
        roles = {"fit": fit, "validate": ("validation",)}.get(stage, (stage,))
        for role in roles:
            missing = [split for split in splits[role] if split not in readers]
            if missing:
                held_out = ", or validation_fraction to hold rows out of the training split"
                instead = held_out if role == "validation" and "train" in readers else ""
                unless = ", or limit_val_batches=0 to train without it" if stage == "fit" and instead else ""
                raise UsageError(
                    f"The stage {stage!r} needs the split {', '.join(map(repr, missing))}, but {self._source} only has "
                    f"{', '.join(map(repr, readers))}: give files for it{instead}{unless}."
                )
        return {role: splits[role] for role in roles}

    def _encoded(self, rows: Dataset, split: str, role: str) -> Dataset:
        reader = self._split_readers[split]
        if len(rows) == 0:
            where = named(reader.files) or f" of {self._source}"
            raise UsageError(f"The split {split!r}{where} is empty: give it some rows.")
        labelled = self._is_labelled(rows, role)
        require_columns(rows, split, self._columns(labelled), reader.files)
        made_of = [rows._fingerprint, split, labelled, type(self).__qualname__, self._recipe(), __version__]

        def encode(part: Rows, numbers: list[int]) -> Rows:
            return self._encode(part, [Place(split, number, len(rows), reader) for number in numbers], labelled)

        return rows.map(
            encode,
            batched=True,
            batch_size=self._rows_at_once,
            with_indices=True,
            remove_columns=rows.column_names,
            # Without it `datasets` hashes this object, whose tokenizer changes its state with the first use.
            new_fingerprint=fingerprint(made_of),
            desc=f"Encoding {split}",
        )

    def _hold_out(self, rows: Dataset, role: str) -> Dataset:
        """The part of ``rows`` that plays ``role`` when the validation split is held out of 'train'."""
        # Encoded rows are divided, so that errors number rows as in the file.
        if self.validation_fraction is None or role not in ("train", "validation"):
            return rows
        try:
            parts = rows.train_test_split(self.validation_fraction, seed=_HELD_OUT_SEED)
        except ValueError as error:
            raise UsageError(
                f"validation_fraction={self.validation_fraction} of the {len(rows)} rows of 'train' leaves nothing "
                f"on one side: give more rows or files for validation."
            ) from error
        return parts["train" if role == "train" else "test"]

    def _backbone_of(self, part: str) -> str:
        """The backbone of the Trainer's module, which has a ``part`` (tokenizer …) where none is given."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, str):
            raise UsageError(
                f"No {part} is given, and there is no LightningModule with a backbone whose {part} could be used: give "
                f"{part}, a hub id or a folder."
            )
        return backbone

    def _loaders(self, role: str) -> DataLoader[Any] | list[DataLoader[Any]]:
        loaders = [self._loader(rows, role) for rows in self._prepared[role]]
        return loaders[0] if len(loaders) == 1 else loaders

    def _loader(self, rows: Dataset, role: str, sampler: RowSampler | None = None) -> DataLoader[Any]:
        kind = DataLoader if sampler is None else ResumableLoader
        return kind(
            rows,
            batch_size=self.batch_size if role == "train" else self.eval_batch_size or self.batch_size,
            sampler=sampler,
            collate_fn=self._collator(role),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
            # Its own generator: what validation draws from the global one would be missing in a resumed run.
            generator=torch.Generator().manual_seed(self.seed),
        )
