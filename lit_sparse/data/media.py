"""The base of the data modules whose rows are files, such as images: check each file once, decode it when it is due."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from torch import Tensor

from lit_sparse._version import __version__
from lit_sparse.data.labels import HIDDEN, Classes, has_labels, learn_classes
from lit_sparse.data.media_folders import find_folders, read_folder
from lit_sparse.data.rows import Collator, RowData
from lit_sparse.data.sources import Reader, require_columns
from lit_sparse.errors import UsageError


class Medium(ABC):
    """How files of one kind are decoded and made into what a model takes; goes to the workers with the collator."""

    kind: ClassVar[str]
    """What a file is, in English; also the name of the column in a folder."""

    feature: ClassVar[Any]
    """The feature of `datasets` that leaves such files as they are."""

    endings: ClassVar[tuple[str, ...]]
    """How the names of such files end."""

    @abstractmethod
    def check(self, stream: BinaryIO) -> None:
        """Look at the beginning of a file; raise whatever tells that it cannot be decoded."""

    @abstractmethod
    def decode(self, stream: BinaryIO) -> Any:
        """Decode a file."""

    @abstractmethod
    def batch(self, decoded: list[Any]) -> dict[str, Tensor]:
        """What the model takes, for several decoded files."""


class MediaData(RowData):
    """Files with a class each: what :class:`~lit_sparse.ImageData` and :class:`~lit_sparse.AudioData` share.

    The beginning of every file is read once, before training, and the result kept in the cache of ``datasets``.
    Files are decoded when their batch is due.

    Args:
        path: Hub id, folder or file; see the sub-classes.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        validation_fraction: Share of the training split to hold out, in (0, 1).
        column: Column of the files.
        label: Column of the label.
        labels: Names of the classes in the order of their ids.
        processor: Hub id or folder of what makes model inputs; None is that of the model's ``backbone``.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction.
        num_workers: Processes that decode files and assemble batches; 0 is this one.
        seed: Seed of the order of training rows.
    """

    _medium_class: ClassVar[type[Medium]]

    def __init__(
        self,
        path: str,
        name: str | None,
        revision: str | None,
        validation_fraction: float | None,
        column: str,
        label: str,
        labels: list[str] | None,
        processor: str | None,
        batch_size: int,
        eval_batch_size: int | None,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            validation_fraction=validation_fraction,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.column = column
        self.label = label
        self.labels = labels
        self.processor = processor

    def _load_medium(self, name: str) -> Medium:
        """Load the processor called ``name``."""
        raise NotImplementedError

    def _collator(self, role: str) -> Collator:  # noqa: ARG002 - rows know whether they are labelled
        return MediaCollator(self._medium, self.column)

    def _readers(self) -> dict[str, Reader]:
        kind = self._medium_class
        folders = find_folders(Path(str(self.path)).expanduser(), kind.endings)
        if not folders:
            return super()._readers()
        if self.name or self.revision:
            raise UsageError(
                f"name and revision choose within a data set of the hub, but {self.path} is a folder of files: "
                f"leave out name={self.name!r} and revision={self.revision!r}."
            )
        return {
            split: partial(read_folder, folder, split, kind.kind, kind.endings) for split, folder in folders.items()
        }

    def _prepare(self, stage: str) -> dict[str, list[Dataset]]:
        readers = self._readers()
        wanted = self._wanted(stage, readers)
        self._medium = self._load_medium(self.processor or self._backbone_of("processor"))
        self._classes = learn_classes(readers, self.label, self.labels, str(self.path))
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)
        return {
            role: [self._carve(self._check_files(readers[split](), split, role), role) for split in splits]
            for role, splits in wanted.items()
        }

    def _check_files(self, rows: Dataset, split: str, role: str) -> Dataset:
        """Rows of a file, its ``origin`` in words and, if ``role`` needs it, the number of its class."""
        self._require_rows(rows, split)
        labelled = role != "predict" and (role != "test" or has_labels(rows, self.label))
        columns = [self.column, self.label] if labelled else [self.column]
        require_columns(rows, split, columns)
        rows = self._as_files(rows.select_columns(columns), split)
        feature = rows.features.get(self.label)
        made_of = [
            rows._fingerprint,
            split,
            [self.column, self.label, repr(self._medium)],
            [[repr(value), number] for value, number in self._classes.numbers.items()],
            __version__,
        ]
        checked = rows.map(
            partial(
                _check_row,
                column=self.column,
                label=self.label if labelled else None,
                names=feature.names if isinstance(feature, ClassLabel) else None,
                classes=self._classes,
                medium=self._medium,
                split=split,
            ),
            with_indices=True,
            remove_columns=rows.column_names,
            new_fingerprint=hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:32],
            desc=f"Checking {split}",
        )
        return concatenate_datasets([rows.select_columns([self.column]), checked], axis=1)

    def _as_files(self, rows: Dataset, split: str) -> Dataset:
        """The rows with their files undecoded, as bytes or path."""
        feature, medium = rows.features[self.column], self._medium
        plain = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
        paths = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")
        if not (plain or paths or isinstance(feature, type(medium.feature))):
            raise UsageError(
                f"The column {self.column!r} of the split {split!r} holds {feature}, which is no {medium.kind}: name "
                f"the column of the {medium.kind} files in {medium.kind}."
            )
        return rows.cast_column(self.column, medium.feature)


@dataclass(frozen=True)
class MediaCollator:
    """Decodes the files of a batch and makes of them what the model takes."""

    medium: Medium
    column: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch."""
        batch = self.medium.batch(
            [_use_file(self.medium.decode, row[self.column], row["origin"], self.medium.kind) for row in rows]
        )
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def _check_row(
    row: dict[str, Any],
    number: int,
    *,
    column: str,
    label: str | None,
    names: list[str] | None,
    classes: Classes,
    medium: Medium,
    split: str,
) -> dict[str, Any]:
    """What a batch needs to know of a row next to its file; ``names`` are those of the column's own classes."""
    file = row[column] or {"bytes": None, "path": None}
    origin = f"Row {number} (counted from 0) of the split {split!r}"
    if file["path"]:
        origin += f" ({file['path']})"
    _use_file(medium.check, file, origin, medium.kind)
    if label is None:
        return {"origin": origin}
    value = row[label]
    if names is not None and isinstance(value, int) and value != HIDDEN:
        value = names[value]  # another split may number its classes differently
    return {"origin": origin, "labels": classes.number_of(value, label, origin)}


def _use_file(use: Callable[[BinaryIO], Any], file: dict[str, Any], origin: str, kind: str) -> Any:
    """Open a file, do something with it, and name it in what goes wrong."""
    if file["bytes"] is None and file["path"] is None:
        raise UsageError(f"{origin} has no {kind}: fill it in or remove the row.")
    try:
        with BytesIO(file["bytes"]) if file["bytes"] is not None else Path(file["path"]).open("rb") as stream:
            return use(stream)
    except UsageError:
        raise
    except Exception as error:  # decoders raise errors of many kinds for a broken file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{origin} cannot be read as {kind} ({reason}): mend or remove it.") from error
