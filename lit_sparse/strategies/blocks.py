"""Find the blocks of a backbone: the units in which FSDP gathers and frees its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lit_sparse.adapters.blocks import blocks_of
from lit_sparse.errors import UsageError


def transformer_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The outermost blocks of a model, each once.

    Args:
        model: Any model.
        names: Class names of the blocks; None: the members of the outermost module lists, where transformers keep
            their layers.

    Raises:
        UsageError: If the model has no class of a name, or no names are given and it has no module list.
    """
    if names is None:
        blocks = blocks_of(model)
        if not blocks:
            kinds = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
            raise UsageError(
                f"{type(model).__name__} has no module list of blocks to shard. Name the classes of its blocks in "
                f"auto_wrap; its classes are {kinds}."
            )
        return blocks
    absent = [name for name in names if name not in {type(module).__name__ for module in model.modules()}]
    if absent or not names:
        kinds = sorted({type(block).__name__ for block in blocks_of(model)})
        found = f" Its blocks are {kinds}." if kinds else ""
        raise UsageError(f"auto_wrap: {type(model).__name__} has no classes {absent or list(names)}.{found}")
    return list(dict.fromkeys(_outermost(model, set(names))))


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)
