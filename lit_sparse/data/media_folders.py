"""Folders of files, with the name of a split or of a class each."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Value
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.data.tables import ENDINGS
from lit_sparse.errors import UsageError

# Name of a folder -> the split whose files it holds.
_FOLDERS = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "predict": "predict",
}


def find_folders(root: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Split → its folder; all is the training split where there are only classes; empty if it is no such folder."""
    if not root.is_dir() or _has_tables(root):
        return {}
    found: dict[str, Path] = {}
    for name, split in _FOLDERS.items():
        if not (root / name).is_dir():
            continue
        if split in found:
            raise UsageError(f"The split {split!r} must be one folder, but {root} has {found[split].name} and {name}.")
        found[split] = root / name
    if any(_has_files(folder, endings) for folder in found.values()):
        return found
    classes = [folder for folder in root.iterdir() if folder.is_dir()]
    direct = any(file.suffix.lower() in endings for folder in classes for file in folder.iterdir())
    return {"train": root} if direct else {}


def _has_tables(root: Path) -> bool:
    """Whether tables say what the files are: one for each split, or the metadata.csv that `datasets` reads."""
    tables = [file for file in (*root.glob("*.*"), *root.glob("*/metadata.*")) if file.suffix in ENDINGS]
    return any(file.stem.split("-")[0] in (*_FOLDERS.values(), "metadata") for file in tables)


def _has_files(folder: Path, endings: tuple[str, ...]) -> bool:
    return any(file.suffix.lower() in endings for file in folder.rglob("*"))


def read_folder(folder: Path, split: str, kind: str, endings: tuple[str, ...]) -> Dataset:
    """Rows of a path and the name of the folder it lies in, directly or not, below ``folder``.

    The loaders of `datasets` for folders are not used: the one for sounds needs torchcodec, and both give all splits
    one list of classes, so that a class without training rows would pass.
    """
    files, ignored = [], set()
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        if file.suffix.lower() in endings:
            # The time is not read, but makes rows of a changed file new ones for the cache.
            files.append((str(file), parts[0] if len(parts) > 1 else None, file.stat().st_mtime_ns))
        else:
            ignored.add(file.suffix or file.name)
    if ignored:
        rank_zero_warn(
            f"Files in {folder} that end in {', '.join(sorted(ignored))} are left out; {kind} files end in "
            f"{', '.join(endings)}."
        )
    if not files:
        raise UsageError(f"The split {split!r} is empty: {folder} has no files ending in {', '.join(endings)}.")
    features = Features({kind: Value("string"), "label": Value("string")})
    arguments = {"files": tuple(files), "column": kind}
    return Dataset.from_generator(_rows_of, features=features, gen_kwargs=arguments)


def _rows_of(files: tuple[tuple[str, str | None, int], ...], column: str) -> Iterator[dict[str, str | None]]:
    for file, label, _ in files:
        yield {column: file, "label": label}
