"""Batches of rows of unequal length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label that torch's cross entropy leaves out
_ZERO = ("attention_mask", "token_type_ids", "position_ids")


def pad(sequences: Sequence[Any], value: int = IGNORED, *, left: bool = False) -> Tensor:
    """Pad lists or tensors of integers to the longest of them.

    Args:
        sequences: One list or tensor per row; all dimensions but the first are of equal size.
        value: The padding.
        left: Whether the padding goes to the left.

    Returns:
        Tensor of type long, shape (rows, longest row, …).
    """
    return torch.nn.utils.rnn.pad_sequence(
        [torch.as_tensor(sequence, dtype=torch.long) for sequence in sequences],
        batch_first=True,
        padding_value=value,
        padding_side="left" if left else "right",
    )


@dataclass(frozen=True)
class PadRows:
    """Makes a batch of rows of lists of integers by padding them to the longest.

    Args:
        pad_token_id: Pads ``input_ids``. Masks, types and positions of tokens are padded with 0, all else with -100.
        left: Whether the padding goes to the left.
        texts: Columns that become lists, where the rows have them.
        left_out: Columns that batches do not have.
    """

    pad_token_id: int
    left: bool = False
    texts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of shape (rows, longest row), of type long, and the texts.

        Rows without ``attention_mask`` get one, except for packed rows, which have ``position_ids`` in its place.
        """
        values = {"input_ids": self.pad_token_id, **dict.fromkeys(_ZERO, 0)}
        names = [name for name in rows[0] if name not in (*self.texts, *self.left_out)]
        lists = {name: [row[name] for row in rows] for name in names}
        if not {"attention_mask", "position_ids"} & lists.keys():
            lists["attention_mask"] = [[1] * len(ids) for ids in lists["input_ids"]]
        batch: dict[str, Any] = {n: pad(own, values.get(n, IGNORED), left=self.left) for n, own in lists.items()}
        return batch | {name: [row[name] for row in rows] for name in self.texts if name in rows[0]}
