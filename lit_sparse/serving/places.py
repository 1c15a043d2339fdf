"""Places in a model where something else can stand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Place:
    """One difference between the plain model and the model with an adapter.

    Args:
        owner: The dictionary of a module's children, parameters, buffers or attributes.
        key: The name in the dictionary.
        plain: The plain model's value.
        own: The adapter's value.
    """

    owner: dict[str, Any]
    key: str
    plain: Any
    own: Any


def everything(model: nn.Module) -> Iterator[tuple[dict[str, Any], str, Any]]:
    """Every child, parameter, buffer and number of outputs of the model: (dictionary, key, value)."""
    for module in list(model.modules()):
        for owner in (module._modules, module._parameters, module._buffers):
            for key, value in list(owner.items()):
                yield owner, key, value
        if isinstance(module, nn.Linear):
            yield vars(module), "out_features", module.out_features


def put(place: Place, new: Any) -> None:
    """Replace a value; the new one follows the device and training mode of the old one."""
    old = place.owner[place.key]
    if isinstance(new, nn.Module):
        new.train(old.training)
        device = next(old.parameters()).device
        if any(p.device != device for p in new.parameters()):
            new.to(device)
    elif isinstance(new, Tensor):
        new.data = new.data.to(old.device)
    place.owner[place.key] = new
