"""The base of the data modules of files, such as images: check each file once, decode it when its batch is due."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import torch
from datasets import ClassLabel, Dataset, Value, concatenate_datasets
from torch import Tensor

from lit_sparse.data import quickstart
from lit_sparse.data.labels import learn_classes
from lit_sparse.data.media_folders import find_folders, read_folder
from lit_sparse.data.readers import Place, Reader, RowError, Rows, per_row
from lit_sparse.data.rows import Collator, RowData
from lit_sparse.data.sources import refuse_hub_arguments, require_columns
from lit_sparse.errors import UsageError, reason_of


class Medium(ABC):
    """Decodes files of one kind and makes model inputs of them; part of the collator, which goes to the workers."""

    kind: ClassVar[str]
    """The kind in English; also the name of the argument that names the column, and of the column in folders."""

    feature: ClassVar[Any]
    """The feature of `datasets` that keeps such files undecoded."""

    endings: ClassVar[tuple[str, ...]]
    """How the names of such files end."""

    @abstractmethod
    def check(self, stream: BinaryIO) -> None:
        """Read the beginning of a file; raise any exception if the file cannot be decoded."""

    @abstractmethod
    def decode(self, stream: BinaryIO) -> Any:
        """Decode a file."""

    @abstractmethod
    def batch(self, decoded: list[Any]) -> dict[str, Tensor]:
        """Model inputs of several decoded files."""


@dataclass(kw_only=True, eq=False, repr=False)
class MediaData(RowData, ABC):
    """Files with a class each: what :class:`~lit_sparse.ImageData` and :class:`~lit_sparse.AudioData` share.

    The beginning of every file is read once, before training, and the result kept in the cache of ``datasets``.
    Files are decoded when their batch is due.

    Args:
        path: Where the files are. One of: a folder with a folder for each split (train, validation, test, predict) that
            has a folder for each class; a folder of classes alone, which is then the training split; a folder with
            tables named by split (train.parquet …) or laid out like a data set of the hub; the id of a data set on the
            hub. A table holds files or their paths, which start at the working directory.
        label: Column of the label; in folders it is ``label``.
        labels: Names of the classes in the order of their ids. None takes them from the training split: the names
            that the column itself has, otherwise its sorted distinct values.
        processor: Hub id or folder of the processor that makes model inputs; None is that of the model's ``backbone``.
        num_workers: Processes that decode files and assemble batches; 0 is the training process. A GPU waits for the
            files unless there are several.
    """

    label: str = "label"
    labels: list[str] | None = None
    processor: str | None = None

    _medium_class: ClassVar[type[Medium]]
    _rows_at_once = 1  # their files are in memory together

    @property
    def named_processor(self) -> str | None:
        """The processor in place of the backbone's, which exports write beside the model."""
        return self.processor

    @abstractmethod
    def _load_medium(self, name: str) -> Medium:
        """Load the processor called ``name``."""

    @property
    def _column(self) -> str:
        """The column of the files; the argument has the name of their kind."""
        return str(getattr(self, self._medium_class.kind))

    def _load_processor(self) -> None:
        self._medium = self._load_medium(self.processor or self._backbone_of("processor"))

    def _learn_labels(self, readers: dict[str, Reader]) -> None:
        self._classes = learn_classes(readers, self.label, self.labels, self._source)
        self.label_names, self.num_labels = self._classes.names, len(self._classes.names)

    def _is_labelled(self, rows: Dataset, role: str) -> bool:
        return self._classes.is_labelled(rows, role, self.label)

    def _columns(self, labelled: bool) -> list[str]:
        return [self._column, self.label] if labelled else [self._column]

    def _recipe(self) -> list[Any]:
        return [self._column, self.label, repr(self._medium), self._classes.recipe()]

    def _collator(self, role: str) -> Collator:  # noqa: ARG002 - rows know whether they are labelled
        return MediaCollator(self._medium, self._column)

    def _readers(self) -> dict[str, Reader]:
        kind = self._medium_class
        folders = find_folders(Path(self.path).expanduser(), kind.endings) if self.path is not None else {}
        if not folders:
            return super()._readers()
        refuse_hub_arguments(self._source, self.name, self.revision)
        return {
            split: Reader(partial(read_folder, folder, split, kind.kind, kind.endings))
            for split, folder in folders.items()
        }

    def _encoded(self, rows: Dataset, split: str, role: str) -> Dataset:
        """Rows of a file, its ``origin`` in words and, if ``role`` needs it, the number of its class."""
        require_columns(rows, split, [self._column], self._split_readers[split].files)
        rows = self._as_files(rows.select_columns([c for c in self._columns(True) if c in rows.column_names]), split)
        feature = rows.features.get(self.label)
        self._names_of_split = feature.names if isinstance(feature, ClassLabel) else None
        checked = super()._encoded(rows, split, role)
        return concatenate_datasets([rows.select_columns([self._column]), checked], axis=1)

    def _as_files(self, rows: Dataset, split: str) -> Dataset:
        """The rows with their files undecoded, as bytes or path."""
        feature, medium = rows.features[self._column], self._medium_class
        plain = isinstance(feature, dict) and set(feature) <= {"bytes", "path"}
        paths = isinstance(feature, Value) and feature.dtype in ("string", "large_string", "binary", "large_binary")
        if not (plain or paths or isinstance(feature, type(medium.feature))):
            raise UsageError(
                f"The column {self._column!r} of the split {split!r} holds {feature}, which is no {medium.kind}: name "
                f"the column of the {medium.kind} files in {medium.kind}."
            )
        return rows.cast_column(self._column, medium.feature)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        files = [file or {"bytes": None, "path": None} for file in rows[self._column]]
        origins = [
            f"{place} ({file['path']})" if file["path"] else str(place)
            for file, place in zip(files, places, strict=True)
        ]
        per_row(partial(_use_file, self._medium.check, self._medium.kind), files, origins)
        if not labelled:
            return {"origin": origins}
        names = map(self._name_of, rows[self.label])
        return {
            "origin": origins,
            "labels": per_row(partial(self._classes.number_of, column=self.label), names, origins),
        }

    def _name_of(self, label: Any) -> Any:
        """The name of a class that has a number in the source: another split may number its classes differently."""
        names = self._names_of_split
        return names[label] if names is not None and isinstance(label, int) and label >= 0 else label


@dataclass(frozen=True)
class MediaCollator:
    """Decodes the files of a batch and makes model inputs of them.

    Args:
        medium: The kind of files.
        column: The column of the files.
    """

    medium: Medium
    column: str

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch."""
        decode = partial(_use_file, self.medium.decode, self.medium.kind)
        batch = self.medium.batch(per_row(decode, (row[self.column] for row in rows), [row["origin"] for row in rows]))
        if "labels" in rows[0]:
            batch["labels"] = torch.tensor([row["labels"] for row in rows])
        return batch


def load_processor(loader: Any, name: str) -> Any:
    """Load an image processor or a feature extractor.

    Args:
        loader: The Auto class of `transformers` for it.
        name: Hub id, folder, or quickstart:// name.

    Raises:
        UsageError: If it cannot be loaded.
    """
    try:
        return loader.from_pretrained(quickstart.resolve(name))
    except (ImportError, OSError, ValueError) as error:
        raise UsageError(
            f"The processor {name!r} could not be loaded ({reason_of(error)}): give its folder, or its hub "
            f"id while the hub can be reached."
        ) from error


def _use_file(use: Callable[[BinaryIO], Any], kind: str, file: dict[str, Any]) -> Any:
    """Apply ``use`` to an open file."""
    if file["bytes"] is None and file["path"] is None:
        raise RowError(f"has no {kind}: fill it in or remove the row.")
    try:
        with BytesIO(file["bytes"]) if file["bytes"] is not None else Path(file["path"]).open("rb") as stream:
            return use(stream)
    except UsageError:
        raise
    except Exception as error:  # decoders raise errors of many kinds for a broken file
        raise RowError(f"cannot be read as {kind} ({reason_of(error)}): mend or remove it.") from error
