"""Load a tokenizer that can pad, and say in a hash what it makes of a text."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lit_sparse.data import quickstart
from lit_sparse.errors import UsageError


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
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:  # what damaged files make of it
        raise UsageError(
            f"The tokenizer {name!r} could not be loaded ({' '.join(str(error).split())}): give its folder, or "
            f"its hub id while the hub can be reached."
        ) from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UsageError(f"The tokenizer {name!r} has neither a pad nor an eos token: give it one.")
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    tokenizer.add_tokens(list(new_tokens))
    return tokenizer


def added_tokens(tokenizer: PreTrainedTokenizerBase, argument: str = "text") -> tuple[list[int], list[int]]:
    """The special tokens that ``tokenizer`` adds on its own, before and after every text.

    Args:
        tokenizer: Of any model.
        argument: How the text is passed; tokenizers of translation models add other tokens to ``text_target``.
    """
    special = set(tokenizer.all_special_ids)
    words = (str(tokenizer.decode([i])).strip() for i in range(len(tokenizer)) if i not in special)
    # A word of its own: a tokenizer of words may have no token for what it does not know.
    probe: dict[str, str] = {argument: next((word for word in words if word.isalnum()), "a")}
    bare = tokenizer(**probe, add_special_tokens=False)["input_ids"]
    whole = tokenizer(**probe)["input_ids"]
    start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def open_ended(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Tokens of texts that are continued.

    The tokenizer's bos stands in front, once: a text that begins with it gets no second one. An eos that the tokenizer
    would add is left out; special tokens that the text itself spells stay where they are.
    """
    before, _ = added_tokens(tokenizer)
    # verbose: warns of lengths that are cut later
    many: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return [ids if ids[: len(before)] == before else before + ids for ids in many]


def identify_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides how ``tokenizer`` splits texts; take it before the tokenizer is first used.

    After its first use a fast tokenizer also describes the truncation and padding that it last did, which is
    why `datasets` finds no tokenised rows again when it hashes the tokenizer on its own.
    """
    fast = getattr(tokenizer, "backend_tokenizer", None)
    words = json.dumps(tokenizer.get_vocab(), sort_keys=True) if fast is None else fast.to_str()
    return hashlib.sha256(f"{tokenizer.special_tokens_map} {words}".encode()).hexdigest()
