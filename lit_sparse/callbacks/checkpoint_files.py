"""Checkpoint files: written whole or not at all, and read only if they are undamaged."""

from __future__ import annotations

import glob
import os
import uuid
import zipfile
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.foreign_errors import is_disk_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class WholeFiles(TorchCheckpointIO):
    """Write a local checkpoint whole or not at all, and read none that is damaged; remote ones as Lightning does."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a file beside ``path``, and rename it once it is on the disk.

        Raises:
            TrainingError: If it cannot be written, for example because the disk is full.
        """
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(file)
        part = file.with_name(f".{file.name}.{uuid.uuid4().hex}.part")
        try:
            with part.open("wb") as stream:
                _lock(stream)
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
                if fcntl is None:  # Windows renames no open file
                    stream.close()
                part.replace(file)
        except (OSError, RuntimeError) as error:  # torch turns some errors into a RuntimeError
            raise TrainingError(_not_written(file, checkpoint, error)) from error
        finally:
            part.unlink(missing_ok=True)
        _sync_folder(file.parent)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read ``path``, or the checkpoint that :func:`usable` finds in its place."""
        # By default, Lightning would unpickle what it gets from a URL, and so run code.
        safe = weights_only is not False
        return super().load_checkpoint(path if is_remote(path) else usable(path), map_location, safe)


def usable(path: _PATH) -> Path:
    """The checkpoint to read for ``path``.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Returns:
        ``path``; for a damaged file named ``last…``, the undamaged checkpoint in its folder with the highest step.

    Raises:
        UsageError: If there is nothing at ``path``, or it is damaged and has no replacement.
    """
    file = Path(path)
    if file.is_file() and is_sound(file):
        return file
    if file.is_dir():
        if not (file / ".metadata").is_file():  # written by torch.distributed.checkpoint
            raise UsageError(f"{str(file)!r} is a folder but not a sharded checkpoint. Name a file in it.")
        return file
    other = last_checkpoint(file.parent)
    if not file.exists():
        hint = f" The newest in its folder is {str(other)!r}." if other is not None else ""
        raise UsageError(f"The checkpoint {str(file)!r} does not exist.{hint}")
    if other is not None and file.name.startswith("last"):
        rank_zero_warn(f"{file} is damaged, perhaps by an interrupted write. Using the older {other}.")
        return other
    instead = f"The newest undamaged one is {str(other)!r}" if other is not None else "Its folder has no other"
    raise UsageError(f"The file {str(file)!r} is not a checkpoint or is damaged. {instead}.")


def last_checkpoint(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> Path | None:
    """The undamaged checkpoint of a folder with the highest step, to resume by ``trainer.fit(…, ckpt_path=…)``.

    Args:
        folder: ``dirpath`` of a checkpoint callback, with files of one run.
        pattern: Pattern of the file names, as for :meth:`pathlib.Path.glob`.

    Returns:
        The file with the highest optimizer step, and of several with that step the newest; None if there is none.
        Files that record no step come after those that do.
    """
    return next((file for file in furthest_first(Path(folder).glob(pattern)) if is_sound(file)), None)


def furthest_first(files: Iterable[Path]) -> list[Path]:
    """Sort checkpoint files by the optimizer step that they record, highest first, files without a step last."""
    ordered = []
    for file in files:
        with suppress(FileNotFoundError):  # a run that still trains may remove it
            step = read_lightly(file).get("global_step")
            ordered.append((step if isinstance(step, int) else -1, file.stat().st_mtime_ns, str(file), file))
    return [file for *_, file in sorted(ordered, reverse=True)]


def read_lightly(file: Path) -> dict[str, Any]:
    """Load a checkpoint without reading its tensors, which stay mapped to the file; empty if it is not readable."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception:  # a damaged file or one of another program may raise anything
        return {}
    return found if isinstance(found, dict) else {}


def is_sound(file: Path) -> bool:
    """Whether a checkpoint file is complete and its contents match their checksums."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):  # a broken header may raise any of these
        return False


def _lock(stream: IO[bytes]) -> None:
    """Lock a file until it is closed or its process ends; does nothing on Windows."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)


def _remove_leftovers(file: Path) -> None:
    """Remove half-written files of killed processes beside ``file``, but not those that a process still writes."""
    for part in file.parent.glob(f".{glob.escape(file.name)}.*.part") if fcntl is not None else ():
        with suppress(OSError), part.open("rb+") as stream:  # an OSError if it is locked or gone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if part.stat().st_size:  # an empty one was just opened and is about to be locked
                part.unlink()


def _not_written(file: Path, checkpoint: Mapping[str, Any], error: BaseException) -> str:
    kept = last_checkpoint(file.parent)
    remains = f"{str(kept)!r} of step {_step(read_lightly(kept))} is kept" if kept else "There is no earlier one"
    if is_disk_full(error):
        return (
            f"The disk is full: the checkpoint {str(file)!r} of step {_step(checkpoint)} cannot be written. {remains}. "
            "Free space or set dirpath to a folder on another disk, and resume with --ckpt_path."
        )
    return f"The checkpoint {str(file)!r} cannot be written ({error}). {remains}."


def _step(checkpoint: Mapping[str, Any]) -> object:
    return checkpoint.get("global_step", "unknown")


def _sync_folder(folder: Path) -> None:
    """Make sure that a rename is on the disk; systems that cannot open folders, such as Windows, do so themselves."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_remote(path: _PATH) -> bool:
    """Whether a path is a URL rather than a path of this machine."""
    return "://" in str(path)
