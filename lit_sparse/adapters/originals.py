"""Keep and restore the values that fully trained modules, such as the task head, had before training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.head import leave_head_precision
from lit_sparse.adapters.token_rows import TokenRows
from lit_sparse.errors import UsageError, listed

_KEPT = "_lit_sparse_originals"
_Swap = tuple[dict[str, Any], str, Tensor, Tensor]  # a module's tensors, name, current tensor, original


def keep_originals(module: nn.Module, names: set[str] | None = None) -> None:
    """Keep a copy of the parameters and buffers of ``module``, on their device.

    The copy is not in any ``state_dict``, but copies and pickles of the module hold it.

    Args:
        module: A module that has not been trained.
        names: Names of its own tensors to keep; None: all tensors, those of its children included.
    """
    for part in [module] if names else list(module.modules()):
        own = chain(part._parameters.items(), part._buffers.items())
        kept = {n: t.detach().clone() for n, t in own if t is not None and (names is None or n in names)}
        if kept:
            vars(part)[_KEPT] = {**(vars(part).get(_KEPT) or {}), **kept}


def forget_originals(model: nn.Module, known: bool = True) -> None:
    """Drop the copies.

    Args:
        model: Model whose original values were kept.
        known: False: :func:`originals` then refuses, because the model has no other copy of these values.
    """
    for module in model.modules():
        if vars(module).pop(_KEPT, None) is not None and not known:
            vars(module)[_KEPT] = None


@contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """Within the context, fully trained modules have the values from before injection.

    Raises:
        UsageError: If these values are not known.
    """
    swaps = _swaps(model)
    for holder, name, _, original in swaps:
        holder[name] = original
    try:
        yield
    finally:
        for holder, name, current, _ in swaps:
            holder[name] = current


def trained_and_original(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Each fully trained tensor, once, with the value from before injection.

    Raises:
        UsageError: If these values are not known.
    """
    return list({id(current): (current, original) for _, _, current, original in _swaps(model)}.values())


@torch.no_grad()
def restore_originals(model: nn.Module) -> None:
    """Give fully trained modules the values and dtypes from before injection, for good.

    Raises:
        UsageError: If these values are not known.
    """
    for _, _, current, original in _swaps(model):
        current.data, current.grad = original.detach(), None
    forget_originals(model)
    leave_head_precision(model)


def _swaps(model: nn.Module) -> list[_Swap]:
    modules = list(model.modules())  # walked once: a loss with a reference comes here at every step
    kept: dict[int, Tensor] = {}
    for module in modules:
        own = vars(module).get(_KEPT, {})
        if own is None:
            raise UsageError(
                f"The head that {type(model).__name__} had before its adapter came is not kept in it. For the plain "
                "backbone use the bank's using(None); disable_adapters(model, head=False) keeps this head."
            )
        for name, value in own.items():
            current = (module._parameters if name in module._parameters else module._buffers)[name]
            if current is not None:
                own[name] = value.to(current.device)  # moves once
                kept[id(current)] = _like(own[name], current)
    _require_all_kept(model, modules, kept)
    if not kept:
        return []
    holders: list[dict[str, Any]] = [h for m in modules for h in (m._parameters, m._buffers)]
    return [
        (holder, name, tensor, kept[id(tensor)])
        for holder in holders
        for name, tensor in holder.items()  # under every name: tied weights are one
        if tensor is not None and id(tensor) in kept
    ]


def _like(original: Tensor, current: Tensor) -> Tensor:
    # A half-precision head trains in float32; a head in float32 may have become half-precision with its model.
    dtype = min(original.dtype, current.dtype, key=lambda dtype: dtype.itemsize)
    original = original.to(dtype)
    return nn.Parameter(original, requires_grad=False) if isinstance(current, nn.Parameter) else original


def _require_all_kept(model: nn.Module, modules: list[nn.Module], kept: dict[int, Tensor]) -> None:
    own = [module for module in modules if isinstance(module, Adapter | TokenRows)]
    known = {*kept, *(id(p) for module in own for p in module._parameters.values())}
    trained = {id(p) for module in modules for p in module._parameters.values() if p is not None and p.requires_grad}
    if not trained <= known:
        unknown = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
        raise UsageError(
            f"{listed(unknown)} are trained, but were frozen when the adapters were injected: their original values "
            "were not kept. Name their modules in the method's train_head instead of unfreezing them, or disable only "
            "adapters (head=False)."
        )
    changed = [module for module in own if isinstance(module, Adapter) and module.took_from_weight]
    if changed:
        raise UsageError(
            f"{len(changed)} adapters took their start out of the frozen weights (init_weights 'pissa' or 'lora_ga'), "
            "which are no longer the pretrained ones. Load the pretrained model a second time, or disable adapters "
            "alone by head=False."
        )
