"""Write the tokenizer or processor of a model into the exported folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.fabric.utilities import rank_zero_warn
from transformers import AutoFeatureExtractor, AutoProcessor

# Every folder with a tokenizer, image processor or feature extractor has one of these.
_PROCESSOR_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json"),
)


EXAMPLE = [{"role": "user", "content": "An example of a text."}]
"""The conversation that model cards show."""


def chat_template_of(model: Any) -> str | dict[str, str] | None:
    """The chat template of the conversations that a model was trained on; None if it was trained on other texts."""
    return getattr(model, "chat_template", None)


def keep_chat_template(model: Any, template: str | dict[str, str] | None) -> None:
    """Let the exports of a model write a chat template; None changes nothing."""
    if template is not None:
        model.chat_template = template


def save_processor(
    source: str | os.PathLike[str] | None,
    draft: Path,
    tokens: Mapping[int, str | None] = MappingProxyType({}),
    chat_template: str | dict[str, str] | None = None,
) -> str | None:
    """Write the tokenizer or processor of a model, with new tokens; warn if that fails.

    Args:
        source: Name or folder of the model.
        draft: Folder to write.
        tokens: Id to text of the tokens to add, in ascending order; None where the text is not known.
        chat_template: Chat template for the tokenizer; None: its own, if it has one.

    Returns:
        A prompt as ``chat_template`` renders it; None if it does not, or is None.
    """
    if not source or (Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _PROCESSOR_FILES)):
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
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        processor.save_pretrained(draft)
        return _prompt(tokenizer) if chat_template is not None else None
    except Exception as error:  # a damaged file or a missing package must not stop the export
        rank_zero_warn(f"The tokenizer or processor of {source!r} cannot be written: {' '.join(str(error).split())}.")
    return None


def _prompt(tokenizer: Any) -> str | None:
    try:
        return str(tokenizer.apply_chat_template(EXAMPLE, tokenize=False, add_generation_prompt=True))
    except Exception:  # the template wants other turns
        return None
