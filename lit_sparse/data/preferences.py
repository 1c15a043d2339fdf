"""Pairs of a chosen and a rejected answer to one prompt, as texts or as turns of a chat."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_sparse.data.chat_template import ChatTemplate, Message
from lit_sparse.data.conversations import suited, tools_of, turns_of, with_system
from lit_sparse.data.instructions import InstructionData, columns_of
from lit_sparse.data.multiple_choice import PadChoices
from lit_sparse.data.padding import IGNORED
from lit_sparse.data.readers import Place, Reader, RowError, Rows, per_row, single_rows
from lit_sparse.data.rows import Collator
from lit_sparse.data.sampling import RowSampler
from lit_sparse.data.sources import open_source, require_texts
from lit_sparse.data.tokenizers import open_ended
from lit_sparse.errors import UsageError
from lit_sparse.interchange.processors import ChatFormat

_Pair = tuple[list[list[int]], list[list[int]]]  # tokens of the prompt and of the answer, chosen and rejected


@dataclass(kw_only=True, eq=False, repr=False)
class PreferenceData(InstructionData):
    """Prompts with a chosen and a rejected answer, for :class:`~lit_sparse.PreferenceLM`.

    Rows are read in three forms:

    - texts: prompt, chosen and rejected answer. They are tokenised as in :class:`~lit_sparse.InstructionData`;
    - turns: answers and prompt are lists of messages, or one of them is, and a text is a single message. The
      tokenizer's chat template writes them;
    - whole conversations: the lists of chosen and rejected messages begin with the prompt, and only their last turns
      differ, as in ``HuggingFaceH4/ultrafeedback_binarized``. A column of prompts is not read then.

    Rows of turns may have the columns ``system`` and ``tools``, as in :class:`~lit_sparse.ChatData`.

    Batches hold ``input_ids``, ``attention_mask`` and ``labels`` of shape (rows, 2, tokens), padded on the right: the
    chosen answer first, each after the prompt. Labels are -100 on the prompt and the padding. Prediction batches hold
    the prompts alone, padded on the left.

    If the prompt and the longer of its answers exceed ``max_length``, the prompt loses its beginning, the same of it
    for both answers. A bos token is kept as long as the answers leave room for it. An answer that is too long by itself
    loses its end. The number of such rows is logged.

    Args:
        template: The prompt of rows that are texts, with names of columns in braces.
        chosen: Column of the better answer.
        rejected: Column of the other answer.
        prompt: Column of the prompt, for rows that are turns.
        chat_template: Jinja template for rows that are turns, or the path of a ``.jinja`` file; None is that of the
            tokenizer.
        splits: Names that the source has for splits, such as ``{train: train_prefs, validation: test_prefs}``.
        max_length: Longest prompt and answer together, in tokens. The tokenizer's own limit holds if it is lower. 1024
            is the usual choice for Ultrafeedback.
        batch_size: Pairs per batch and device; the model sees both answers of each.
    """

    template: str = "{prompt}"
    chosen: str = "chosen"
    rejected: str = "rejected"
    prompt: str = "prompt"
    chat_template: str | None = None
    splits: dict[str, str] | None = None
    max_length: int = 1024
    batch_size: int = 8

    # Pairs have no single response, and are no rows that could be joined.
    response: str = field(default="", init=False)
    packing: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._chat: ChatTemplate | None = None

    @property
    def chat_format(self) -> ChatFormat | None:
        """The format of rows that are turns, which exports write beside the model. After setup."""
        return None if self._chat is None else self._chat.format

    def _readers(self) -> dict[str, Reader]:
        names = self.splits or {}
        readers = open_source(
            self.path, self.name, self.revision, self.data_files, (*self._split_names(), *names.values())
        )
        unknown = [name for name in names if name not in self._split_names()]
        missing = [name for name in names.values() if name not in readers]
        if unknown or missing:
            raise UsageError(
                f"splits names the split of the source for some of {', '.join(self._split_names())}; got {names}, and "
                f"{self._source} has {', '.join(readers)}."
            )
        return {**readers, **{name: readers[other] for name, other in names.items()}}

    def _encoded(self, rows: Dataset, split: str, role: str) -> Dataset:
        first = next((name for name in (self.chosen, self.prompt) if name in rows.column_names), None)
        read = {self.chosen, self.rejected, first, *{self.prompt}.intersection(columns_of(self.template))}
        cells = rows.select_columns([name for name in rows.column_names if name in read])[:1]
        turns = any(isinstance(cell, list) for column in cells.values() for cell in column)
        self._chat = ChatTemplate(self._tokenizer, self.chat_template) if turns else None
        self._asked = first  # holds the prompt of rows that are turns
        missing = [name for name in (self.chosen, self.rejected) if name not in rows.column_names]
        if turns and missing and self._is_labelled(rows, role):
            raise UsageError(f"The split {split!r} has no column {missing[0]!r}; its columns are {rows.column_names}.")
        return super()._encoded(rows, split, role)

    def _columns(self, labelled: bool) -> list[str]:
        if self._chat is not None:
            return []  # were looked for before
        return [*super()._columns(labelled=False), *([self.chosen, self.rejected] if labelled else [])]

    def _recipe(self) -> list[Any]:
        chat = None if self._chat is None else self._chat.text
        return [*super()._recipe(), self.chosen, self.rejected, self.prompt, chat]

    def _collator(self, role: str) -> Collator:
        pad = super()._collator(role)
        return pad if role == "predict" else PadChoices(pad)

    def _loader(self, rows: Dataset, role: str, sampler: RowSampler | None = None) -> DataLoader[Any]:
        if "cut" in rows.column_names:
            cut = sum(rows["cut"])
            if cut:
                rank_zero_info(
                    f"{cut} of {len(rows)} rows for {role} are longer than max_length ({self._token_limit} tokens): "
                    "prompts lost their beginning, and answers that are too long by themselves their end."
                )
            rows = rows.remove_columns("cut")
        return super()._loader(rows, role, sampler)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        chat = self._chat
        if labelled:
            if chat is None:
                return self._joined(self._text_pairs(rows, places))
            return self._joined(per_row(partial(self._chat_pair, chat), single_rows(rows), places))
        if chat is None:
            return super()._encode(rows, places, labelled)
        heads = per_row(partial(self._chat_prompt, chat), single_rows(rows), places)
        ids = [self._cut(head, self._token_limit) for head in heads]
        return {"input_ids": ids, "length": [len(row) for row in ids]}

    def _joined(self, pairs: list[_Pair]) -> Rows:
        """Rows of tokens and labels, cut to the limit."""
        encoded: Rows = {"input_ids": [], "labels": [], "length": [], "cut": []}
        for heads, whole in pairs:
            answers = [answer[: self._token_limit] for answer in whole]
            room = self._token_limit - max(map(len, answers))
            kept = [self._cut(head, room) for head in heads]
            ids = [head + answer for head, answer in zip(kept, answers, strict=True)]
            encoded["input_ids"].append(ids)
            encoded["labels"].append([[IGNORED] * len(h) + answer for h, answer in zip(kept, answers, strict=True)])
            encoded["length"].append(max(map(len, ids)))
            encoded["cut"].append((kept, answers) != (heads, whole))
        return encoded

    def _text_pairs(self, rows: Rows, places: Sequence[Place]) -> list[_Pair]:
        prompts = per_row(self._prompt, single_rows(rows), places)
        heads = open_ended(self._tokenizer, prompts)
        sides = [
            self._answers(prompts, heads, require_texts(rows[column], column, places))
            for column in (self.chosen, self.rejected)
        ]
        return [([head, head], list(answers)) for head, *answers in zip(heads, *sides, strict=True)]

    def _chat_prompt(self, chat: ChatTemplate, row: dict[str, Any]) -> list[int]:
        if self._asked == self.chosen:
            turns = self._conversation(row, self.chosen)[:-1]
        else:
            turns = turns_of(row[self.prompt], self.prompt)
        tools = tools_of(row.get("tools"))
        return chat.prompt(suited(with_system(turns, row), chat, tools), tools)

    def _chat_pair(self, chat: ChatTemplate, row: dict[str, Any]) -> _Pair:
        chosen, rejected = (self._conversation(row, column) for column in (self.chosen, self.rejected))
        if chosen[:-1] != rejected[:-1]:
            raise RowError(
                "has a chosen and a rejected conversation that differ before their last turns: only the last may "
                "differ, so cut both after the first difference."
            )
        heads, answers = [], []
        tools = tools_of(row.get("tools"))
        for conversation in (chosen, rejected):
            turns = suited(with_system(conversation, row), chat, tools)
            ids, trained = chat.conversation(turns, tools, first=len(turns) - 1)
            if True not in trained:
                raise RowError("has no answer in what the chat template renders: give another chat_template.")
            start, end = trained.index(True), len(ids) - trained[::-1].index(True)
            heads.append(ids[:start])
            answers.append(ids[start:end])
        return heads, answers

    def _conversation(self, row: dict[str, Any], column: str) -> list[Message]:
        """The turns of a prompt and its answer, which is the last of them."""
        turns = turns_of(row[column], column, role="assistant")
        if turns[-1]["role"] != "assistant":
            raise RowError(
                f"ends with a turn of {turns[-1]['role']!r} in the column {column!r}: it needs one of 'assistant'."
            )
        if turns[0]["role"] == "assistant":
            if self.prompt not in row:
                raise RowError(
                    f"has an answer without a question in the column {column!r}, and there is no column "
                    f"{self.prompt!r}: name the one of the prompts in prompt."
                )
            turns = turns_of(row[self.prompt], self.prompt, role="user") + turns
        return turns
