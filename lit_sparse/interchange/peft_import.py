"""Start from a LoRA that PEFT wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.convolution import LowRankConv2d
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import adapters_in, inject
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.selection import matches_tail, survey
from lit_sparse.adapters.token_rows import TokenRows, token_rows_in
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.peft_check import require_complete, require_untied
from lit_sparse.interchange.peft_folder import PeftLoRA, read_peft
from lit_sparse.interchange.vocabulary import put_rows
from lit_sparse.methods.base import Overrides
from lit_sparse.methods.lora import LoRA


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, LowRankAdapter]:
    """Start from a dense LoRA in PEFT's format, in place.

    Into a model with freshly injected adapters, of whatever method, A and B of the folder are copied, and gates set to
    1: the model then computes what PEFT's did, and training goes on sparsely from there. PEFT's scale is folded into B,
    the method keeps its own. Ranks that the adapter has beyond the folder's keep their random A and have B = 0. For
    RoseLoRA nothing is masked yet; a ``clamp`` takes effect at the first step.

    Into a model without adapters, a :class:`~lit_sparse.LoRA` is injected just as the folder says, layer by layer, for
    inference or to go on densely.

    The task head in the folder (``modules_to_save``) goes into the model's, which must be trained. Rows of tokens in it
    (``trainable_token_indices``) are trained here too; embeddings grow to hold them.

    Args:
        model: The model that PEFT was given (not PEFT's), with or without adapters.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Full layer name to adapter.

    Raises:
        UsageError: If the folder cannot be read, holds something else than plain LoRA on linear layers, convolutions
            and embeddings, or does not fit: other layers, shapes, a larger rank, a head that is frozen here, tensors
            that have no place; or if the adapters are not as new.
    """
    return install(model, read_peft(folder))


@torch.no_grad()
def install(model: nn.Module, lora: PeftLoRA) -> dict[str, LowRankAdapter]:
    """Put what was read into a model; arguments and errors as those of :func:`load_peft`."""
    require_whole(model)
    _compare_backbones(model, lora)
    adapters = dict(adapters_in(model))
    if adapters:
        _require_new(model, adapters)
    require_complete(model, lora, adapters)
    if adapters:
        _require_layers(model, lora, adapters)
    else:
        adapters = inject(model, _method(lora, lora.heads(model)))
    for name, layer in lora.layers.items():
        _start(adapters[name], layer, max(other.max_rank for other in lora.layers.values()))
    put_rows(model, lora.tokens)
    held = [*adapters.values(), *(layer for _, layer in token_rows_in(model))]
    _load_whole(model, lora, {id(p) for module in held for p in module.parameters(recurse=False)})
    return adapters


def _compare_backbones(model: nn.Module, lora: PeftLoRA) -> None:
    trained, here = lora.config.get("base_model_name_or_path"), getattr(model, "name_or_path", None)
    if trained and here and trained.rstrip("/") != str(here).rstrip("/"):
        rank_zero_warn(
            f"{lora.folder} was trained on {trained!r}, and this model is {here!r}. If that is more than another name "
            "for the same weights, the adapter is worth nothing here."
        )


def _require_new(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> None:
    used = [n for n, a in adapters.items() if not a.lora_B_t.is_meta and bool(a.lora_B_t.any())]
    if used:
        raise UsageError(
            f"{len(used)} adapters of {type(model).__name__} are not as new, the first at {used[0]!r}: its B is not "
            "zero. Load into a freshly loaded model, and inject without init_weights 'pissa', which changes the "
            "frozen weights."
        )


def _require_layers(model: nn.Module, lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    """Check that the folder's layers are those adapted here."""
    only_there = [name for name in lora.layers if name not in adapters]
    only_here = [name for name in adapters if name not in lora.layers]
    if only_there or only_here:
        raise UsageError(
            f"{lora.folder} and the method adapt other layers. In the folder only: {listed(only_there)}. Here only: "
            f"{listed(only_here)}. Set target_modules to {_tails(lora.layers, {*survey(model), *adapters})}."
        )


def _tails(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest trailing name parts, all of one length, that mean ``names`` and no other of ``every``."""
    wanted, others = set(names), set(every) - set(names)
    for length in range(1, max(name.count(".") for name in wanted) + 1):
        tails = sorted({".".join(name.split(".")[-length:]) for name in wanted})
        if not any(matches_tail(name, tail) for name in others for tail in tails):
            return tails
    return sorted(wanted)


def _method(lora: PeftLoRA, heads: list[str]) -> LoRA:
    config = lora.config
    overrides: Overrides = {}
    for name, layer in lora.layers.items():
        own: dict[str, Any] = {"rank": layer.max_rank, "alpha": layer.alpha}
        if own != {"rank": config["r"], "alpha": config["lora_alpha"]}:
            overrides[exactly(name)] = own
    return LoRA(
        target_modules="|".join(exactly(name) for name in lora.layers),
        rank=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout") or 0.0,
        train_head=heads,
        use_rslora=bool(config.get("use_rslora")),
        overrides=overrides or None,
    )


def exactly(name: str) -> str:
    """A pattern for ``target_modules`` and ``overrides`` that means one layer."""
    # In a group, since the bare name would also be taken for the trailing part of longer ones.
    return f"(?:{re.escape(name)})"


def _start(adapter: LowRankAdapter, layer: LayerFactors, largest: int) -> None:
    name, rank = layer.name, layer.max_rank
    if isinstance(adapter, LowRankConv2d):
        base = adapter.base
        if base.dilation != (1, 1) or base.padding_mode != "zeros":
            raise UsageError(
                f"{name!r} is a convolution with dilation or other padding than zeros, which PEFT leaves out."
            )
    if rank > adapter.rank:
        raise UsageError(
            f"The LoRA has rank {rank} at {name!r}, the adapter there {adapter.rank}. Set rank to {largest}, the "
            "largest of the LoRA, or override it for this layer."
        )
    shapes = (layer.in_features, layer.out_features)
    if shapes != (adapter.in_features, adapter.out_features):
        raise UsageError(
            f"The LoRA maps {shapes[0]} features to {shapes[1]} at {name!r}, the layer {adapter.in_features} to "
            f"{adapter.out_features}: it was trained on another model."
        )
    used = layer.lora_A.any(1)  # a padded layer's other ranks keep their random A, as ranks beyond the folder's do
    adapter.lora_A[:rank][used] = layer.lora_A[used].to(adapter.lora_A)
    scale = (1.0 if layer.scale is None else layer.scale) / adapter.scale
    adapter.lora_B_t.zero_()
    adapter.lora_B_t[:rank] = (layer.lora_B_t.double() * scale).to(adapter.lora_B_t)
    if adapter.gate is not None:
        adapter.gate.fill_(1)


def _is_same(model: nn.Module, name: str, here: Tensor, stored: Tensor) -> bool:
    """Whether a frozen tensor is the stored one, but for the rows in the place of which others are trained."""
    owner = model.get_submodule(name.rpartition(".base.")[0]) if ".base." in name else None
    if isinstance(owner, TokenRows):
        stored = stored.index_copy(0, owner.ids, here[owner.ids])
    return torch.equal(here, stored)


def _load_whole(model: nn.Module, lora: PeftLoRA, own: set[int]) -> None:
    """Load the task head; what else the folder brings must be what the model has."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = {**dict(model.named_buffers(remove_duplicate=False)), **parameters}
    places_in = re.compile(r"(\.token_adapter)?\.base_layer\.")
    brought = {places_in.sub(".base.", name): tensor for name, tensor in lora.whole.items()}
    require_untied(model, lora, brought)
    for name, tensor in brought.items():
        here = places[name]
        if here.shape != tensor.shape:
            raise UsageError(
                f"{lora.folder} holds {name!r} of shape {tuple(tensor.shape)}, here it has {tuple(here.shape)}: a head "
                "for another number of labels, or another vocabulary."
            )
        frozen = name in parameters and not here.requires_grad
        if frozen and not here.is_meta and not _is_same(model, name, here, tensor.to(here)):
            raise UsageError(
                f"{lora.folder} trained {name!r}, which is frozen here and has other values. Set train_head to true, "
                "or name the module in it."
            )
    for name, tensor in brought.items():
        places[name].copy_(tensor)
    alone = [n for n, p in parameters.items() if p.requires_grad and id(p) not in own and n not in brought]
    if alone:
        rank_zero_warn(f"{lora.folder} holds nothing for {listed(alone)}: these start as the backbone has them.")
