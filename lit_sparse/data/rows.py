"""The base of the data modules: splits, the roles they play, and batches of their rows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lit_sparse.data.sampling import ResumableLoader, RowSampler
from lit_sparse.data.sources import DataFiles, Reader, open_source
from lit_sparse.errors import UsageError

Collator = Callable[[list[dict[str, Any]]], Any]

_CARVING_SEED = 0  # not the argument `seed`: runs that differ in it share one validation set


class RowData(LightningDataModule):
    """Finds the splits that a stage needs and serves their rows in batches; a sub-class makes the rows ready.

    A split plays up to four roles: "train" and "validation" in the stage fit, "validation", "test" and
    "predict" in the stages of that name. Only the splits that a stage needs are read. Prediction takes the
    split "predict", or the test split where there is none, and its batches hold no labels.

    Args:
        path: Where the rows are; see the sub-classes.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, or list of files that are read one after another, for files that are not named by
            split.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        num_workers: Processes that assemble batches; 0 is this one.
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
        data_files: DataFiles | None = None,
        validation_fraction: float | None = None,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise UsageError(f"{key} counts rows, at least 1; got {value}.")
        if num_workers < 0:
            raise UsageError(f"num_workers counts processes, 0 for none; got {num_workers}.")
        self.path = path
        self.name = name
        self.revision = revision
        self.data_files = data_files
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._prepared: dict[str, list[Dataset]] = {}
        self._train_loader: DataLoader[Any] | None = None
        self._place: dict[str, int] | None = None

    @property
    def validation_names(self) -> tuple[str, ...]:
        """One name per validation data loader; "" where there is a single one."""
        return tuple(split.removeprefix("validation").removeprefix("_") for split in self._validation_splits)

    def prepare_data(self) -> None:
        """Read and make ready what the Trainer's stage needs (without a Trainer: fit), in one process."""
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
        place, self._place = self._place, None
        if place is not None and isinstance(loader, ResumableLoader):
            loader.load_state_dict(place)
        return loader

    def state_dict(self) -> dict[str, Any]:
        """Where in the epoch the training rows are."""
        # Lightning asks the loader itself too, but gives it its state back only if nobody asked for the length of the
        # run before, as schedules do.
        loader = self._train_loader
        return {"train_loader": loader.state_dict()} if isinstance(loader, ResumableLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there, with the next training loader."""
        self._place = state_dict.get("train_loader")

    def val_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Validation batches in the order of the file; a list where there are several validation sets."""
        return self._loaders("validation")

    def test_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Test batches in the order of the file."""
        return self._loaders("test")

    def predict_dataloader(self) -> DataLoader[Any] | list[DataLoader[Any]]:
        """Batches without labels, in the order of the file."""
        return self._loaders("predict")

    # What a sub-class says about its rows.

    def _prepare(self, stage: str) -> dict[str, list[Dataset]]:
        """Role → the rows that play it in the stage, ready for the collator."""
        raise NotImplementedError

    def _collator(self, role: str) -> Collator:
        """What makes a batch of rows."""
        raise NotImplementedError

    def _train_sampler(self, rows: Dataset, shard: dict[str, Any]) -> RowSampler:
        """The order of the training rows; ``shard`` says which process of how many this is."""
        # Lightning leaves a DistributedSampler alone but for telling it the epoch.
        return RowSampler(rows, **shard, seed=self.seed)

    # From a source to the rows of a role.

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
                    f"{self.path or 'data_files'} only has {', '.join(map(repr, readers))}: give files for it"
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

    def _backbone_of(self, part: str) -> str:
        """The backbone of the Trainer's module, which has a ``part`` (tokenizer …) where none is given."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        backbone = getattr(module, "backbone", None)
        if not isinstance(backbone, str):
            raise UsageError(
                f"No {part} is given, and there is no LightningModule with a backbone whose {part} could "
                f"be used: give {part}, a hub id or a folder."
            )
        return backbone

    def _require_rows(self, rows: Dataset, split: str) -> None:
        if len(rows) == 0:
            raise UsageError(f"The split {split!r} of {self.path or 'data_files'} is empty: give it some rows.")

    def _carve(self, rows: Dataset, role: str) -> Dataset:
        """The part of ``rows`` that plays ``role`` when the validation split is held out of 'train'."""
        # Rows are cut apart after they were made ready, so that errors number them as in the file.
        if self.validation_fraction is None or role not in ("train", "validation"):
            return rows
        try:
            parts = rows.train_test_split(self.validation_fraction, seed=_CARVING_SEED)
        except ValueError as error:
            raise UsageError(
                f"validation_fraction={self.validation_fraction} of the {len(rows)} rows of 'train' leaves nothing "
                f"on one side: give more rows or files for validation."
            ) from error
        return parts["train" if role == "train" else "test"]

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
            # Of its own: what a validation draws here must not be missing in a run that is resumed after it.
            generator=torch.Generator().manual_seed(self.seed),
        )
