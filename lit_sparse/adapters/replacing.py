"""Put modules in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever in ``model`` they stand; one with several names gets all of them."""
    for parent in list(model.modules()):
        # Not named_children(): it leaves out a second name of the same layer.
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements and parent is not replacements[child]:
                setattr(parent, name, replacements[child])
