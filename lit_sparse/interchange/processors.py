"""Write the tokenizer or processor of a model into the exported folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from lightning.fabric.utilities import rank_zero_warn
from transformers import AutoFeatureExtractor, AutoProcessor

# Every folder with a tokenizer, image processor or feature extractor has one of these.
_PROCESSOR_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json"),
)


def save_processor(
    source: str | os.PathLike[str] | None, draft: Path, tokens: Mapping[int, str | None] = MappingProxyType({})
) -> None:
    """Write the tokenizer or processor of a model, with new tokens; warn if that fails.

    Args:
        source: Name or folder of the model.
        draft: Folder to write.
        tokens: Id to text of the tokens to add, in ascending order; None where the text is not known.
    """
    if not source or (Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _PROCESSOR_FILES)):
        return  # transformers would make a tokenizer without words
    try:
        try:
            processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
        except Exception:  # a model that only hears has no tokenizer, and some processors insist on one
            processor = AutoFeatureExtractor.from_pretrained(source, trust_remote_code=False)
        tokenizer = getattr(processor, "tokenizer", processor)
        for number, text in tokens.items():
            if text and tokenizer.add_tokens([text]) is not None and tokenizer.convert_tokens_to_ids(text) != number:
                raise ValueError(f"it has another number than {number} for {text!r}")
        processor.save_pretrained(draft)
    except Exception as error:  # a damaged file or a missing package must not stop the export
        rank_zero_warn(f"The tokenizer or processor of {source!r} cannot be written: {' '.join(str(error).split())}.")
