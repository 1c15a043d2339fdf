"""What a causal model predicts for each token of an answer, given the prompt and the answer's tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.instructions import IGNORED, PadPromptAndResponse
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class Forced:
    """A prompt with its answer, in tokens.

    Args:
        input_ids: Of prompt and answer.
        start: Number of the answer's first token in them, at least 1.
    """

    input_ids: list[int]
    start: int

    @property
    def answer(self) -> list[int]:
        """The answer's tokens."""
        return self.input_ids[self.start :]


def encode(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]) -> list[Forced]:
    """Tokens of prompts, each with an answer after it.

    A space is put between them where neither ends or begins with white space. The whole is tokenised as running text;
    the answer is what comes after the tokens that it has in common with the prompt alone, so that special tokens at the
    front belong to the prompt, and a token that reaches across the border to the answer.

    Args:
        tokenizer: Of the model.
        pairs: Prompt and answer.

    Raises:
        UsageError: If an answer has no token, or nothing stands before it.
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
                f"The prompt {prompt!r} with the answer {answer!r} has the tokens {ids}, of which {start} are the "
                "prompt's: there must be some before the answer, and some of it. Does the tokenizer know this text?"
            )
        encoded.append(Forced(ids, start))
    return encoded


def collate(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Forced]) -> dict[str, Tensor]:
    """A batch with labels on the answers alone, padded on the right whatever the tokenizer's own side.

    Padding is masked and comes after everything that is predicted: it changes nothing.
    """
    padding = PadPromptAndResponse(int(tokenizer.pad_token_id))
    return padding([{"input_ids": row.input_ids, "labels": [IGNORED] * row.start + row.answer} for row in rows])


@torch.no_grad()
def predict(model: Any, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Forced], batch_size: int) -> list[list[int]]:
    """The most likely token in the place of each token of each answer.

    Args:
        model: A causal language model, in evaluation mode.
        tokenizer: For padding.
        rows: Prompts with answers.
        batch_size: Rows at a time; those of like length together.

    Returns:
        For each row as many tokens as its answer has.
    """
    predicted: list[list[int]] = [[] for _ in rows]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        batch = collate(tokenizer, [rows[i] for i in numbers])
        del batch["labels"]
        logits = model(**{key: value.to(model.device) for key, value in batch.items()}, use_cache=False).logits
        likely = logits.argmax(-1).tolist()
        for i, found in zip(numbers, likely, strict=True):
            # Each token is predicted where the one before it stands.
            predicted[i] = found[rows[i].start - 1 : len(rows[i].input_ids) - 1]
    return predicted
