"""Conversations, in which a causal language model learns the assistant's turns."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_sparse.data.causal import CausalData
from lit_sparse.data.chat_template import ChatTemplate, Message
from lit_sparse.data.conversations import Format, read_row, recognised, suited, tools_of
from lit_sparse.data.padding import IGNORED
from lit_sparse.data.readers import Place, RowError, Rows, per_row, single_rows
from lit_sparse.errors import UsageError, require_choice
from lit_sparse.interchange.processors import ChatFormat

Encoded = tuple[list[int], list[bool]]  # the tokens, and which of them have a loss


@dataclass(kw_only=True, eq=False, repr=False)
class ChatData(CausalData):
    """Conversations for causal language models, in the model's own chat format; the loss is on the assistant's turns.

    Rows are of one of these formats, which each split's columns tell:

    - ``messages``: a column ``messages`` of turns with ``role`` (system, developer, user, assistant or tool) and
      ``content``, a text or a list of parts of type text. ``tool_calls`` and other keys are handed to the template.
    - ``sharegpt``: a column ``conversations`` of turns with ``from`` (system, human, gpt, function_call,
      observation …) and ``value``. The value of ``function_call`` is the JSON of one call of a tool, or of several.
    - ``prompt_completion``: columns ``prompt`` and ``completion``, each a text or a list of turns. Only the
      completion's turns are trained.
    - ``alpaca``: columns ``instruction``, ``output`` and, optionally, ``input``, which follows the instruction on a
      new line.

    A text in a column of turns is their JSON, as in a CSV. A column ``system`` of texts holds system prompts, which
    come before the turns. A column ``tools`` of JSON schemas, or of their JSON text, is handed to the template. A row
    with ``tool_calls`` is refused if the template does not write them.

    The tokenizer's chat template renders a conversation. ``labels`` repeat what the assistant has to write, its text
    and the token that ends its turn, and are -100 elsewhere. White space that the template writes after that token, and
    a token after the last turn, have no loss. Turns after the assistant's last one are left out. A template that marks
    the assistant's part by ``{% generation %}`` decides all this itself.

    A row that is longer than ``max_length`` loses its oldest turns, up to a turn of the user, but keeps its system
    prompt. If the last question and its answer are too long, the answer loses its end. Rows without a token that has a
    loss are left out, with a warning that counts them.

    Prediction batches hold the turns before the assistant's last one, or all turns if others follow it, and the
    generation prompt. They are padded on the left, for ``generate`` to continue.

    Args:
        chat_template: Jinja template in place of the tokenizer's own: its text, or the path of a ``.jinja`` file.
            Exports save it with the tokenizer.
        format: Format of the rows; None: the one whose columns a split has.
        train_on: ``all``: the loss is on every turn of the assistant. ``last``: on the last one alone.
        max_length: Longest row in tokens. The tokenizer's own limit holds if it is lower. 1024 is TRL's default.

    Raises:
        UsageError: If the tokenizer has no chat template and none is given, or the one given cannot be read.
    """

    chat_template: str | None = None
    format: Format | None = None
    train_on: Literal["all", "last"] = "all"
    max_length: int = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("train_on", self.train_on, ("all", "last"))
        self._formats: dict[str, Format] = {}

    @property
    def chat_format(self) -> ChatFormat:
        """The format of the conversations, which exports write beside the model. After setup."""
        return self._template.format

    def _load_processor(self) -> None:
        super()._load_processor()
        self._template = ChatTemplate(self._tokenizer, self.chat_template)

    def _columns(self, labelled: bool) -> list[str]:  # noqa: ARG002 - the format was recognised by its columns
        return []

    def _recipe(self) -> list[Any]:
        return [*super()._recipe(), self._template.text, self.format, self.train_on]

    def _encoded(self, rows: Dataset, split: str, role: str) -> Dataset:
        form = recognised(rows.column_names, split, self._is_labelled(rows, role), self.format)
        if self._formats.get(split) != form:  # a Trainer prepares and sets up, which is to be said once
            rank_zero_info(f"The split {split!r} of {self._source} is read as conversations of the format {form}.")
        self._formats[split] = form
        encoded = super()._encoded(rows, split, role)
        kept = [i for i, length in enumerate(encoded["length"]) if length]
        if len(kept) == len(rows):
            return encoded
        found = (
            f"{len(rows) - len(kept)} of the {len(rows)} rows of the split {split!r} have no turn of the assistant, or "
            f"no token of it within max_length={self._token_limit}"
        )
        if not kept:
            raise UsageError(f"{found}: none is left. Give rows with an assistant's turn, or raise max_length.")
        rank_zero_warn(f"{found}: they are left out.")
        return encoded.select(kept)

    def _encode(self, rows: Rows, places: Sequence[Place], labelled: bool) -> Rows:
        form = self._formats[places[0].split]
        found = per_row(partial(self._encode_row, form=form, labelled=labelled), single_rows(rows), places)
        # Rows without a loss are left out when all are counted; an empty list would have no type.
        lost = [labelled and not any(trained) for _, trained in found]
        found = [([self.pad_token_id], [False]) if out else row for row, out in zip(found, lost, strict=True)]
        encoded: Rows = {
            "input_ids": [ids for ids, _ in found],
            "length": [0 if out else len(ids) for (ids, _), out in zip(found, lost, strict=True)],
        }
        if labelled:
            encoded["labels"] = [
                [token if own else IGNORED for token, own in zip(ids, trained, strict=True)] for ids, trained in found
            ]
        return encoded

    def _encode_row(self, row: dict[str, Any], form: Format, labelled: bool) -> Encoded:
        tools = tools_of(row.get("tools"))
        turns, prompt = read_row(row, form, labelled)
        turns = suited(turns, self._template, tools)
        return self._conversation(turns, prompt, tools) if labelled else (self._prompt(turns, tools), [])

    def _conversation(self, turns: list[Message], prompt: int, tools: list[Any] | None) -> Encoded:
        """A conversation up to its last answer; empty if it has none that is not part of the prompt."""
        answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= prompt]
        if not answers:
            return [], []
        first = answers[-1] if self.train_on == "last" else prompt
        ids, trained = self._newest(
            turns[: answers[-1] + 1],
            lambda kept, dropped: self._template.conversation(kept, tools, max(first - dropped, 0)),
        )
        return ids[: self._token_limit], trained[: self._token_limit]

    def _prompt(self, turns: list[Message], tools: list[Any] | None) -> list[int]:
        asked = turns[:-1] if turns[-1]["role"] == "assistant" else turns
        if not asked:
            raise RowError("has no turn before the assistant's: there is nothing to answer.")
        ids, _ = self._newest(asked, lambda kept, _: (self._template.prompt(kept, tools), []))
        if len(ids) > self._token_limit:
            raise RowError(
                f"has a prompt whose system prompt and last turns are {len(ids)} tokens, more than "
                f"max_length={self._token_limit}: raise max_length, or shorten the row."
            )
        return ids

    def _newest(self, turns: list[Message], encode: Callable[[list[Message], int], Encoded]) -> Encoded:
        """Encode the system prompt and as many of the newest turns as fit, at least those from the last question on.

        Args:
            turns: The conversation.
            encode: Takes the turns that are kept and the number of those that are dropped.
        """
        whole = encode(turns, 0)
        if len(whole[0]) <= self._token_limit:
            return whole
        system = 1 if turns[0]["role"] in ("system", "developer") else 0
        questions = [i for i, turn in enumerate(turns) if turn["role"] == "user" and i > system]

        def from_question(start: int) -> Encoded:
            return encode(turns[:system] + turns[start:], start - system)

        n = bisect_left(questions, True, key=lambda start: len(from_question(start)[0]) <= self._token_limit)
        return from_question(questions[min(n, len(questions) - 1)]) if questions else whole
