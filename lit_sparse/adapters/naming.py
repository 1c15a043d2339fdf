"""Read the names of layers: the block and the kind of each, and the prefix of all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

_WRAPPERS = {"_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
"""Parts of module names that torch adds for FSDP1 and activation checkpointing. States do not have them."""


def clean_name(name: str) -> str:
    """The name of a module or parameter without the parts that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def places(names: Iterable[str]) -> dict[str, tuple[str, int]]:
    """Kind of each layer (its name within its block) and number of its block, -1 outside of blocks.

    Args:
        names: Full names. Kinds leave out the prefix that all of them share.
    """
    full = list(names)
    common = itertools.takewhile(lambda part: not part.isdigit(), common_start(full).split(".")[:-1])
    skipped = len(list(common))
    parts = {name: name.split(".")[skipped:] for name in full}
    number = {name: next((i for i, part in enumerate(p) if part.isdigit()), None) for name, p in parts.items()}
    stacks = {".".join(parts[name][:i]) for name, i in number.items() if i is not None}
    found = {}
    for name, i in number.items():
        if i is None:
            found[name] = (".".join(parts[name]), -1)
        else:
            # An encoder and a decoder both have a block 0: kinds then include the name of the stack.
            kind = parts[name][i + 1 :] if len(stacks) == 1 else [*parts[name][:i], *parts[name][i + 1 :]]
            found[name] = (".".join(kind), int(parts[name][i]))
    return found


def common_start(names: Iterable[str]) -> str:
    """The leading parts that all names share, each with its dot."""
    parts = [name.split(".")[:-1] for name in names]
    same = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*parts, strict=False))
    return "".join(f"{level[0]}." for level in same)
