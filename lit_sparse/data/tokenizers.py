"""Load a tokenizer that can pad, and identify it by a hash."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_sparse.data import quickstart
from lit_sparse.errors import UsageError, reason_of

Prompt = str | Sequence[Mapping[str, Any]]
"""A text to continue, or messages with ``role`` and ``content`` to answer."""


def load_tokenizer(name: str, new_tokens: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without pad token pads with its eos token.

    Args:
        name: Hub id, folder, or quickstart:// name.
        new_tokens: Tokens to add to it.

    Raises:
        UsageError: If it cannot be loaded or has nothing to pad with.
    """
    place = quickstart.resolve(name)
    if Path(place).is_file():
        raise UsageError(f"The tokenizer {name!r} is a file: give the folder that holds it, or a hub id.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # a damaged file may raise any of these
        raise UsageError(
            f"The tokenizer {name!r} could not be loaded ({reason_of(error)}): give its folder, or "
            f"its hub id while the hub can be reached."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"The tokenizer {name!r} has neither a pad nor an eos token: give it one.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    tokenizer.add_tokens(list(new_tokens))
    return tokenizer


def added_tokens(tokenizer: PreTrainedTokenizerBase, argument: str = "text") -> tuple[list[int], list[int]]:
    """The special tokens that ``tokenizer`` adds before and after every text.

    Args:
        tokenizer: Tokenizer of any model.
        argument: Argument that takes the text; tokenizers of translation models add other tokens to ``text_target``.
    """
    special = set(tokenizer.all_special_ids)
    words = (str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special)
    # A word from its vocabulary: a tokenizer of whole words may have no token for others.
    probe: dict[str, str] = {argument: next((word for word in words if word.isalnum()), "a")}
    bare = tokenizer(**probe, add_special_tokens=False)["input_ids"]
    whole = tokenizer(**probe)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that a model will continue.

    A text gets the tokenizer's bos unless it begins with one, and no eos. Special tokens that the text itself spells
    are kept.
    """
    before, _ = added_tokens(tokenizer)
    # verbose=False: no warnings about long rows, which are cut later
    many: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids if ids[: len(before)] == before else before + ids for ids in many]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Tokens of a prompt that a model will continue.

    Args:
        tokenizer: Its chat template turns messages into a text that ends where the assistant's answer begins.
        prompt: A text, or messages with ``role`` and ``content``.

    Raises:
        UsageError: If there is nothing to continue, or messages do not suit the chat template.
    """
    ids: Any
    if isinstance(prompt, str):
        ids = open_ended(tokenizer, [prompt])[0]
    elif not tokenizer.chat_template:
        raise UsageError(
            f"The tokenizer {tokenizer.name_or_path!r} has no chat template for a prompt of messages: give a text."
        )
    else:
        try:
            turns = [dict(turn) for turn in prompt]
            ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # a template may raise anything
            reason = reason_of(error)
            raise UsageError(f"The messages {list(prompt)} do not suit the chat template: {reason}.") from error
    if not ids:
        raise UsageError("A prompt is empty, and the tokenizer adds no token to begin with: give a text.")
    return list(ids)


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of everything that decides how ``tokenizer`` splits texts; take it before the tokenizer is first used.

    After its first use a fast tokenizer also describes its last truncation and padding. The hash that `datasets`
    makes of a tokenizer changes with them, so `datasets` would not find rows that it has tokenised before.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    return hashlib.sha256(f"{tokenizer.special_tokens_map} {words}".encode()).hexdigest()
