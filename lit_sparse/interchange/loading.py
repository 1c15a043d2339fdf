"""Put stored factors, heads and other tensors into a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import inject
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.metadata import name_of
from lit_sparse.methods.lora import LoRA


def inject_layers(
    model: nn.Module, layers: Mapping[str, LayerFactors], source: str, **arguments: Any
) -> dict[str, LowRankAdapter]:
    """Inject a dense LoRA of exactly these layers and ranks, and fill it.

    Args:
        model: Without adapters.
        layers: By full name; at least one.
        source: Where they are from, for errors.
        **arguments: Further arguments of :class:`~lit_sparse.LoRA`.

    Returns:
        Full layer name to adapter.
    """
    settings: dict[str, dict[str, Any]]
    settings = {exactly(name): {"rank": max(layer.ranks), "alpha": layer.alpha} for name, layer in layers.items()}
    common = next(iter(settings.values()))
    overrides = {pattern: own for pattern, own in settings.items() if own != common}
    method = LoRA(target_modules="|".join(settings), **common, overrides=overrides or None, **arguments)
    adapters = inject(model, method)
    for name, layer in layers.items():
        fill(adapters[name], layer, source)
    return adapters


@torch.no_grad()
def fill(adapter: LowRankAdapter, layer: LayerFactors, source: str) -> None:
    """Copy factors into an adapter whose ranks suffice. Its scale stays, and gates become 1.

    Gates that the method computes stay as they are, and B is divided by them.

    Ranks beyond those of the factors, and those with a row of zeros in A, keep the adapter's A, and get B = 0.

    Raises:
        UsageError: If the adapter is of another size, or a computed gate is 0.
    """
    there = _size(layer.in_features, layer.out_features, len(layer.ranks))
    here = _size(adapter.in_features, adapter.out_features, adapter.copies)
    if there != here:
        raise UsageError(f"{source} maps {there} at {layer.name!r}, the layer {here}: it was trained on another model.")
    factor = (1.0 if layer.scale is None else layer.scale) / adapter.scale
    adapter.lora_B_t.zero_()
    copies = (adapter.lora_A.split(adapter.rank), adapter.lora_B_t.split(adapter.rank))
    stored = (layer.lora_A.split(layer.ranks), (layer.lora_B_t.double() * factor).split(layer.ranks))
    for own_A, own_B_t, lora_A, lora_B_t in zip(*copies, *stored, strict=True):
        used = lora_A.any(1)
        own_A[: len(lora_A)][used] = lora_A[used].to(own_A)
        own_B_t[: len(lora_A)] = lora_B_t.to(own_B_t)
    gate = adapter.effective_gate()
    if gate is None:
        return
    if adapter.gate_function is None:
        gate.fill_(1)
        return
    if not gate.is_meta and not bool((gate > 0).all()):
        raise UsageError(f"The method closes gates of {layer.name!r} from the start: it cannot start from {source}.")
    adapter.lora_B_t.div_(gate.unsqueeze(1))


def warn_if_another_backbone(model: nn.Module, trained_on: object, source: Path) -> None:
    """Warn where the names of the two backbones differ."""
    here = name_of(model)
    names = {str(name).rstrip("/") for name in (here, getattr(model, "name_or_path", None))}
    if trained_on and here and str(trained_on).rstrip("/") not in names:
        rank_zero_warn(
            f"{source} was trained on {trained_on!r}, and this model is {here!r}. It only works on the weights that "
            "it was trained on."
        )


def places_in(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all of their names."""
    buffers = dict(model.named_buffers(remove_duplicate=False))
    return {**buffers, **dict(model.named_parameters(remove_duplicate=False))}


def require_shapes(model: nn.Module, shapes: Mapping[str, Sequence[int]], source: Path) -> None:
    """Check that the model has tensors of these names and shapes.

    Raises:
        UsageError: If it has not.
    """
    places, kind = places_in(model), type(model).__name__
    absent = [name for name in shapes if name not in places]
    if absent:
        raise UsageError(
            f"{source} holds {listed(absent)}, which {kind} lacks. It was made for another class of model."
        )
    for name, shape in shapes.items():
        if places[name].shape != tuple(shape):
            raise UsageError(
                f"{source} holds {name!r} of shape {tuple(shape)}, {kind} has {tuple(places[name].shape)}: it was made "
                "for another size, vocabulary or number of labels."
            )


def require_untied(
    model: nn.Module, tensors: Mapping[str, Tensor], source: Path, trained: Collection[str] = ()
) -> None:
    """Refuse two values for one tensor that the model has under several names.

    Args:
        model: The model that is to take them.
        tensors: Name to stored value.
        source: Where they are from.
        trained: Names of stored tensors that differ from those of the backbone, which therefore must not be shared.

    Raises:
        UsageError: If stored values differ, or only one of the names was trained.
    """
    groups: dict[int, list[str]] = {}
    for name, tensor in places_in(model).items():
        groups.setdefault(id(tensor), []).append(name)
    for names in groups.values():
        stored = [name for name in names if name in tensors]
        differ = any(not torch.equal(tensors[name], tensors[stored[0]]) for name in stored)
        if differ or (len(stored) < len(names) and any(name in trained for name in stored)):
            raise UsageError(
                f"{source} holds two values for what {type(model).__name__} shares: {listed(names)}. Untie them in the "
                "backbone (backbone_args: {tie_word_embeddings: false}) to load it."
            )


def exactly(name: str) -> str:
    """A pattern for ``target_modules`` and ``overrides`` that means one layer."""
    # In a group, since the bare name would also match longer names that end with it.
    return f"(?:{re.escape(name)})"


def _size(inputs: int, outputs: int, experts: int) -> str:
    return f"{inputs} features to {outputs}" + (f" in {experts} experts" if experts > 1 else "")
