"""Batches of rows of unequal length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

IGNORED = -100  # the label that torch's cross entropy leaves out


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
    """Makes a batch of rows by padding them to the longest.

    Args:
        tokenizer: Pads the columns that are model inputs.
        integers: Columns of lists of integers to pad with -100, where the rows have them.
        texts: Columns that become lists, where the rows have them. All other columns are left out.
    """

    tokenizer: PreTrainedTokenizerBase
    integers: tuple[str, ...]
    texts: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of shape (rows, longest row), of type long, and the texts."""
        names = self.tokenizer.model_input_names
        inputs = [{name: row[name] for name in names if name in row} for row in rows]
        batch: dict[str, Any] = dict(DataCollatorWithPadding(self.tokenizer)(inputs))
        batch |= {name: pad([row[name] for row in rows]) for name in self.integers if name in rows[0]}
        return batch | {name: [row[name] for row in rows] for name in self.texts if name in rows[0]}


@dataclass(frozen=True)
class PadPromptAndResponse:
    """Makes a batch of rows for a causal language model.

    Args:
        pad_token_id: Token to pad ``input_ids`` with; ``attention_mask`` is 0 and ``labels`` are -100 there.
        left: Whether the padding goes to the left.
        texts: Columns that become lists of texts.
    """

    pad_token_id: int
    left: bool = False
    texts: tuple[str, ...] = ()

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """Return tensors of type long, (rows, longest row).

        They are ``input_ids``, ``attention_mask``, and ``labels`` if the rows have them. Packed rows have
        ``position_ids`` in place of the mask, and padding is at position 0.
        """
        ids = [row["input_ids"] for row in rows]
        batch: dict[str, Any] = {"input_ids": pad(ids, self.pad_token_id, left=self.left)}
        if "position_ids" in rows[0]:
            batch["position_ids"] = pad([row["position_ids"] for row in rows], 0, left=self.left)
        else:
            batch["attention_mask"] = pad([[1] * len(row) for row in ids], 0, left=self.left)
        if "labels" in rows[0]:
            batch["labels"] = pad([row["labels"] for row in rows], left=self.left)
        return batch | {name: [row[name] for row in rows] for name in self.texts}
