"""Find the blocks of a backbone: the layers that it repeats."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lit_sparse.adapters.base import Adapter


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The members of a model's outermost module lists, where transformers keep their layers, each once."""
    return list(dict.fromkeys(_members(model)))


def _members(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and len(child) and all(map(_is_block, child)):
            yield from child
        elif not isinstance(child, Adapter):
            yield from _members(child)


def _is_block(module: nn.Module) -> bool:
    """Whether a member of a list consists of layers, rather than being one layer."""
    if isinstance(module, Adapter):
        return False
    return any(module.children()) and any(True for _ in module.parameters())
