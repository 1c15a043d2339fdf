"""A causal model's prediction of each token of an answer, given the prompt and the answer's earlier tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.padding import IGNORED, PadRows
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.errors import UsageError, parse_json, reason_of


@dataclass(frozen=True)
class Forced:
    """The tokens of a prompt and its answer.

    Args:
        input_ids: Tokens of the prompt, then of the answer.
        start: Index of the answer's first token, at least 1.
    """

    input_ids: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.input_ids[self.start :]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Forced]:
    """Tokenise prompts, each with its answer.

    A space joins them unless the prompt ends, or the answer begins, with white space. Both are tokenised as one text.
    The answer begins at the first token that differs from the tokens of the prompt alone. So special tokens at the
    front belong to the prompt, and a token that spans both belongs to the answer.

    Args:
        tokenizer: Tokenizer of the model.
        pairs: Prompts and answers.

    Raises:
        UsageError: If there is no token before an answer, or none in it.
    """
    wholes = [
        prompt + ("" if prompt[-1:].isspace() or answer[:1].isspace() else " ") + answer for prompt, answer in pairs
    ]
    heads, whole_ids = open_ended(tokenizer, [prompt for prompt, _ in pairs]), open_ended(tokenizer, wholes)
    encoded = []
    for (prompt, answer), head, ids in zip(pairs, heads, whole_ids, strict=True):
        start = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), min(len(head), len(ids)))
        if not 0 < start < len(ids):
            raise UsageError(
                f"The prompt {prompt!r} with the answer {answer!r} has {len(ids)} tokens, {start} of them in the "
                "prompt; prompt and answer need at least one each. Does the tokenizer know this text?"
            )
        encoded.append(Forced(ids, start))
    return encoded


def read_texts(file: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int | None = None) -> list[list[int]]:
    """The first tokens of the texts of a file that have two or more.

    Args:
        file: JSON Lines with a column ``text``.
        tokenizer: Tokenizer of the model.
        length: Most tokens of a text.
        most: The file is read up to so many texts; None: to its end.

    Raises:
        UsageError: If the file cannot be read, a line is something else, or there is no such text.
    """
    found: list[list[int]] = []
    try:
        with Path(file).open(encoding="utf-8", newline="\n") as lines:  # texts may contain other line separators
            for number, line in enumerate(lines, 1):
                if len(found) == most:
                    break
                if line.strip():
                    (ids,) = open_ended(tokenizer, [_text_of(line, f"Line {number} of {file!r}")])
                    found += [ids[:length]] if len(ids) > 1 else []
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The texts {file!r} cannot be read: {reason_of(error)}.") from error
    if not found:
        raise UsageError(f"{file!r} has no text of at least two tokens.")
    return found


def _text_of(line: str, where: str) -> str:
    try:
        row = parse_json(line)
        text = row["text"]
    except (ValueError, TypeError, KeyError):
        text = None
    if not isinstance(text, str):
        raise UsageError(f'{where} must have a text, as {{"text": "Some words."}} has; it is {line[:60]!r}.')
    return text


def collate(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Forced], anchors: Sequence[Forced] = (), weight: float = 1.0
) -> dict[str, Tensor]:
    """A batch with labels on the answers alone, padded on the right.

    Args:
        tokenizer: Tokenizer of the model.
        rows: Prompts with their answers.
        anchors: Texts whose tokens from ``start`` on are held; without labels. Their weights are in ``held``, then.
        weight: Sum of these weights.
    """
    padding = PadRows(int(tokenizer.pad_token_id))
    learnt = [{"input_ids": row.input_ids, "labels": [IGNORED] * row.start + row.answer} for row in rows]
    kept = [{"input_ids": row.input_ids, "labels": [IGNORED] * len(row.input_ids)} for row in anchors]
    batch: dict[str, Tensor] = padding([*learnt, *kept])
    if anchors:
        held = torch.zeros(batch["labels"].shape)
        share = weight / sum(len(row.answer) for row in anchors)
        for place, row in enumerate(anchors, len(rows)):
            held[place, row.start : len(row.input_ids)] = share
        batch["held"] = held
    return batch


def batches(
    model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], size: int, left: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Padded batches of ``input_ids`` and ``attention_mask``, on the model's device."""
    padding = PadRows(int(tokenizer.pad_token_id), left=left)
    for first in range(0, len(rows), size):
        batch = padding([{"input_ids": ids} for ids in rows[first : first + size]])
        yield {name: tensor.to(model.device) for name, tensor in batch.items()}


@torch.no_grad()
def predict(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Forced], batch_size: int) -> list[list[int]]:
    """The most likely token in the place of each token of each answer.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: Its tokenizer, for padding.
        rows: Prompts with answers.
        batch_size: Rows per batch; rows of similar length share a batch.

    Returns:
        For each row as many tokens as its answer has.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    likely: list[list[int]] = []
    for batch in batches(model, tokenizer, [rows[i].input_ids for i in order], batch_size):
        likely += model(**batch, use_cache=False).logits.argmax(-1).tolist()
    by_row = dict(zip(order, likely, strict=True))
    # Each token is predicted at the position before it.
    return [by_row[i][row.start - 1 : len(row.input_ids) - 1] for i, row in enumerate(rows)]
