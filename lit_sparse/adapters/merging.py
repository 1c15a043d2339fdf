"""Fold adapters into the frozen weights, and restore the plain model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter, ReplacesLayer
from lit_sparse.adapters.experts import AdaptedExperts
from lit_sparse.adapters.injection import adapters_in, take_out
from lit_sparse.adapters.originals import forget_originals, restore_originals
from lit_sparse.adapters.quantized import dequantized, forget_quantization
from lit_sparse.adapters.replacing import replace_modules
from lit_sparse.adapters.rowwise import RowwiseChoice, RowwiseLinear
from lit_sparse.adapters.token_rows import TokenRows, token_rows_in
from lit_sparse.errors import UsageError, listed

_MERGED = "_lit_sparse_merged"


@dataclass(frozen=True, eq=False)
class _Changed:
    """Entries of a weight before a merge: those at ``indices`` of the flat weight, or all if ``indices`` is None."""

    indices: Tensor | None
    values: Tensor


@dataclass(frozen=True, eq=False)
class _Merged:
    """Module and weights that :func:`unmerge` restores: the module with the adapters, and its weights by name."""

    adapted: nn.Module
    weights: dict[str, _Changed]


@torch.no_grad()
def merge(model: nn.Module, keep: bool = False) -> nn.Module:
    """Add every adapter's change to its frozen weight, and restore the plain layers, in place.

    The sum is formed in the adapters' precision, float32 or better, and rounded once to the weight's. Entries outside
    the support of the change do not change, bit for bit. Parameters stay frozen as injection left them.

    Quantized layers, adapted or not, are first dequantized into the dtype of the model's other frozen weights, because
    a packed weight has too few bits for the sum. The model then needs the memory of one that was never quantized, and
    its quantization config is cleared.

    Args:
        model: Model with adapters.
        keep: Keep the adapters and the old values of the entries that change, for :func:`unmerge`. This takes at most
            the memory of the weights. False: drop what an earlier merge kept.

    Returns:
        ``model``, whose modules have the classes from before injection.

    Raises:
        UsageError: If there is no adapter in ``model``, an adapter or a row of a new token is switched off, rows go
            through several adapters (:meth:`AdapterBank.rows <lit_sparse.AdapterBank.rows>`), a sum is not finite, or a
            layer is quantized by another library than torchao or bitsandbytes. With ``keep``, also if any layer is
            quantized, there are rows of new tokens, or an earlier merge with ``keep`` was not undone.
            ``model`` is not changed then.
    """
    adapters = dict(adapters_in(model))
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to merge. Inject a method first.")
    require_on(model, "merge")
    if keep and any(_MERGED in vars(module) for module in model.modules()):
        raise UsageError(
            f"{type(model).__name__} was merged with keep before, and only one merge can be undone. Call unload(model) "
            "and unmerge(model) first, or merge without keep, after which neither merge can be undone."
        )
    plain = dequantized(model)
    if keep and plain:
        raise UsageError(
            f"{len(plain)} layers are quantized: merging unpacks them, which unmerge cannot undo. Merge without keep, "
            "or load the model a second time."
        )
    if keep and any(True for _ in token_rows_in(model)):
        raise UsageError("Merging writes the rows of new tokens into the embeddings, which unmerge cannot undo.")
    packed = {a: a.base for a in adapters.values() if isinstance(a, ReplacesLayer) and a.base in plain}
    for adapter, base in packed.items():
        adapter.base = plain.pop(base)
    try:
        _require_finite(adapters, list(token_rows_in(model)))
    except UsageError:
        for adapter, base in packed.items():
            adapter.base = base
        raise
    undo: dict[nn.Module, dict[str, _Changed]] = {}
    for name, folded in adapters.items():
        merged = _merged(folded)
        if keep:
            own = "weight" if isinstance(folded, ReplacesLayer) else name.rpartition(".")[2]
            undo.setdefault(folded.layer, {})[own] = _changed(folded.weight, merged)
        folded.weight.copy_(merged)
    replacements: dict[nn.Module, nn.Module] = {a: a.base for a in adapters.values() if isinstance(a, ReplacesLayer)}
    replacements |= {module: module.base for module in model.modules() if isinstance(module, AdaptedExperts)}
    for _, layer in token_rows_in(model):
        layer.fold()
        replacements[layer] = layer.base
    for adapted, base in replacements.items():
        if base in undo:
            vars(base)[_MERGED] = _Merged(adapted, undo[base])
    replace_modules(model, {**replacements, **plain})
    forget_quantization(model)
    if not keep:
        forget_originals(model)
        for module in model.modules():
            vars(module).pop(_MERGED, None)  # from before this merge: unmerge would undo half
    return model


@torch.no_grad()
def unmerge(model: nn.Module) -> dict[str, Adapter]:
    """Undo ``merge(model, keep=True)``: restore every weight bit for bit, and the adapters.

    Args:
        model: The merged model. It may have been moved to another device or copied.

    Returns:
        Full layer name to adapter.

    Raises:
        UsageError: If ``model`` was not merged with ``keep``, was then merged without it, holds adapters again, or has
            another dtype now.
    """
    merged = {module: vars(module)[_MERGED] for module in model.modules() if _MERGED in vars(module)}
    if not merged:
        raise UsageError(
            f"{type(model).__name__} holds nothing to unmerge: only merge(model, keep=True) keeps the weights that it "
            "changes, and a later merge(model) gives them up. Load the model again, or its checkpoint."
        )
    if any(True for _ in adapters_in(model)):
        raise UsageError(f"{type(model).__name__} holds adapters again since it was merged. Call unload(model) first.")
    for module, undo in merged.items():
        for name, before in undo.weights.items():
            if module.get_parameter(name).dtype != before.values.dtype:
                raise UsageError(
                    f"The weights of {type(model).__name__} are {module.get_parameter(name).dtype} and were "
                    f"{before.values.dtype} when they were merged: what they were cannot be put back bit for bit. "
                    "Load the model again."
                )
    for module, undo in merged.items():
        del vars(module)[_MERGED]
        for name, before in undo.weights.items():
            weight = module.get_parameter(name)
            if before.indices is None:
                weight.copy_(before.values)
            else:
                weight.put_(before.indices.to(weight.device), before.values.to(weight.device))
            undo.adapted.to(weight.device).train(module.training)
    replace_modules(model, {module: undo.adapted for module, undo in merged.items()})
    return dict(adapters_in(model))


def unload(model: nn.Module) -> nn.Module:
    """Remove the adapters and restore the model from before injection, its head included, in place.

    Parameters stay frozen or trainable as they are.

    Args:
        model: Model with adapters.

    Returns:
        ``model``, whose modules have the classes from before injection.

    Raises:
        UsageError: If there is no adapter in ``model``, an adapter or a row of a new token is switched off, or the
            original values are not known, because a parameter was unfrozen after injection or PiSSA changed the frozen
            weights. ``model`` is not changed then.
    """
    if not any(True for _ in adapters_in(model)):
        raise UsageError(f"{type(model).__name__} holds no adapter to unload.")
    require_on(model, "unload")
    restore_originals(model)
    take_out(model)
    return model


def require_on(model: nn.Module, function: str) -> None:
    """Raise a UsageError that names ``function`` if adapters are of several rows, or a part is switched off."""
    if any(isinstance(module, RowwiseLinear | RowwiseChoice) for module in model.modules()):
        raise UsageError(f"The rows of a batch go through several adapters here. Call {function} outside of rows(…).")
    off = [name for name, part in (*adapters_in(model), *token_rows_in(model)) if not part.enabled]
    if off:
        raise UsageError(
            f"Adapters or rows of new tokens are switched off at {listed(off)}. Call {function} outside of "
            "disable_adapters, and with all of them switched on."
        )


def _changed(weight: Tensor, merged: Tensor) -> _Changed:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.dtype.itemsize]
    # Compare bits, because -0.0 equals 0.0.
    indices = (weight.view(integers) != merged.view(integers)).flatten().nonzero().flatten()
    if len(indices) * (indices.dtype.itemsize + weight.dtype.itemsize) >= weight.nbytes or weight.dtype.itemsize == 1:
        return _Changed(None, weight.detach().clone())
    return _Changed(indices, weight.detach().take(indices))


def _require_finite(adapters: Mapping[str, Adapter], rows: Sequence[tuple[str, TokenRows]]) -> None:
    """Raise a UsageError if a merge would write a NaN or an infinity into a weight."""
    spoilt = []
    for name, adapter in adapters.items():
        # In the adapter's dtype, since float8 has no isfinite.
        dtype = torch.promote_types(adapter.weight.dtype, torch.float32)
        before, after = (t.to(dtype) for t in (adapter.weight, _merged(adapter)))
        if not (after.isfinite() | ~before.isfinite()).all():
            spoilt.append(name)
    spoilt += [name for name, layer in rows if not layer.rows.isfinite().all()]
    if spoilt:
        raise UsageError(
            f"{listed(spoilt)} would have weights that are not finite, so nothing is merged: the adapters hold a NaN "
            "or an infinity, or the sum is too large for the dtype of the weights. Take a checkpoint from before, or a "
            "wider dtype."
        )


def _merged(adapter: Adapter) -> Tensor:
    weight, delta = adapter.weight, adapter.delta_weight()
    merged = (weight.to(delta.dtype) + delta).to(weight.dtype)
    # A plain sum would turn a frozen -0.0 into +0.0.
    return torch.where(delta != 0, merged, weight)
