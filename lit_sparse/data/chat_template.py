"""Render conversations by a tokenizer's chat template, and find the tokens that the assistant has to write."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import dropwhile, pairwise, takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateSyntaxError
from lightning.pytorch.utilities import rank_zero_warn
from transformers import PreTrainedTokenizerBase

from lit_sparse.data.files import local_path
from lit_sparse.data.readers import RowError
from lit_sparse.errors import UsageError, reason_of
from lit_sparse.interchange.processors import ChatFormat

Message = dict[str, Any]
"""A turn: ``role``, ``content`` and whatever else the template reads, such as ``tool_calls``."""

_MARK = "MARK"  # an assistant's text that shows where a turn ends
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class _Tokens(NamedTuple):
    """A text, its tokens, and where each of them ends in the text, in characters."""

    text: str
    ids: list[int]
    ends: list[int]

    def before(self, place: int) -> int:
        """The number of tokens that end at ``place`` or before it."""
        return bisect_right(self.ends, place)


class ChatTemplate:
    """Makes tokens of conversations, by the chat template of a tokenizer.

    The template writes all special tokens, so a bos token comes once or not at all. The assistant's part of a turn
    begins where the generation prompt ends, and ends with the end-of-turn token. White space that the template writes
    after that token, and a token that ends the whole conversation, are not part of it. If a token spans the end of a
    generation prompt, the text is cut there before it is tokenised, as it is when the model generates.

    A template with ``{% generation %}`` marks the assistant's part itself. With other templates, the conversation is
    rendered up to every turn, and each rendering must be the beginning of the whole. Only generation prompts and the
    assistant's own turns may differ, because many templates open or drop its thinking there. These turns are taken as
    they stand in the conversation, with a warning.

    Args:
        tokenizer: The tokenizer. It gets ``template``, which its ``save_pretrained`` then writes.
        template: Jinja template in place of the tokenizer's own: its text, or the path of a ``.jinja`` file.

    Raises:
        UsageError: If there is no template, its file is missing, it is no valid Jinja, or the tokenizer
            is not a fast one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str | None = None) -> None:
        if template is not None:
            tokenizer.chat_template = _text_of(template)
        if not tokenizer.chat_template:
            raise UsageError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template: give one as chat_template, the text "
                "of a Jinja template or the path of a .jinja file."
            )
        if not tokenizer.is_fast:
            raise UsageError(
                f"Conversations need a fast tokenizer, which knows the place of each token in the text; "
                f"{type(tokenizer).__name__} is none: give another tokenizer."
            )
        self._tokenizer = tokenizer
        self._special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
        self.end_id = self._end_of_turn()
        """The token that ends the assistant's turns; None where the template ends them by text."""

    @property
    def text(self) -> str | dict[str, str]:
        """The template; some tokenizers have several, by name."""
        return self._tokenizer.chat_template  # type: ignore[no-any-return]

    def source(self, tools: list[Any] | None) -> str:
        """The text of the template that is used with ``tools``."""
        return str(self._tokenizer.get_chat_template(tools=tools))

    @property
    def format(self) -> ChatFormat:
        """The format of the conversations, which exports write beside the model."""
        token = None if self.end_id is None else str(self._tokenizer.convert_ids_to_tokens(self.end_id))
        return {"template": self.text, "end": token, "end_id": self.end_id}

    def prompt(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokens of turns, with the generation prompt that asks for the assistant's next one.

        Args:
            messages: The turns.
            tools: JSON schemas of the tools that the assistant may call.

        Raises:
            UsageError: If the template refuses the turns.
        """
        return self._split(self._rendered(messages, tools, ask=True)).ids

    def conversation(
        self, messages: Sequence[Message], tools: list[Any] | None = None, first: int = 0
    ) -> tuple[list[int], list[bool]]:
        """Tokens of a conversation, and which of them the assistant has to write.

        Args:
            messages: The turns.
            tools: JSON schemas of the tools that the assistant may call.
            first: Number of the first turn whose tokens count; earlier turns are context, and so are turns with the
                ``weight`` 0. A turn that no other precedes answers nothing, and is context as well unless the template
                marks it.

        Returns:
            The tokens, and for each whether it belongs to an assistant's turn from ``first`` on.

        Raises:
            UsageError: If the template refuses the turns, or renders earlier turns differently once others follow.
        """
        if _GENERATION.search(self.source(tools)):
            return self._marked(messages, tools, first)
        turns = [i for i, turn in enumerate(messages) if _counts(turn) and i >= max(first, 1)]
        text = self._rendered(messages, tools)
        prompts = {i: self._rendered(messages[:i], tools, ask=True) for i in turns}
        cuts = [len(prompt) for prompt in prompts.values() if text.startswith(prompt)]
        whole = self._split(text)
        if not self._splits_at(whole, cuts):
            whole = self._split(text, cuts)
        trained = [False] * len(whole.ids)
        for i, prompt in prompts.items():
            if text.startswith(prompt):
                start = whole.before(len(prompt))
            else:
                start = self._start_in(whole.ids, self._split(prompt, cuts).ids, messages[:i], tools)
            alone = self._rendered(messages[: i + 1], tools)
            same = whole.before(len(alone)) if text.startswith(alone) else None
            end = self._end_in(whole.ids, start, whole.ids[:same] if same else self._split(alone, cuts).ids)
            if end is None:
                raise _not_appended(i)
            trained[start:end] = [True] * (end - start)
        return whole.ids, trained

    def _marked(self, messages: Sequence[Message], tools: list[Any] | None, first: int) -> tuple[list[int], list[bool]]:
        encoded: Any = self._applied(messages, tools, return_dict=True, return_assistant_tokens_mask=True)
        ids, trained = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        answers = [i for i, turn in enumerate(messages) if turn["role"] == "assistant"]
        counted = [i >= first and _counts(messages[i]) for i in answers]

        def begin(i: int) -> int:
            return self._start_in(ids, self.prompt(messages[:i], tools), messages[:i], tools)

        # What the template marks from the beginning of an answer to that of the next one is its own.
        end = len(ids)
        for number in [k for k in reversed(range(len(answers))) if not counted[k]]:
            if number + 1 < len(answers) and counted[number + 1]:
                end = begin(answers[number + 1])
            if not number or counted[number - 1]:
                start = begin(answers[number]) if number else 0
                trained[start:end] = [False] * (end - start)
        return ids, trained

    def _start_in(self, ids: list[int], head: list[int], before: Sequence[Message], tools: list[Any] | None) -> int:
        """Where an assistant's part begins in a conversation.

        Args:
            ids: Tokens of the conversation.
            head: Tokens of the turns before the part, with the generation prompt.
            before: These turns.
            tools: JSON schemas of tools.
        """
        start = _same(ids, head)
        if start < len(head):
            context = self._split(self._rendered(before, tools))
            if start <= _same(head, context.ids):
                raise _not_appended(len(before))
            self._warn()  # they part within the generation prompt, which may open the assistant's thinking
        return start

    def _end_in(self, ids: list[int], start: int, alone: list[int]) -> int | None:
        """Where the assistant's part that begins at ``start`` ends; None if that cannot be told.

        Args:
            ids: Tokens of the conversation.
            start: First token of the part.
            alone: Tokens of the conversation up to this turn.
        """
        same = _same(ids, alone)
        rest = alone[same:]
        if same <= start or not all(token in self._special or self._is_space(token) for token in rest):
            self._warn()
            return ids.index(self.end_id, start) + 1 if self.end_id in ids[start:] else None
        ends = [k + 1 for k in range(start, same) if ids[k] == self.end_id]
        if ends:
            return ends[-1]
        end = same  # another token than usual, as after a call of a tool
        while end > start and self._is_space(ids[end - 1]):
            end -= 1
        if ids[end - 1] in self._special:
            return end
        return same + 1 if rest and ids[same] in self._special else same  # or one that only ends conversations

    def _warn(self) -> None:
        rank_zero_warn(
            "The chat template renders turns of the assistant in a conversation differently than it asks for them, or "
            "than the last turn, such as without thinking: they are trained as they stand in the conversation."
        )

    def _is_space(self, token: int) -> bool:
        return not str(self._tokenizer.decode([token])).strip()

    def _end_of_turn(self) -> int | None:
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _MARK}]
        try:
            text = str(self._tokenizer.apply_chat_template(turns, tokenize=False))
        except TemplateSyntaxError as error:
            raise UsageError(f"The chat template is no valid Jinja: {error.message} (line {error.lineno}).") from error
        except Exception:  # it wants other turns than these
            return None
        _, mark, tail = text.rpartition(_MARK)
        after = dropwhile(self._is_space, self._split(tail).ids if mark else [])
        return next(reversed(list(takewhile(self._special.__contains__, after))), None)

    def _rendered(self, messages: Sequence[Message], tools: list[Any] | None, *, ask: bool = False) -> str:
        return str(self._applied(messages, tools, tokenize=False, add_generation_prompt=ask))

    def _applied(self, messages: Sequence[Message], tools: list[Any] | None, **options: Any) -> Any:
        try:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools, **options)
        except Exception as error:  # a template may raise anything
            raise RowError(
                f"does not suit the chat template ({reason_of(error)}): change its turns, or give a chat_template."
            ) from error

    def _split(self, text: str, cuts: Sequence[int] = ()) -> _Tokens:
        """Tokens of a text, each part between ``cuts`` by itself."""
        bounds = [0, *(cut for cut in cuts if cut < len(text)), len(text)]
        pieces = [text[a:b] for a, b in pairwise(bounds)]
        found = self._tokenizer(pieces, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = [token for piece in found["input_ids"] for token in piece]
        return _Tokens(
            text, ids, [a + end for a, o in zip(bounds, found["offset_mapping"], strict=False) for _, end in o]
        )

    def _splits_at(self, whole: _Tokens, cuts: Sequence[int]) -> bool:
        """Whether the text up to each cut has the tokens that it has in the whole text."""
        if not cuts:
            return True
        places, texts = [], []
        for cut in cuts:
            stop = whole.before(cut)
            # A tokenizer splits at special tokens first: what is before the last of them has the same tokens.
            start = next((k for k in range(stop - 1, -1, -1) if whole.ids[k] in self._special), 0)
            places.append(slice(start, stop))
            texts.append(whole.text[whole.ends[start - 1] if start else 0 : cut])
        many = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return all(whole.ids[place] == ids for place, ids in zip(places, many, strict=True))


def _counts(turn: Message) -> bool:
    """Whether a turn may be trained: the assistant's, unless it is marked not to be."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def _same(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens with which both begin."""
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _not_appended(turn: int) -> RowError:
    return RowError(
        f"cannot be trained: the chat template renders what precedes turn {turn} (counted from 0) in one way to ask "
        "for it, and in another once it follows, so its tokens cannot be told. Train on the last turn alone, or give a "
        "chat_template that only appends."
    )


def _text_of(template: str) -> str:
    """The template itself, or the content of the file that it names."""
    if "{" in template:
        return template
    file = local_path(template)
    if file.suffix != ".jinja" or not file.is_file():
        raise UsageError(
            "chat_template must be the text of a Jinja template or the path of an existing .jinja file; got "
            f"{template!r}."
        )
    return file.read_text(encoding="utf-8")
