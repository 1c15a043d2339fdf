"""Fold adapters into the frozen weights, and give the plain model back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter, LowRankLayer
from lit_sparse.adapters.experts import AdaptedExperts
from lit_sparse.adapters.injection import adapters_in, replace_modules
from lit_sparse.adapters.quantized import dequantized, forget_quantization
from lit_sparse.errors import UsageError, some


@torch.no_grad()
def merge(model: nn.Module) -> nn.Module:
    """Add every adapter's product to its frozen weight, and put the plain layers back, in place.

    The sum is formed in the adapters' precision, float32 or better, and rounded once to the weight's. Entries of a
    weight that the adapter does not reach (outside the support of BA) stay bit for bit what they were. Parameters stay
    frozen as injection left them.

    Layers that are quantized, adapted or not, are unpacked first, into the dtype of the model's other frozen weights:
    the sum has entries that the few bits of a packed weight could not tell apart. The model then takes the memory of
    one that was never quantized, and says so in its configuration.

    Args:
        model: Model with adapters.

    Returns:
        ``model``, of the classes that it had before injection.

    Raises:
        UsageError: If there is no adapter in ``model``, an adapter is switched off, a sum is not finite, or a layer is
            quantized by something else than torchao or bitsandbytes. ``model`` is then what it was.
    """
    adapters = dict(adapters_in(model))
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to merge. Inject a method first.")
    off = [name for name, adapter in adapters.items() if not adapter.enabled]
    if off:
        raise UsageError(
            f"{len(off)} adapters are switched off, the first at {off[0]!r}: switch them on to merge them."
        )
    plain = dequantized(model)
    packed = {a: a.base for a in adapters.values() if isinstance(a, LowRankLayer) and a.base in plain}
    for adapter, base in packed.items():
        adapter.base = plain.pop(base)
    try:
        _require_finite(adapters)
    except UsageError:
        for adapter, base in packed.items():
            adapter.base = base
        raise
    for folded in adapters.values():
        folded.weight.copy_(_merged(folded))
    replacements: dict[nn.Module, nn.Module] = {a: a.base for a in adapters.values() if isinstance(a, LowRankLayer)}
    replacements |= {module: module.base for module in model.modules() if isinstance(module, AdaptedExperts)}
    replace_modules(model, {**replacements, **plain})
    forget_quantization(model)
    return model


def _require_finite(adapters: Mapping[str, LowRankAdapter]) -> None:
    """Raise a UsageError, before any weight is changed, if a sum would bring a NaN or an infinity into one."""
    spoilt = []
    for name, adapter in adapters.items():
        # In the adapter's dtype, since float8 has no isfinite.
        before, after = (t.to(adapter.lora_A.dtype) for t in (adapter.weight, _merged(adapter)))
        if not (after.isfinite() | ~before.isfinite()).all():
            spoilt.append(name)
    if spoilt:
        raise UsageError(
            f"{some(spoilt)} would have weights that are not finite, so nothing is merged: A, B or gate hold a NaN or "
            "an infinity, or the sum is too large for the dtype of the weights. Take a checkpoint from before, or a "
            "wider dtype."
        )


def _merged(adapter: LowRankAdapter) -> Tensor:
    weight, delta = adapter.weight, adapter.delta_weight()
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    # Not a plain sum: it would turn a frozen -0.0 into +0.0.
    return torch.where(delta != 0, merged, weight)
