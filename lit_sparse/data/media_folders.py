"""Folders of files, named by split and by class."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, Features, Value
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.data.files import SPLITS, split_name
from lit_sparse.data.tables import ENDINGS
from lit_sparse.errors import UsageError


def find_folders(root: Path, endings: tuple[str, ...]) -> dict[str, Path]:
    """Find the folders of splits.

    Args:
        root: Folder with a folder for each split, or with a folder for each class.
        endings: How the names of the files end.

    Returns:
        Split → its folder. A folder of classes is the training split. Empty if ``root`` is neither.

    Raises:
        UsageError: If two folders are of the same split.
    """
    if not root.is_dir() or _has_tables(root):
        return {}
    found: dict[str, Path] = {}
    for name, split in SPLITS.items():
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
    """Whether tables describe the files: one for each split, or the metadata.csv that `datasets` reads."""
    names = [split_name(file) for file in (*root.glob("*.*"), *root.glob("*/metadata.*"))]
    return any(end in ENDINGS and stem.split("-")[0] in (*SPLITS, "metadata") for stem, end in names)


def _has_files(folder: Path, endings: tuple[str, ...]) -> bool:
    return any(file.suffix.lower() in endings for file in folder.rglob("*"))


def read_folder(folder: Path, split: str, kind: str, endings: tuple[str, ...]) -> Dataset:
    """Read a folder as rows of a path and a label, the name of the sub-folder of ``folder`` that holds the file.

    The loaders of `datasets` for folders are not used: the one for sounds needs torchcodec, and both give all splits
    one list of classes, so a class without training rows would go unnoticed.

    Args:
        folder: Folder with a folder for each class.
        split: Name of the split, for errors.
        kind: Name of the column of paths.
        endings: How the names of the files end; other files are left out with a warning.

    Raises:
        UsageError: If there is no such file.
    """
    files, ignored = [], set()
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if not file.is_file() or any(part.startswith(".") for part in parts):
            continue
        if file.suffix.lower() in endings:
            # The time only changes the name in the cache when a file changes.
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
