"""Files with a word and its tag on each line, in the format of CoNLL-2003."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from datasets import Dataset, concatenate_datasets

from lit_sparse.data.files import open_bytes
from lit_sparse.data.readers import Kind, Kinds
from lit_sparse.data.sources import TABLES
from lit_sparse.errors import UsageError

_ENDINGS = (".conll", ".bio", ".txt")
_DOCUMENT = "-DOCSTART-"  # the line that opens a document


def read_conll(files: Sequence[Path], split: str, words: str, tags: str) -> Dataset:
    """Read sentences of lines whose first column is a word and whose last column is its tag.

    Args:
        files: Files that are read one after another.
        split: Name of the split. Lines of "predict" need no tag.
        words: Name of the column of words in the result.
        tags: Name of the column of tags.

    Raises:
        UsageError: If a file cannot be read or a line has no tag.
    """
    return concatenate_datasets([_read(file, split, words, tags) for file in files])


def with_conll(words: str, tags: str) -> Kinds:
    """The kinds of files of rows, and this one; arguments are those of :func:`read_conll`."""
    conll = Kind(partial(read_conll, words=words, tags=tags), lambda file: len(_read(file, "predict", words, tags)))
    return {**TABLES, **dict.fromkeys(_ENDINGS, conll)}


def _read(file: Path, split: str, words: str, tags: str) -> Dataset:
    try:
        with open_bytes(file) as stream:
            lines = stream.read().decode("utf-8-sig").split("\n")  # splitlines would also split within words
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The file {str(file)!r} of the split {split!r} cannot be read: {error}.") from error
    sentences: list[list[tuple[str, str]]] = [[]]
    for number, line in enumerate(map(str.rstrip, lines), start=1):
        columns = line.split("\t" if "\t" in line else " ")  # split() would also divide words at no-break spaces
        if not line or columns[0] == _DOCUMENT:
            sentences.append([])
            continue
        if len(columns) < 2 and split != "predict":
            raise UsageError(
                f"Line {number} of {file} is {line!r}, without a tag: write word and tag, with a tab or space between."
            )
        sentences[-1].append((columns[0], columns[-1]))
    filled = [sentence for sentence in sentences if sentence]
    rows = {words: [[word for word, _ in sentence] for sentence in filled]}
    if split != "predict":
        rows[tags] = [[tag for _, tag in sentence] for sentence in filled]
    return Dataset.from_dict(rows)
