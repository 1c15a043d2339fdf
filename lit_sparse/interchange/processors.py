"""Write the tokenizer or processor of a model beside what is exported."""

from __future__ import annotations

import os
from pathlib import Path

from lightning.fabric.utilities import rank_zero_warn
from transformers import AutoFeatureExtractor, AutoProcessor

# One of these is in every folder with a tokenizer, image processor, feature extractor or several of them.
_PROCESSOR_FILES = (
    *("tokenizer_config.json", "tokenizer.json", "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json"),
)


def save_processor(source: str | os.PathLike[str] | None, draft: Path) -> None:
    """Write the tokenizer or processor of the model ``source`` into ``draft``; warn if it has none that loads."""
    if not source or (Path(source).is_dir() and not any((Path(source) / name).is_file() for name in _PROCESSOR_FILES)):
        return  # transformers would make a tokenizer without words
    try:
        try:
            processor = AutoProcessor.from_pretrained(source)
        except Exception:  # a model that only hears has no tokenizer, and some processors insist on one
            processor = AutoFeatureExtractor.from_pretrained(source)
        processor.save_pretrained(draft)
    except Exception as error:  # whatever a damaged file or a missing package makes of it: the model is worth more
        reason = " ".join(str(error).split())
        rank_zero_warn(
            f"No tokenizer or processor is written beside the model: that of {source!r} has none ({reason})."
        )
