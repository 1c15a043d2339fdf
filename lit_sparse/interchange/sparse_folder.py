"""Sparse adapters and edit patches in a folder: the non-zero entries of A and B, or of their product."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.injection import adapters_in, low_rank_in
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.adapters.survey import survey
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.card import ExportReport
from lit_sparse.interchange.export import ExportOptions, exporting, save_tensors
from lit_sparse.interchange.loading import (
    inject_layers,
    places_in,
    require_shapes,
    require_untied,
    warn_if_another_backbone,
)
from lit_sparse.interchange.patches import add, patch_of, require_fit, tensors_of
from lit_sparse.interchange.remains import (
    folded,
    plain_copy,
    require_trained,
    trained_whole,
    weight_name,
    whole_modules,
)
from lit_sparse.interchange.stored_folder import HEAD, PARTS, TOKENS, VERSIONS, WEIGHTS, Saved, read_folder
from lit_sparse.interchange.vocabulary import put_rows, rows_of, write_rows

if TYPE_CHECKING:
    from typing_extensions import Unpack

_LOCAL = 0.1
"""Share of entries beyond which a patch is no local edit, and larger than A and B."""


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportReport:
    """Write adapters of any kind and the head, as small as they are, for :func:`load_adapter`.

    Gate and scale are folded into B; ranks that contribute nothing are left out. A and Bᵀ have a row for each rank.
    Each is stored whole, or as columns and values of its non-zero entries (the same number in each row), whichever is
    smaller: ``<layer>.lora_A``, or ``<layer>.lora_A.indices`` and ``<layer>.lora_A.values``.

    Args:
        model: The model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        **options: See :class:`~lit_sparse.ExportOptions`.

    Returns:
        Sizes, and the difference that was found when the folder was read back into a copy of the model.

    Raises:
        UsageError: If there is no adapter, the frozen weights were changed by PiSSA, the folder is not empty, or
            outputs differ by more than the tolerance. Nothing is then left behind.
    """
    require_trained(model, original="the adapter")
    adapters = low_rank_in(model, "The format sparse holds A and B", "Use export_delta (format delta).")
    with exporting("sparse", model, folder, options) as draft:
        draft.record(_write_sparse(model, adapters, draft.folder))
        draft.compare(_read(model, draft.folder))
    return draft.report


def export_delta(model: nn.Module, folder: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportReport:
    """Write which entries of the frozen weights training changed, and by how much: a patch of the model.

    :func:`load_adapter` adds it to the weights of a plain model, as :func:`~lit_sparse.merge` would: entries outside
    the support of BA stay bit for bit what they were. For few, precise edits; with more than about one entry per row
    of A and B, :func:`save_adapter` is smaller.

    Args:
        model: The model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        **options: See :class:`~lit_sparse.ExportOptions`.

    Returns:
        Sizes, and the difference that was found when the folder was read back into a copy of the model.

    Raises:
        UsageError: If there is no adapter, a frozen weight is quantized or was changed by PiSSA, the folder is not
            empty, or outputs differ by more than the tolerance. Nothing is then left behind.
    """
    adapters = require_trained(model, original="a patch")
    packed = {id(layer) for _, layer in quantized_layers(model)}
    found = [name for name, adapter in adapters.items() if id(adapter.layer) in packed]
    if found:
        raise UsageError(
            f"The frozen weights of {listed(found)} are quantized: there are no entries to add to. Use save_adapter "
            "(format sparse), or export_merged (merged), which dequantizes them."
        )
    with exporting("delta", model, folder, options) as draft:
        draft.record(_write_delta(model, adapters, draft.folder))
        draft.compare(_read(model, draft.folder))
    return draft.report


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, LowRankAdapter]:
    """Put what :func:`save_adapter` or :func:`export_delta` wrote into a plain model of the same class, in place.

    Sparse adapters are injected with the ranks that they have, as a dense :class:`~lit_sparse.LoRA` for inference:
    training would not keep their zeros. A patch is added to the frozen weights and leaves no adapter; loading it twice
    adds it twice.

    Args:
        model: Freshly loaded, with a head for as many labels.
        folder: The folder.

    Returns:
        Full layer name to adapter; empty for a patch.

    Raises:
        UsageError: If the folder cannot be read or does not fit the model, or the model holds adapters.
    """
    saved = read_folder(Path(folder))
    if any(True for _ in adapters_in(model)):
        raise UsageError(f"{type(model).__name__} holds adapters already. Load into a freshly loaded model.")
    require_whole(model)
    warn_if_another_backbone(model, saved.entries.get("base_model_name_or_path"), saved.folder)
    head = {name.removeprefix(HEAD): tensor for name, tensor in saved.tensors.items() if name.startswith(HEAD)}
    is_delta, layers = saved.entries["format"] == "delta", saved.entries["layers"]
    known: Iterable[str] = layers if is_delta else survey(model)
    absent = [name for name in layers if name not in known]
    if absent:
        raise UsageError(
            f"{saved.folder} holds {listed(absent)}, which {type(model).__name__} lacks. Load a "
            f"{saved.entries.get('model_class')}."
        )
    patched = {name: entry["shape"] for name, entry in layers.items()} if is_delta else {}
    require_shapes(model, {**patched, **{name: tensor.shape for name, tensor in head.items()}}, saved.folder)
    require_untied(model, head, saved.folder)
    adapters = _add_delta(model, saved) if is_delta else _inject(model, saved)
    (write_rows if is_delta else put_rows)(model, saved.tokens)
    places = places_in(model)
    for name, tensor in head.items():
        places[name].copy_(tensor)
    return adapters


def _read(model: nn.Module, draft: Path) -> nn.Module:
    copied = plain_copy(model)
    load_adapter(copied, draft)
    return copied


def _write_sparse(model: nn.Module, adapters: Mapping[str, LowRankAdapter], draft: Path) -> dict[str, Any]:
    layers = {name: folded(name, adapter) for name, adapter in adapters.items()}
    left = {name: layer for name, layer in layers.items() if any(layer.ranks)}
    shapes = {
        name: {"ranks": layer.ranks, "shape": [layer.out_features, layer.in_features]} for name, layer in left.items()
    }
    tensors: dict[str, Tensor] = {}
    for name, layer in left.items():
        for part in PARTS:
            tensors |= _packed(f"{name}.{part}", getattr(layer, part))
    return {"version": VERSIONS["sparse"], **_with_head(model, tensors, shapes, draft)}


def _write_delta(model: nn.Module, adapters: Mapping[str, Adapter], draft: Path) -> dict[str, Any]:
    patch = patch_of(adapters)
    shapes = {weight_name(name, adapter): list(adapter.weight.shape) for name, adapter in adapters.items()}
    changed = sum(int(entries.values.count_nonzero()) for entries in patch.values())
    share = changed / sum(adapter.weight.numel() for adapter in adapters.values())
    if share > _LOCAL:
        rank_zero_warn(
            f"The patch changes {share:.0%} of the entries of the adapted weights: it is no local edit, and larger "
            "than the adapters. Use save_adapter (format sparse), or train with a lower density or rank."
        )
    layers = {name: {"shape": shapes[name]} for name in patch}
    stored = _with_head(model, tensors_of(patch), layers, draft)
    return {"version": VERSIONS["delta"], **stored, "changed_entries": changed}


def _with_head(model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, Any], draft: Path) -> dict[str, Any]:
    head, rows = trained_whole(model), rows_of(model)
    parts = {f"{TOKENS}{name}.{part}": getattr(new, part) for name, new in rows.items() for part in ("rows", "bias")}
    tensors |= {name: tensor for name, tensor in parts.items() if tensor is not None}
    save_tensors({**tensors, **{f"{HEAD}{name}": tensor for name, tensor in head.items()}}, draft / WEIGHTS)
    tokens = {name: {"ids": n.ids, "texts": n.texts, "bias": n.bias is not None} for name, n in rows.items()}
    shapes = {name: list(tensor.shape) for name, tensor in head.items()}
    return {
        "layers": layers,
        "head_modules": whole_modules(model),
        "head": shapes,
        "tokens": tokens,
    }


def _packed(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix whole, or the values and columns of its non-zero entries, whichever is smaller."""
    nonzero = matrix != 0
    count = int(nonzero.sum(1).max())
    dtype = _index_dtype(matrix.shape[1])
    if count * (dtype.itemsize + matrix.dtype.itemsize) >= matrix.shape[1] * matrix.dtype.itemsize:
        return {name: matrix}
    # Rows with fewer non-zero entries also store some of their zeros.
    columns = nonzero.byte().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
    return {f"{name}.indices": columns.to(dtype), f"{name}.values": matrix.gather(1, columns)}


def _index_dtype(count: int) -> torch.dtype:
    """The smallest integer dtype for indices below ``count``."""
    limits = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}
    return next((dtype for dtype, limit in limits.items() if count <= limit), torch.int64)


def _inject(model: nn.Module, saved: Saved) -> dict[str, LowRankAdapter]:
    if not saved.factors:
        return {}
    return inject_layers(model, saved.factors, str(saved.folder), train_head=saved.entries["head_modules"])


def _add_delta(model: nn.Module, saved: Saved) -> dict[str, LowRankAdapter]:
    require_fit(model, saved.patch, str(saved.folder))
    add(model, saved.patch)
    return {}
