"""Sparse adapters and edit patches in a folder: of A, B or of their product only what is not zero."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import adapters_in, inject
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.adapters.selection import survey
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.card import Provenance
from lit_sparse.interchange.export import ExportReport, Form, Terms, export, save_tensors
from lit_sparse.interchange.patches import add, index_dtype, patch_from, patch_of, require_fit, tensors_of
from lit_sparse.interchange.peft_import import exactly
from lit_sparse.interchange.remains import (
    folded,
    plain_copy,
    require_original_weights,
    require_trained,
    trained_whole,
    weight_name,
    whole_modules,
)
from lit_sparse.interchange.stored_folder import HEAD, PARTS, TOKENS, VERSION, WEIGHTS, Saved, read_folder
from lit_sparse.interchange.vocabulary import put_rows, rows_of, write_rows
from lit_sparse.methods.lora import LoRA

# A patch of more entries than this is no local edit, and larger than A and B.
_LOCAL = 0.1


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tolerance: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    push_to_hub: str | None = None,
) -> ExportReport:
    """Write adapters of any kind and head as small as they are, for :func:`load_adapter`.

    Gate and scale are folded into B, ranks that contribute nothing are left out. A and Bᵀ, both with a row for each
    rank, are stored whole or as the places and values of what is not zero, equally many in each row, whichever is
    smaller: ``<layer>.lora_A``, or ``<layer>.lora_A.indices`` and ``<layer>.lora_A.values``.

    Args:
        model: The model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the model's dtype.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: What the card says of method, metrics and license.
        push_to_hub: Repository on the hub to upload the folder to.

    Returns:
        Sizes, and the difference that was found when the folder was read back into a copy of the model.

    Raises:
        UsageError: If there is no adapter, the frozen weights were changed by PiSSA, the folder is not empty, or
            outputs differ by more than the tolerance. Nothing is then left behind.
    """
    adapters = require_trained(model)
    require_original_weights(adapters, "the adapter")
    form = Form("sparse", functools.partial(_write_sparse, model, adapters), functools.partial(_read, model))
    return export(model, folder, form, Terms(tolerance, batch, provenance, push_to_hub))


def export_delta(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tolerance: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    push_to_hub: str | None = None,
) -> ExportReport:
    """Write, for each frozen weight, which entries training changed and by how much: a patch of the model.

    :func:`load_adapter` adds it to the weights of a plain model, as :func:`~lit_sparse.merge` would: entries outside
    the support of BA stay bit for bit what they were. For few, precise edits; with more than about one entry per row
    of A and B, :func:`save_adapter` is smaller.

    Args:
        model: The model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the model's dtype.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: What the card says of method, metrics and license.
        push_to_hub: Repository on the hub to upload the folder to.

    Returns:
        Sizes, and the difference that was found when the folder was read back into a copy of the model.

    Raises:
        UsageError: If there is no adapter, a frozen weight is quantized or was changed by PiSSA, the folder is not
            empty, or outputs differ by more than the tolerance. Nothing is then left behind.
    """
    adapters = require_trained(model)
    require_original_weights(adapters, "a patch")
    packed = {id(layer) for _, layer in quantized_layers(model)}
    found = [name for name, adapter in adapters.items() if id(adapter.layer) in packed]
    if found:
        raise UsageError(
            f"The frozen weights of {listed(found)} are quantized: there are no entries to add to. Use save_adapter "
            "(format sparse), or export_merged (merged), which unpacks them."
        )
    form = Form("delta", functools.partial(_write_delta, model, adapters), functools.partial(_read, model))
    return export(model, folder, form, Terms(tolerance, batch, provenance, push_to_hub))


@torch.no_grad()
def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, LowRankAdapter]:
    """Put what :func:`save_adapter` or :func:`export_delta` wrote into a plain model of the same class, in place.

    Sparse adapters are injected with the ranks that they have, as a dense :class:`~lit_sparse.LoRA` whose zeros would
    not stay zero in training: for inference. A patch is added to the frozen weights, and leaves no adapter; loading it
    twice adds it twice.

    Args:
        model: Freshly loaded, with a head for as many labels.
        folder: What was written.

    Returns:
        Full layer name to adapter; empty for a patch.

    Raises:
        UsageError: If the folder cannot be read or does not fit the model, or the model holds adapters.
    """
    saved = read_folder(Path(folder))
    if any(True for _ in adapters_in(model)):
        raise UsageError(f"{type(model).__name__} holds adapters already. Load into a freshly loaded model.")
    require_whole(model)
    base = saved.entries.get("base_model_name_or_path")
    here = getattr(model, "name_or_path", None)
    if base and here and str(base).rstrip("/") != str(here).rstrip("/"):
        rank_zero_warn(
            f"{folder} was trained on {base!r}, and this model is {here!r}. If that is more than another name for the "
            "same weights, the adapter is worth nothing here."
        )
    head = {name.removeprefix(HEAD): tensor for name, tensor in saved.tensors.items() if name.startswith(HEAD)}
    places = _places(model)
    _require_places(model, saved, places, {name: list(tensor.shape) for name, tensor in head.items()})
    adapters = _add_delta(model, saved) if saved.entries["format"] == "delta" else _inject(model, saved)
    (write_rows if saved.entries["format"] == "delta" else put_rows)(model, saved.tokens)
    places |= _places(model)  # a buffer of a head that went to float32 is another tensor
    for name, tensor in head.items():
        same = [other for other in head if places[other] is places[name] and not torch.equal(head[other], tensor)]
        if same:
            raise UsageError(
                f"{folder} holds two values for what {type(model).__name__} shares: {listed([name, *same])}. Untie "
                "them in the backbone (tie_word_embeddings=False) to load it."
            )
        places[name].copy_(tensor)
    return adapters


def _read(model: nn.Module, draft: Path) -> nn.Module:
    copied = plain_copy(model)
    load_adapter(copied, draft)
    return copied


def _write_sparse(model: nn.Module, adapters: Mapping[str, LowRankAdapter], draft: Path) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for name, adapter in adapters.items():
        remains = folded(name, adapter)
        if not any(remains.ranks):
            continue
        layers[name] = {"ranks": remains.ranks, "shape": [adapter.out_features, adapter.in_features]}
        for part in PARTS:
            tensors |= _packed(f"{name}.{part}", getattr(remains, part))
    return _with_head(model, tensors, layers, draft)


def _write_delta(model: nn.Module, adapters: Mapping[str, LowRankAdapter], draft: Path) -> dict[str, Any]:
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
    return {**_with_head(model, tensors_of(patch), layers, draft), "changed_entries": changed}


def _with_head(model: nn.Module, tensors: dict[str, Tensor], layers: dict[str, Any], draft: Path) -> dict[str, Any]:
    head, rows = trained_whole(model), rows_of(model)
    parts = {f"{TOKENS}{name}.{part}": getattr(new, part) for name, new in rows.items() for part in ("rows", "bias")}
    tensors |= {name: tensor for name, tensor in parts.items() if tensor is not None}
    save_tensors({**tensors, **{f"{HEAD}{name}": tensor for name, tensor in head.items()}}, draft / WEIGHTS)
    tokens = {name: {"ids": n.ids, "texts": n.texts, "bias": n.bias is not None} for name, n in rows.items()}
    shapes = {name: list(tensor.shape) for name, tensor in head.items()}
    return {
        "version": VERSION,
        "layers": layers,
        "head_modules": whole_modules(model),
        "head": shapes,
        "tokens": tokens,
    }


def _packed(name: str, matrix: Tensor) -> dict[str, Tensor]:
    """A matrix as it is, or its entries that are not zero with their columns, if that is smaller."""
    nonzero = matrix != 0
    count = int(nonzero.sum(1).max())
    dtype = index_dtype(matrix.shape[1])
    if count * (dtype.itemsize + matrix.dtype.itemsize) >= matrix.shape[1] * matrix.dtype.itemsize:
        return {name: matrix}
    # Rows with fewer are filled up with zeros from where they stand.
    columns = nonzero.byte().argsort(dim=1, descending=True, stable=True)[:, :count].sort(1).values
    return {f"{name}.indices": columns.to(dtype), f"{name}.values": matrix.gather(1, columns)}


def _places(model: nn.Module) -> dict[str, Tensor]:
    return {
        **dict(model.named_buffers(remove_duplicate=False)),
        **dict(model.named_parameters(remove_duplicate=False)),
    }


def _require_places(
    model: nn.Module, saved: Saved, places: Mapping[str, Tensor], head: Mapping[str, list[int]]
) -> None:
    layers: dict[str, Any] = saved.entries["layers"]
    is_delta = saved.entries["format"] == "delta"
    known: Iterable[str] = places if is_delta else survey(model)
    absent = [name for name in layers if name not in known] + [name for name in head if name not in places]
    if absent:
        raise UsageError(
            f"{saved.folder} has {listed(absent)}, which {type(model).__name__} has not. Load a "
            f"{saved.entries.get('model_class')}, of which it is."
        )
    wanted = {**head, **({name: entry["shape"] for name, entry in layers.items()} if is_delta else {})}
    for name, shape in wanted.items():
        here = tuple(places[name].shape)
        if here != tuple(shape):
            raise UsageError(
                f"{saved.folder} has {name!r} of shape {tuple(shape)}, {type(model).__name__} of {here}: it is "
                "of another size, or has another number of labels."
            )


def _inject(model: nn.Module, saved: Saved) -> dict[str, LowRankAdapter]:
    layers: dict[str, dict[str, Any]] = saved.entries["layers"]
    if not layers:
        return {}
    ranks = {name: max(entry["ranks"]) for name, entry in layers.items()}
    largest = max(ranks.values())
    method = LoRA(
        target_modules="|".join(exactly(name) for name in layers),
        rank=largest,
        alpha=largest,
        train_head=saved.entries["head_modules"],
        overrides={exactly(n): {"rank": r, "alpha": r} for n, r in ranks.items() if r != largest} or None,
    )
    adapters = inject(model, method)
    for name in layers:
        _fill(saved, name, adapters[name], saved.factors[name])
    return adapters


def _fill(saved: Saved, name: str, adapter: LowRankAdapter, remains: LayerFactors) -> None:
    there = (remains.lora_A.shape[1], remains.lora_B_t.shape[1], len(remains.ranks))
    here = (adapter.in_features, adapter.out_features, adapter.copies)
    if there != here:
        raise UsageError(
            f"{saved.folder} adapts {name!r} as (inputs, outputs, experts) = {there}, here it has {here}: it was "
            "trained on another model."
        )
    for part in PARTS:
        parameter: Tensor = getattr(adapter, part)
        parameter.zero_()
        rows = getattr(remains, part).split(remains.ranks)
        for own, values in zip(parameter.split(adapter.rank), rows, strict=True):
            own[: len(values)] = values.to(own)


def _add_delta(model: nn.Module, saved: Saved) -> dict[str, LowRankAdapter]:
    stored = {f"{name}.{part}" for name in saved.entries["layers"] for part in ("indices", "values")}
    patch = patch_from({key: tensor for key, tensor in saved.tensors.items() if key in stored})
    require_fit(model, patch, str(saved.folder))
    add(model, patch)
    return {}
