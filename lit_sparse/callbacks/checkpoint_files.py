"""Files of checkpoints: written whole or not at all, and read only when they are sound."""

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

from lit_sparse.errors import TrainingError, UsageError, is_disk_full

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class WholeFiles(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads none that is damaged; what is not on a disk as usual."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any | None = None) -> None:
        """Write a file beside ``path``, and rename it when it is on the disk.

        Raises:
            TrainingError: If it cannot be written, as on a full disk.
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
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of some
            raise TrainingError(_not_written(file, checkpoint, error)) from error
        finally:
            part.unlink(missing_ok=True)  # where it was not renamed
        _sync_folder(file.parent)

    def load_checkpoint(
        self,
        path: _PATH,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read ``path``, or what takes its place."""
        # Lightning would run the pickle that a URL gives, unless it is told not to.
        safe = weights_only is not False
        return super().load_checkpoint(path if is_remote(path) else usable(path), map_location, safe)


def usable(path: _PATH) -> Path:
    """The checkpoint to read where ``path`` is asked for.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Returns:
        ``path``, or the furthest sound checkpoint in its folder where it is a damaged file named ``last…``.

    Raises:
        UsageError: If there is nothing at ``path``, or it is damaged and nothing takes its place.
    """
    file = Path(path)
    if file.is_file() and is_sound(file):
        return file
    if file.is_dir():
        if not (file / ".metadata").is_file():  # torch.distributed.checkpoint's own file
            raise UsageError(f"{str(file)!r} is a folder, and no sharded checkpoint: name the file in it.")
        return file
    other = last_checkpoint(file.parent)
    if not file.exists():
        hint = f" The newest in its folder is {str(other)!r}." if other is not None else ""
        raise UsageError(f"The checkpoint {str(file)!r} does not exist.{hint}")
    if other is not None and file.name.startswith("last"):
        rank_zero_warn(f"{file} is damaged, as when a write is cut short; going on from the older {other}.")
        return other
    instead = f"the newest sound one is {str(other)!r}" if other is not None else "there is no other in its folder"
    raise UsageError(f"The file {str(file)!r} is no checkpoint, or a damaged one; {instead}.")


def last_checkpoint(folder: str | os.PathLike[str], pattern: str = "*.ckpt") -> Path | None:
    """The sound checkpoint in a folder that is furthest, to resume from: ``trainer.fit(…, ckpt_path=…)``.

    Args:
        folder: Where a checkpoint callback writes, its ``dirpath``; of one run.
        pattern: What the names of the files look like.

    Returns:
        The file of the highest optimizer step among those of such a name that are not damaged, None if there is none.
        Of several of one step it is the one written last. Files that record no step come after those that do.
    """
    return next((file for file in furthest_first(Path(folder).glob(pattern)) if is_sound(file)), None)


def furthest_first(files: Iterable[Path]) -> list[Path]:
    """Checkpoint files by the optimizer step that they record, the highest first; damaged and foreign ones last."""
    ordered = []
    for file in files:
        with suppress(FileNotFoundError):  # removed by a run that is still going on
            step = read_lightly(file).get("global_step")
            place = step if isinstance(step, int) else -1
            ordered.append((place, file.stat().st_mtime_ns, str(file), file))
    return [file for *_, file in sorted(ordered, reverse=True)]


def read_lightly(file: Path) -> dict[str, Any]:
    """A checkpoint whose tensors are mapped, not read, which takes no time for large ones; empty if it is none."""
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except Exception:  # whatever a damaged file, or one of another program, makes of it
        return {}
    return found if isinstance(found, dict) else {}


def is_sound(file: Path) -> bool:
    """Whether a checkpoint file is whole, and its contents have the checksums that were written with them."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):  # what a broken header may look like
        return False


def _lock(stream: IO[bytes]) -> None:
    """Mark a file as being written, until it is closed or its process is gone; on Windows nothing is marked."""
    if fcntl is not None:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(stream, fcntl.LOCK_EX)


def _remove_leftovers(file: Path) -> None:
    """Remove what a killed process left half-written beside ``file``, but nothing that another process is writing."""
    for part in file.parent.glob(f".{glob.escape(file.name)}.*.part") if fcntl is not None else ():
        with suppress(OSError), part.open("rb+") as stream:  # locked, or gone
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if part.stat().st_size:  # else it was opened just now and is about to be locked
                part.unlink()


def _not_written(file: Path, checkpoint: Mapping[str, Any], error: BaseException) -> str:
    kept = last_checkpoint(file.parent)
    if kept is None:
        remains = "there is no earlier one"
    else:
        remains = f"{str(kept)!r} of step {read_lightly(kept).get('global_step', 'unknown')} is kept"
    if is_disk_full(error):
        return (
            f"The disk is full: the checkpoint {str(file)!r} of step {checkpoint.get('global_step', 'unknown')} cannot "
            f"be written; {remains}. Make room, or name a folder on another disk in dirpath, and go on by --ckpt_path."
        )
    return f"The checkpoint {str(file)!r} cannot be written ({error}); {remains}."


def _sync_folder(folder: Path) -> None:
    """See that a rename is on the disk too; where folders cannot be opened, as on Windows, it is up to the system."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_remote(path: _PATH) -> bool:
    """Whether a path is not of this machine's file system."""
    return "://" in str(path)
