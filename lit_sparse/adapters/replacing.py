"""Replace modules of a model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules anywhere in ``model``, under every name that they have."""
    for parent in list(model.modules()):
        # named_children() would skip the second name of a layer.
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements and parent is not replacements[child]:
                setattr(parent, name, replacements[child])
