"""What comes into adapted layers, and which of its positions are no padding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.adapters.base import LowRankAdapter


@contextmanager
def watch_inputs(adapters: Mapping[str, LowRankAdapter], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, show every input of these adapters."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(name, args[0] if args else next(iter(kwargs.values())))

    hooks = [adapter.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, adapter in adapters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def real_positions(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context, a function that takes the rows out of a layer's input that are no padding.

    They are the positions in ``attention_mask`` of the call of the Hugging Face model that is under way. If its labels
    have that shape, positions with the label -100 are left out, too, as in PEFT. Inputs with another number of
    positions have none left out.
    """
    calls: list[list[Tensor]] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        given = inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
        calls.append(calls[-1] if calls and calls[-1] else _masks({**given, **kwargs}))

    def leave(*_: Any) -> None:
        calls.pop()

    def positions(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        fitting = (mask for mask in (calls[-1] if calls else ()) if mask.numel() == len(rows))
        mask = next(fitting, None)
        return rows if mask is None else rows[mask.flatten()]

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in models]
    hooks += [module.register_forward_hook(leave) for module in models]
    try:
        yield positions
    finally:
        for hook in hooks:
            hook.remove()


def _masks(arguments: Mapping[str, Any]) -> list[Tensor]:
    """Masks of the positions that are no padding: of the tokens, and of the targets if these are others."""
    attention, labels = arguments.get("attention_mask"), arguments.get("labels")
    masks = [attention.bool()] if isinstance(attention, Tensor) and not attention.is_floating_point() else []
    if isinstance(labels, Tensor) and labels.ndim > 1:
        real = labels != -100
        masks = [masks[0] & real] if masks and masks[0].shape == real.shape else [*masks, real]
    return masks
