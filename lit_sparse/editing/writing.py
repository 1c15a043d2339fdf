"""Let a model write answers to prompts on its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.chat_template import ChatTemplate
from lit_sparse.data.tokenizers import Prompt, prompt_tokens
from lit_sparse.editing.teacher_forcing import batches
from lit_sparse.errors import UsageError
from lit_sparse.modules.language_modeling import WITHOUT_SAMPLING, continuation

SAMPLING: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
"""Arguments of ``generate``: tokens are drawn by the model's own probabilities, whatever its generation_config says."""


class Writer:
    """Writes answers with a model.

    Args:
        model: A causal language model.
        tokenizer: Tokenizer of the model.
        batch_size: Prompts per batch.
        max_new_tokens: Longest answer, in tokens.
        chat_template: Whether prompts are turns of a user.

    Raises:
        UsageError: If there is no chat template.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int,
        max_new_tokens: int,
        chat_template: bool = False,
    ) -> None:
        if chat_template and not tokenizer.chat_template:
            raise UsageError(
                f"chat_template is true, and the tokenizer {tokenizer.name_or_path!r} has none: set it to false."
            )
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._chat_template = chat_template
        self.max_new_tokens = max_new_tokens

    def answers(self, prompts: Sequence[str], how: Mapping[str, Any] = WITHOUT_SAMPLING) -> list[str]:
        """What the model writes after each prompt, to the end of the first line that is not blank.

        It also ends with the text or turn, and after ``max_new_tokens``.

        Args:
            prompts: The prompts.
            how: Arguments of ``generate``; greedy if they are left out.
        """
        asked: list[Prompt] = [[{"role": "user", "content": p}] if self._chat_template else p for p in prompts]
        rows = [prompt_tokens(self._tokenizer, prompt) for prompt in asked]
        ends = {self._tokenizer.eos_token_id}
        if self._chat_template:
            ends.add(ChatTemplate(self._tokenizer).end_id)
        texts = self.continuations(rows, self.max_new_tokens, ends, how)
        return [text.lstrip().partition("\n")[0].rstrip() for text in texts]

    def continuations(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        ends: set[int | None],
        how: Mapping[str, Any] = WITHOUT_SAMPLING,
    ) -> list[str]:
        """Continuations of rows of tokens, each up to the first of the tokens in ``ends``."""
        written = self.continued(rows, max_new_tokens, ends, how)
        return [str(self._tokenizer.decode(ids, skip_special_tokens=True)) for ids in written]

    @torch.no_grad()
    def continued(
        self, rows: list[list[int]], max_new_tokens: int, ends: set[int | None], how: Mapping[str, Any]
    ) -> list[list[int]]:
        """The new tokens of :meth:`continuations`."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        new: list[list[int]] = []
        for batch in batches(self._model, self._tokenizer, [rows[i] for i in order], self._batch_size, left=True):
            new += continuation(self._model, batch, max_new_tokens, num_beams=1, **how).tolist()
        kept = [ids[: next((i for i, token in enumerate(ids) if token in ends), None)] for ids in new]
        by_row = dict(zip(order, kept, strict=True))
        return [by_row[i] for i in range(len(rows))]
