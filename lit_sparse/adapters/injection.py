"""Put adapters into a backbone, find them again by type, switch them off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from lit_sparse.adapters.head import keep_head_precision, task_head
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.selection import select_layers
from lit_sparse.errors import UsageError

if TYPE_CHECKING:
    from lit_sparse.methods.base import SparseMethod


def inject(model: nn.Module, method: SparseMethod) -> dict[str, LowRankLinear]:
    """Replace the layers that ``method`` targets by adapters around them, in place.

    Everything is frozen but the adapters and the task head (``method.train_head``). A layer that the model
    holds under several names gets one adapter under all of them.

    Args:
        model: Hugging Face model, or a module that holds one.
        method: Says which layers, and wraps each.

    Returns:
        Full layer name to adapter, in the model's order.

    Raises:
        UsageError: If the model holds adapters already, a target matches nothing or something that cannot be
            adapted, or a module named in ``train_head`` does not exist.
    """
    present = [name for name, _ in adapters_in(model)]
    if present:
        raise UsageError(
            f"{type(model).__name__} already holds {len(present)} adapters, the first at {present[0]!r}. "
            "Inject once, into a freshly loaded model."
        )
    head = _trained_head(model, method.train_head)
    chosen = select_layers(model, method.target_modules, method.layers, method.exclude_modules, head)
    model.requires_grad_(False)
    adapters = {name: method.adapt(layer) for name, layer in chosen.items()}
    by_layer = {layer: adapters[name] for name, layer in chosen.items()}
    for parent in list(model.modules()):
        # Not named_children(): it leaves out a second name of the same layer.
        for child_name, child in list(parent._modules.items()):
            if child in by_layer and not isinstance(parent, LowRankLinear):
                setattr(parent, child_name, by_layer[child])
    for name in head:
        _train(model, name)
    for adapter in adapters.values():
        adapter.train(adapter.base.training)
    return adapters


def adapters_in(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Iterate over ``(name, adapter)`` of every adapter in ``model``, each once, found by type."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield name, module


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within the context, every adapted layer gives exactly the frozen layer's output.

    Adapters that were switched off before stay off after. The task head is what it is: trained.

    Args:
        model: Model with adapters.

    Raises:
        UsageError: If there is no adapter in ``model``.
    """
    adapters = [adapter for _, adapter in adapters_in(model)]
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to disable. Inject a method first.")
    before = [adapter.enabled for adapter in adapters]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter, enabled in zip(adapters, before, strict=True):
            adapter.enabled = enabled


def _trained_head(model: nn.Module, train_head: bool | list[str]) -> list[str]:
    if isinstance(train_head, bool):
        return task_head(model) if train_head else []
    names = dict(model.named_modules())
    del names[""]
    unknown = [name for name in train_head if name not in names]
    if unknown:
        children = [name for name, _ in model.named_children()]
        raise UsageError(
            f"train_head {unknown} are no modules of {type(model).__name__}, whose parts are {children}. Give full "
            "names, or true to find the head by structure."
        )
    return list(train_head)


def _train(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    part = getattr(model.get_submodule(parent), leaf)
    part.requires_grad_(True)
    if isinstance(part, nn.Module):
        keep_head_precision(part)
