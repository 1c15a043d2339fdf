"""Files of checkpoints: written whole or not at all, and read only when they are sound."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.errors import TrainingError, UsageError


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
        for left in file.parent.glob(f".{file.name}.*.part"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)
        part = file.with_name(f".{file.name}.{os.getpid()}.part")
        try:
            with part.open("wb") as stream:
                torch.save(checkpoint, stream)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of some
            raise TrainingError(
                f"The checkpoint {str(file)!r} cannot be written ({error}): make room. What was written before is as "
                "it was."
            ) from error
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
        return super().load_checkpoint(path if is_remote(path) else usable(path), map_location, weights_only)


def usable(path: _PATH) -> Path:
    """The checkpoint to read where ``path`` is asked for.

    Args:
        path: A file, or the folder of a sharded checkpoint.

    Returns:
        ``path``, or the newest sound checkpoint in its folder where it is a damaged file named ``last…``.

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
    """The newest sound checkpoint in a folder, to resume from whatever happened: ``trainer.fit(…, ckpt_path=…)``.

    Args:
        folder: Where a ``ModelCheckpoint`` writes, its ``dirpath``.
        pattern: What the names of the files look like.

    Returns:
        The file that was written last among those of such a name that are not damaged, None if there is none.
    """
    return next((file for file in _newest_first(Path(folder).glob(pattern)) if is_sound(file)), None)


def is_sound(file: Path) -> bool:
    """Whether a checkpoint file is whole, and its contents have the checksums that were written with them."""
    try:
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError):  # what a broken header may look like
        return False


def _newest_first(files: Iterable[Path]) -> list[Path]:
    dated = []
    for file in files:
        with suppress(FileNotFoundError):  # removed by a run that is still going on
            dated.append((file.stat().st_mtime_ns, str(file), file))
    return [file for _, _, file in sorted(dated, reverse=True)]


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
