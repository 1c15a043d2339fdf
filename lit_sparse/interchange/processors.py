"""Write the tokenizer or processor of a model into the exported folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypedDict

from lightning.fabric.utilities import rank_zero_warn
from transformers import AutoFeatureExtractor, AutoProcessor

from lit_sparse.errors import reason_of

# Every folder with a tokenizer, image processor or feature extractor has one of these.
_PROCESSOR_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json"),
)


EXAMPLE = [{"role": "user", "content": "An example of a text."}]
"""The conversation that model cards show."""


class ChatFormat(TypedDict):
    """The format of the conversations that a model is trained on.

    Args:
        template: The tokenizer's chat template; some have several, by name.
        end: The token that ends the assistant's turns; None where the template ends them by text.
        end_id: Its number.
    """

    template: str | dict[str, str]
    end: str | None
    end_id: int | None


def chat_format_of(model: Any) -> ChatFormat | None:
    """The format that :func:`keep_chat_format` gave to a model."""
    return getattr(model, "chat_format", None)


def keep_chat_format(model: Any, chat: ChatFormat | None) -> None:
    """Let exports of a model write a chat format, and its generation end with the assistant's turn.

    Args:
        model: The model.
        chat: The format; None changes nothing.
    """
    if chat is None:
        return
    model.chat_format = chat
    config, end = getattr(model, "generation_config", None), chat["end_id"]
    known = getattr(config, "eos_token_id", None)
    several = known if isinstance(known, list) else [] if known is None else [known]
    if config is not None and end is not None and end not in several:
        config.eos_token_id = [*several, end]


def processor_of(model: Any) -> str | None:
    """Name or folder of the tokenizer or processor that :func:`keep_processor` gave to a model."""
    return getattr(model, "processor_name", None)


def keep_processor(model: Any, name: str | None) -> None:
    """Let exports of a model write a tokenizer or processor that is not its backbone's.

    Args:
        model: The model. One that has a name already keeps it.
        name: Name or folder of the tokenizer or processor; None changes nothing.
    """
    if name is not None and processor_of(model) is None:
        model.processor_name = name


def has_processor(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, image processor or feature extractor."""
    return any((folder / name).is_file() for name in _PROCESSOR_FILES)


def save_processor(
    source: str | os.PathLike[str] | None,
    draft: Path,
    tokens: Mapping[int, str | None] = MappingProxyType({}),
    chat: ChatFormat | None = None,
) -> str | None:
    """Write the tokenizer or processor of a model, with new tokens; warn if that fails.

    Args:
        source: Name or folder of the model.
        draft: Folder to write.
        tokens: Id to text of the tokens to add, in ascending order; None where the text is not known.
        chat: Format whose template the tokenizer gets; None: its own template, if it has one.

    Returns:
        A prompt in this format; None without one.
    """
    if not source or (Path(source).is_dir() and not has_processor(Path(source))):
        return None  # transformers would make a tokenizer without words
    try:
        try:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except Exception:  # a model that only hears has no tokenizer, and some processors insist on one
            processor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        for number, text in tokens.items():
            if text and tokenizer.add_tokens([text]) is not None and tokenizer.convert_tokens_to_ids(text) != number:
                raise ValueError(f"it has another number than {number} for {text!r}")
        if chat is not None:
            tokenizer.chat_template = chat["template"]
        processor.save_pretrained(draft)
        return _prompt(tokenizer) if chat is not None else None
    except Exception as error:  # a damaged file or a missing package must not stop the export
        rank_zero_warn(f"The tokenizer or processor of {source!r} cannot be written: {reason_of(error)}.")
    return None


def _prompt(tokenizer: Any) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(EXAMPLE, tokenize=False, add_generation_prompt=True))
    except Exception:  # the template wants other turns
        return None
