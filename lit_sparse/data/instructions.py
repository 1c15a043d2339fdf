"""Prompts with the responses that a causal language model learns to give."""

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.data.causal import CausalData
from lit_sparse.data.padding import IGNORED
from lit_sparse.data.readers import Place, Rows, per_row, single_rows
from lit_sparse.data.sources import require_text, require_texts
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.errors import UsageError

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


@dataclass(kw_only=True, eq=False, repr=False)
class InstructionData(CausalData):
    """Prompts and responses for causal language models; the loss is on the response alone.

    A row becomes the tokens of its prompt, the tokens of its response and one eos token. ``labels`` repeat the response
    and eos, and are -100 on the prompt and on the padding, which is on the right. Prompt and response are tokenised
    together, so the response has the tokens of running text. If a token spans the end of the prompt, the response is
    tokenised separately.

    A row that is longer than ``max_length`` loses the beginning of its prompt. A bos token is kept as long as the
    response leaves room for it. If the response alone is too long, it loses its end, and has no eos token.

    Prediction batches hold the prompts alone, padded on the left, for ``generate`` to continue.

    :class:`~lit_sparse.ChatData` writes prompts in the chat format of an instruction-tuned model.

    Args:
        template: The prompt, with names of columns in braces: ``"Q: {question} A: "``. Literal braces are doubled.
            Special tokens in it are kept; a bos at its beginning is not added again. None is the prompt of Stanford
            Alpaca, which many instruction sets use: it takes the column ``instruction`` and, where it is not empty, a
            column ``input``.
        response: Column of the response.
        max_length: Longest row in tokens, prompt, response and eos together. The tokenizer's own limit holds
            if it is lower. 256 is the default of LLM-Adapters.
    """

    template: str | None = None
    response: str = "output"
    max_length: int = 256

    def _load_processor(self) -> None:
        super()._load_processor()
        if self.template is None and self._tokenizer.chat_template:
            rank_zero_warn(
                "The tokenizer has a chat template, and the prompt is Stanford Alpaca's, not the model's own chat "
                "format: use ChatData for that, or set template."
            )

    def _columns(self, labelled: bool) -> list[str]:
        prompt = columns_of(_ALPACA if self.template is None else self.template)
        return [*prompt, self.response] if labelled else prompt

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self.template, self.response]

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        prompts = per_row(self._prompt, single_rows(rows), places)
        heads = open_ended(self._tokenizer, prompts)
        answers: list[list[int]] = [[]] * len(heads)
        if labelled:
            answers = self._answers(prompts, heads, require_texts(rows[self.response], self.response, places))
        answers = [answer[: self._token_limit] for answer in answers]
        heads = [self._cut(head, self._token_limit - len(answer)) for head, answer in zip(heads, answers, strict=True)]
        encoded = {"input_ids": [head + answer for head, answer in zip(heads, answers, strict=True)]}
        if labelled:
            encoded["labels"] = [[IGNORED] * len(head) + answer for head, answer in zip(heads, answers, strict=True)]
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def _prompt(self, row: dict[str, Any]) -> str:
        template = self.template
        if template is None:
            template = _ALPACA_WITH_INPUT if str(row.get("input") or "").strip() else _ALPACA
        texts = {name: require_text(row[name], name) for name in columns_of(template)}
        return _WholeNames().vformat(template, (), texts)

    def _answers(self, prompts: list[str], heads: list[list[int]], responses: list[str]) -> list[list[int]]:
        """Tokens of the responses, each with eos at its end."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        wholes = open_ended(self._tokenizer, texts)
        answers = []
        for head, whole, response in zip(heads, wholes, responses, strict=True):
            answer = whole[len(head) :]
            if whole[: len(head)] != head or not answer:  # a token reaches across the end of the prompt
                answer = self._tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
            end = [] if answer[-1:] == [self._eos()] else [self._eos()]  # the response's own text may spell it
            answers.append([*answer, *end])
        return answers

    def _eos(self) -> int:
        if self._tokenizer.eos_token_id is None:
            raise UsageError("The tokenizer has no eos token to end a response with: give one of a causal model.")
        return int(self._tokenizer.eos_token_id)

    def _cut(self, prompt: list[int], room: int) -> list[int]:
        if len(prompt) <= room:
            return prompt
        keep_first = 1 if room > 0 and prompt[0] == self._tokenizer.bos_token_id else 0
        return prompt[:keep_first] + prompt[len(prompt) - room + keep_first :]


class _WholeNames(string.Formatter):
    """Takes what stands in braces as the whole name of a column, be there dots or brackets in it."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:  # noqa: ARG002 - as the base
        return kwargs[field_name], field_name


def columns_of(template: str) -> list[str]:
    """The columns that a template names, each once.

    Raises:
        UsageError: If it names none, or has a brace without its partner.
    """
    try:
        columns = list(dict.fromkeys(name for _, name, _, _ in string.Formatter().parse(template) if name is not None))
    except ValueError as error:
        raise UsageError(
            f"The template {template!r} has a brace without its partner ({error}): write {{column}}, and double "
            f"the braces that are meant literally."
        ) from error
    if not columns:
        raise UsageError(f"The template {template!r} names no column, so all prompts were the same: add {{column}}.")
    return columns
