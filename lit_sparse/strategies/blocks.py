"""Find the blocks of a backbone: the units in which FSDP gathers and frees its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
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
        blocks = list(_members(model))
        if not blocks:
            kinds = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
            raise UsageError(
                f"{type(model).__name__} has no module list of blocks to shard. Name the classes of its blocks in "
                f"auto_wrap; its classes are {kinds}."
            )
        return list(dict.fromkeys(blocks))
    absent = [name for name in names if name not in {type(module).__name__ for module in model.modules()}]
    if absent or not names:
        kinds = sorted({type(block).__name__ for block in _members(model)})
        found = f" Its blocks are {kinds}." if kinds else ""
        raise UsageError(f"auto_wrap: {type(model).__name__} has no classes {absent or list(names)}.{found}")
    return list(dict.fromkeys(_outermost(model, set(names))))


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_block, child)):
            yield from child
        elif not isinstance(child, LowRankAdapter):
            yield from _members(child)


def _is_block(module: nn.Module) -> bool:
    """Whether a member of a list consists of layers, rather than being one layer."""
    if isinstance(module, LowRankAdapter):
        return False
    return any(module.children()) and any(True for _ in module.parameters())


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)
