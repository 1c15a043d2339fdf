"""Names and contents of files of rows: endings, patterns of names, compression."""

import glob
import io
import os
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}

# Name of a file or folder → the split that it holds; the names for validation are those of `datasets`.
SPLITS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "predict": "predict",
}


def ending(file: Path) -> str:
    """The ending of a name that says how rows are written, in lower case and without that of a compression."""
    return split_name(file)[1]


def split_name(file: Path) -> tuple[str, str]:
    """Name without its endings, and :func:`ending`: ``train`` and ``.csv`` of ``train.CSV.gz``."""
    plain = Path(file.stem) if file.suffix.lower() in _COMPRESSIONS else Path(file.name)
    return plain.stem, plain.suffix.lower()


def open_bytes(file: Path) -> BinaryIO:
    """Open a file for reading; files that end in .gz or .zst are decompressed as they are read."""
    stream = pa.input_stream(str(file), compression=_COMPRESSIONS.get(file.suffix.lower()))
    return cast(BinaryIO, io.BufferedReader(stream))


def not_utf8(error: UnicodeDecodeError) -> str:
    """What a message says of bytes that are no text."""
    byte = error.object[error.start]
    return f"is not UTF-8 (byte 0x{byte:02x}): save the file as UTF-8"


def local_path(name: str | os.PathLike[str]) -> Path:
    """The path, from a user's home folder where it begins with ``~`` or ``~user``."""
    try:
        return Path(name).expanduser()
    except RuntimeError:  # there is no such user: the file itself has this name
        return Path(name)


def matching(name: str | os.PathLike[str]) -> list[Path]:
    """The file of this name; if there is none, the files that match it as a pattern, sorted.

    ``*``, ``?`` and ``[…]`` match within a name, ``**`` matches any folders. Hidden files do not match.
    """
    path = local_path(name)
    if path.exists() or not glob.has_magic(str(path)):
        return [path]
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207 - Path.glob takes no absolute pattern
    return [file for file in map(Path, sorted(found)) if not file.is_dir()]
