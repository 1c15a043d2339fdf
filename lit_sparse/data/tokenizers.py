"""Load a tokenizer that can pad, and say in a hash what it makes of a text."""

import hashlib
import json
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_sparse import quickstart
from lit_sparse.errors import UsageError


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer; one without pad token pads with its eos token.

    Args:
        name: Hub id, folder, or quickstart:// name.

    Raises:
        UsageError: If it cannot be loaded or has nothing to pad with.
    """
    place = quickstart.resolve(name)
    if Path(place).is_file():
        raise UsageError(f"The tokenizer {name!r} is a file: give the folder that holds it, or a hub id.")
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # what damaged files make of it
        raise UsageError(
            f"The tokenizer {name!r} could not be loaded ({' '.join(str(error).split())}): give its folder, or "
            f"its hub id while the hub can be reached."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"The tokenizer {name!r} has neither a pad nor an eos token: give it one.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    return tokenizer


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that something will follow: with the bos, without the eos that a tokenizer may add."""
    eos = tokenizer.eos_token_id
    many: list[list[int]] = tokenizer(texts, verbose=False)["input_ids"]  # verbose: warns of lengths that are cut later
    return [ids[:-1] if ids and ids[-1] == eos else ids for ids in many]


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides how ``tokenizer`` splits texts; take it before the tokenizer is first used.

    After its first use a fast tokenizer also describes the truncation and padding that it last did, which is
    why `datasets` finds no tokenised rows again when it hashes the tokenizer on its own.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    return hashlib.sha256(f"{tokenizer.special_tokens_map} {words}".encode()).hexdigest()
