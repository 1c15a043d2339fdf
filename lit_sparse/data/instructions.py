"""Prompts with the responses that a causal language model is to give."""

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_sparse.data.sources import DataFiles, require_text
from lit_sparse.data.text import Collator, Rows, TextData
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.errors import UsageError

IGNORED = -100  # the label that torch's cross entropy leaves out

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class InstructionData(TextData):
    """Prompts and responses for causal language models; the loss is on the response alone.

    A row becomes the tokens of its prompt, the tokens of its response and one eos token. ``labels`` repeat the
    response and eos, and are -100 on the prompt and on padding, which is on the right. The response is split
    into tokens as part of the whole text, so that it has the tokens that the model would see in running text;
    only where a token reaches across the end of the prompt is it tokenised on its own.

    A row that is longer than ``max_length`` loses the beginning of its prompt (but for a bos token), and if
    the response alone is too long, the end of the response, which then has no eos token.

    Prediction batches hold the prompts alone and are padded on the left, for ``generate`` to go on from.

    Args:
        path: Where the rows are: the id of a data set on the Hugging Face hub; a folder with files named by
            split (train, validation, test, predict; ending in .csv, .json, .jsonl or .parquet) or laid out
            like a data set of the hub; or one such file, which is then the training split. Give either this
            or ``data_files``.
        name: Configuration of the data set on the hub, where it has several.
        revision: Branch, tag or commit of the data set on the hub; None is its newest state.
        data_files: Split → file, or list of files that are read one after another, for files that are not named by
            split.
        validation_fraction: Share of the training split, in (0, 1), to hold out as validation split where the
            source has none. The rows held out are the same in every run.
        template: The prompt, with names of columns in braces: ``"Q: {question} A: "``. Braces that are meant
            literally are doubled. Special tokens that it spells stay where they are; a bos at its beginning is
            not added again. None is the prompt of Stanford Alpaca, which many instruction sets came
            with: it takes the column ``instruction`` and, in rows where a column ``input`` holds some text,
            that too.
        response: Column of the response.
        tokenizer: Hub id or folder of the tokenizer; None is that of the model's ``backbone``.
        max_length: Longest row in tokens, prompt, response and eos together. The tokenizer's own limit holds
            if it is lower. 256 is the default of LLM-Adapters.
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
        path: str | None = None,
        name: str | None = None,
        revision: str | None = None,
        data_files: DataFiles | None = None,
        validation_fraction: float | None = None,
        template: str | None = None,
        response: str = "output",
        tokenizer: str | None = None,
        max_length: int = 256,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        length_grouped: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            path=path,
            name=name,
            revision=revision,
            data_files=data_files,
            validation_fraction=validation_fraction,
            tokenizer=tokenizer,
            max_length=max_length,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            length_grouped=length_grouped,
            num_workers=num_workers,
            seed=seed,
        )
        self.template = template
        self.response = response

    def _columns(self, labelled: bool) -> list[str]:
        prompt = _columns_of(_ALPACA if self.template is None else self.template)
        return [*prompt, self.response] if labelled else prompt

    def _recipe(self) -> list[Any]:
        return [self.template, self.response]

    def _encode(self, rows: Rows, numbers: list[int], split: str, labelled: bool) -> Rows:
        prompts = [
            self._prompt({column: values[i] for column, values in rows.items()}, split, number)
            for i, number in enumerate(numbers)
        ]
        heads = open_ended(self._tokenizer, prompts)
        answers: list[list[int]] = [[]] * len(heads)
        if labelled:
            answers = self._answers(prompts, heads, self._responses(rows, numbers, split))
        heads = [self._cut(head, self._token_limit - len(answer)) for head, answer in zip(heads, answers, strict=True)]
        encoded = {"input_ids": [head + answer for head, answer in zip(heads, answers, strict=True)]}
        if labelled:
            encoded["labels"] = [[IGNORED] * len(head) + answer for head, answer in zip(heads, answers, strict=True)]
        return {**encoded, "length": [len(ids) for ids in encoded["input_ids"]]}

    def _prompt(self, row: dict[str, Any], split: str, number: int) -> str:
        template = self.template
        if template is None:
            template = _ALPACA_WITH_INPUT if str(row.get("input") or "").strip() else _ALPACA
        columns = _columns_of(template)
        texts = {name: require_text(row[name], name, split, number, blank=False) for name in columns}
        return _WholeNames().vformat(template, (), texts)

    def _responses(self, rows: Rows, numbers: list[int], split: str) -> list[str]:
        return [
            require_text(text, self.response, split, number, blank=False)
            for text, number in zip(rows[self.response], numbers, strict=True)
        ]

    def _answers(self, prompts: list[str], heads: list[list[int]], responses: list[str]) -> list[list[int]]:
        """Tokens of the responses, each with eos at its end if there is room for it."""
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        wholes = open_ended(self._tokenizer, texts)
        answers = []
        for head, whole, response in zip(heads, wholes, responses, strict=True):
            answer = whole[len(head) :]
            if whole[: len(head)] != head or not answer:  # a token reaches across the end of the prompt
                answer = self._tokenizer(response, add_special_tokens=False, verbose=False)["input_ids"]
            end = [] if answer[-1:] == [self._eos()] else [self._eos()]  # the response's own text may spell it
            answers.append([*answer, *end][: self._token_limit])
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

    def _collator(self, role: str) -> Collator:
        return PadPromptAndResponse(int(self._tokenizer.pad_token_id), left=role == "predict")


@dataclass(frozen=True)
class PadPromptAndResponse:
    """Makes a batch of rows with ``input_ids`` and, perhaps, ``labels`` by padding to the longest of them.

    Args:
        pad_token_id: Token to pad ``input_ids`` with; ``attention_mask`` is 0 and ``labels`` are -100 there.
        left: Whether padding goes to the left.
    """

    pad_token_id: int
    left: bool = False

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors of shape (rows, longest row), of type long."""
        mask = [[1] * len(row["input_ids"]) for row in rows]
        batch = {
            "input_ids": self._pad([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": self._pad(mask, 0),
        }
        if "labels" in rows[0]:
            batch["labels"] = self._pad([row["labels"] for row in rows], IGNORED)
        return batch

    def _pad(self, sequences: list[list[int]], value: int) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(sequence, dtype=torch.long) for sequence in sequences],
            batch_first=True,
            padding_value=value,
            padding_side="left" if self.left else "right",
        )


class _WholeNames(string.Formatter):
    """Takes what stands in braces as the whole name of a column, be there dots or brackets in it."""

    def get_field(self, field_name: str, args: Any, kwargs: Any) -> tuple[Any, str]:  # noqa: ARG002 - as the base
        return kwargs[field_name], field_name


def _columns_of(template: str) -> list[str]:
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
