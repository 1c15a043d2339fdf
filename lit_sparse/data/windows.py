"""Windows of long texts: find the tokens of an answer, and make batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lit_sparse.data.padding import pad
from lit_sparse.data.readers import Rows
from lit_sparse.data.rows import Collator

OUTSIDE = -1  # the offset of tokens outside the context


@dataclass(frozen=True)
class PadQuestions:
    """Makes one batch of all windows of some questions; see ``QuestionAnsweringData``.

    Args:
        pad_windows: Pads windows to the longest.
    """

    pad_windows: Collator

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of type long, and ``id``, ``context`` and ``answers`` as lists."""
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        apart = {name: columns.pop(name) for name in ("id", "context", "answers", "row") if name in columns}
        windows = one_window_each(columns)
        offsets = windows.pop("offsets")
        inputs = [dict(zip(windows, values, strict=True)) for values in zip(*windows.values(), strict=True)]
        owners = [i for i, row in enumerate(rows) for _ in row["input_ids"]]
        return {
            **self.pad_windows(inputs),
            **apart,
            "row": torch.tensor(apart["row"]),
            "question": torch.tensor(owners),
            "offsets": pad(offsets, OUTSIDE),
        }


def answer_tokens(offsets: Sequence[Sequence[int]], answer: tuple[str, int] | None) -> tuple[int, int] | None:
    """First and last token of an answer, None unless the window holds all of it.

    Args:
        offsets: Start and end of each token of a window, in characters; (-1, -1) for tokens outside the context.
        answer: Text and first character; None is a question without an answer.
    """
    context = [token for token, (start, _) in enumerate(offsets) if start != OUTSIDE]
    if answer is None or not context:
        return None
    first, behind = answer[1], answer[1] + len(answer[0])
    if first < offsets[context[0]][0] or behind > offsets[context[-1]][1]:
        return None
    # Tokens that share a character with the answer.
    covered = [token for token in context if offsets[token][1] > first and offsets[token][0] < behind]
    return (covered[0], covered[-1]) if covered else None


def one_window_each(columns: Rows) -> Rows:
    """Columns of lists of windows, flattened."""
    return {name: [part for parts in values for part in parts] for name, values in columns.items()}


def one_window_a_row(rows: Rows) -> Rows:
    """Windows as the model is trained on them, from rows of questions."""
    apart = ("id", "context", "answers", "row", "offsets", "null_positions", "length")
    windows = one_window_each({name: values for name, values in rows.items() if name not in apart})
    return {**windows, "length": [len(ids) for ids in windows["input_ids"]]}
