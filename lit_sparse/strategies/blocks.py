"""Find the blocks of a backbone, the units in which its weights are gathered and freed again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError


def transformer_blocks(model: nn.Module, names: Sequence[str] | None = None) -> list[nn.Module]:
    """The blocks of a model, outermost first found, none inside of another.

    Args:
        model: Any model.
        names: Names of the blocks' classes; None: the members of the model's outermost module lists, which is where
            transformers keep their layers.

    Raises:
        UsageError: If a class is named that the model does not have, or none is named and there is no module list.
    """
    if names is None:
        blocks = list(_members(model))
        if not blocks:
            kinds = sorted({type(module).__name__ for module in model.modules() if any(module.children())})
            raise UsageError(
                f"{type(model).__name__} keeps no blocks in a module list, so what to shard as one is not known. Name "
                f"their classes in auto_wrap; the model's are {kinds}."
            )
        return list(dict.fromkeys(blocks))  # a block that is shared is one
    present = {type(module).__name__ for module in model.modules()}
    absent = [name for name in names if name not in present]
    if absent or not names:
        blocks = list(_members(model))
        found = f"; its blocks are {sorted({type(block).__name__ for block in blocks})}" if blocks else ""
        raise UsageError(f"auto_wrap {absent or list(names)} are no classes of {type(model).__name__}{found}.")
    return list(dict.fromkeys(_outermost(model, set(names))))


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_block, child)):
            yield from child
        elif not isinstance(child, LowRankAdapter):
            yield from _members(child)


def _is_block(module: nn.Module) -> bool:
    """Whether a member of a list is made of layers, and not one itself."""
    if isinstance(module, LowRankAdapter):
        return False
    return any(module.children()) and any(True for _ in module.parameters())


def _outermost(module: nn.Module, names: set[str]) -> Iterator[nn.Module]:
    for child in module.children():
        if type(child).__name__ in names:
            yield child
        else:
            yield from _outermost(child, names)
