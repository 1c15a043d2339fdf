"""The values that a task head, and whatever else is trained whole, had before training: keep them, put them back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.head import leave_head_precision
from lit_sparse.adapters.token_rows import token_rows_in
from lit_sparse.errors import UsageError, listed

_KEPT = "_lit_sparse_originals"
_Swap = tuple[dict[str, Any], str, Tensor, Tensor]  # a module's tensors, name, what stands there, original


def keep_originals(module: nn.Module, names: set[str] | None = None) -> None:
    """Keep a copy of the parameters and buffers of ``module``, on their device.

    It lies beside the module's state: no ``state_dict`` holds it, copies and pickles of the module do.

    Args:
        module: Before any of it is trained.
        names: Only these of its own tensors; None: all, those of its children included.
    """
    for part in [module] if names else list(module.modules()):
        own = chain(part._parameters.items(), part._buffers.items())
        kept = {n: t.detach().clone() for n, t in own if t is not None and (names is None or n in names)}
        if kept:
            vars(part)[_KEPT] = {**(vars(part).get(_KEPT) or {}), **kept}


def forget_originals(model: nn.Module, known: bool = True) -> None:
    """Give up what was kept.

    Args:
        model: With modules of which originals were kept.
        known: False: note that what is trained had other values, which asking for them then says.
    """
    for module in model.modules():
        if vars(module).pop(_KEPT, None) is not None and not known:
            vars(module)[_KEPT] = None


@contextmanager
def originals(model: nn.Module) -> Iterator[None]:
    """Within the context, what is trained whole has the values that it had before injection.

    Raises:
        UsageError: If these are not known.
    """
    swaps = _swaps(model)
    for holder, name, _, original in swaps:
        holder[name] = original
    try:
        yield
    finally:
        for holder, name, current, _ in swaps:
            holder[name] = current


@torch.no_grad()
def restore_originals(model: nn.Module) -> None:
    """Give what was trained whole the values and dtypes that it had before injection, for good.

    Raises:
        UsageError: If these are not known.
    """
    for _, _, current, original in _swaps(model):
        current.data, current.grad = original.detach(), None
    forget_originals(model)
    leave_head_precision(model)


def _swaps(model: nn.Module) -> list[_Swap]:
    kept: dict[int, Tensor] = {}
    for module in model.modules():
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
    _require_all_kept(model, kept)
    holders: list[dict[str, Any]] = [h for m in model.modules() for h in (m._parameters, m._buffers)]
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


def _require_all_kept(model: nn.Module, kept: dict[int, Tensor]) -> None:
    adapters = [module for module in model.modules() if isinstance(module, LowRankAdapter)]
    own = [*adapters, *(layer for _, layer in token_rows_in(model))]
    known = {*kept, *(id(p) for module in own for p in module.parameters(recurse=False))}
    unknown = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if unknown:
        raise UsageError(
            f"{listed(unknown)} are trained, but were frozen when the adapters were injected: their original values "
            "were not kept. Name their modules in the method's train_head instead of unfreezing them, or disable only "
            "adapters (head=False)."
        )
    changed = [adapter for adapter in adapters if adapter.took_from_weight]
    if changed:
        raise UsageError(
            f"{len(changed)} adapters took their start out of the frozen weights (init_weights 'pissa'), which are no "
            "longer the pretrained ones. Load the pretrained model a second time, or disable adapters alone by "
            "head=False."
        )
