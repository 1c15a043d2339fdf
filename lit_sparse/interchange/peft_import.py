"""Start from a LoRA that PEFT wrote."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.injection import adapters_in, low_rank_in
from lit_sparse.adapters.patterns import NamePatterns, matches_tail
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.survey import survey
from lit_sparse.adapters.token_rows import TokenRows, token_rows_in
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.loading import (
    fill,
    inject_layers,
    places_in,
    require_shapes,
    require_untied,
    warn_if_another_backbone,
)
from lit_sparse.interchange.peft_check import require_complete
from lit_sparse.interchange.peft_folder import CONFIG, PeftLoRA, read_peft
from lit_sparse.interchange.peft_shira import PeftSHiRA, inject_shira, is_shira, read_shira
from lit_sparse.interchange.vocabulary import put_rows

_BASE_LAYER = re.compile(r"(\.token_adapter)?\.base_layer\.")


def load_peft(model: nn.Module, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Start from a dense LoRA, or load a SHiRA, in PEFT's format, in place.

    A model with freshly injected adapters, of any method, gets the folder's A and B, and gates of 1: it then computes
    what PEFT's model did, and training goes on sparsely from there. PEFT's scale is folded into B; the method keeps its
    own. Ranks beyond the folder's keep their random A and get B = 0. For RoseLoRA nothing is masked yet; a ``clamp``
    takes effect at the first step.

    A model without adapters gets a :class:`~lit_sparse.LoRA` with the folder's layers and ranks, for inference or for
    dense training, or the entries of the folder's SHiRA.

    The folder's task head (``modules_to_save``) replaces the model's, which must be trained. Rows of tokens
    (``trainable_token_indices``) are trained here too; embeddings grow to hold them.

    Args:
        model: The model that PEFT was given (not PEFT's), with or without adapters.
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns:
        Full layer name to adapter.

    Raises:
        UsageError: If the folder cannot be read, is no plain LoRA on linear layers, convolutions, embeddings and
            weights of experts, or does not fit the model (layers, shapes, ranks, a frozen head, tensors without a
            place), or if the adapters were trained already.
    """
    path = Path(folder)
    return _install_shira(model, read_shira(path)) if is_shira(path) else install(model, read_peft(path))


@torch.no_grad()
def install(model: nn.Module, lora: PeftLoRA) -> dict[str, LowRankAdapter]:
    """Put a LoRA into a model; arguments and errors as those of :func:`load_peft`."""
    require_whole(model)
    warn_if_another_backbone(model, lora.config.get("base_model_name_or_path"), lora.folder)
    adapters, config = low_rank_in(model, f"{lora.folder} holds A and B"), lora.config
    _require_new(model, adapters)
    require_complete(model, lora, adapters)
    if adapters:
        _require_layers(model, lora, adapters)
        _require_ranks(lora, adapters)
        for name, layer in lora.layers.items():
            fill(adapters[name], layer, str(lora.folder))
    else:
        adapters = inject_layers(
            model,
            lora.layers,
            str(lora.folder),
            dropout=config.get("lora_dropout") or 0.0,
            train_head=lora.heads(model),
            use_rslora=bool(config.get("use_rslora")),
        )
    put_rows(model, lora.tokens)
    held = [*adapters.values(), *(layer for _, layer in token_rows_in(model))]
    _load_whole(model, lora, {id(p) for module in held for p in module.parameters(recurse=False)})
    return adapters


@torch.no_grad()
def _install_shira(model: nn.Module, shira: PeftSHiRA) -> dict[str, DeltaLinear]:
    if any(True for _ in adapters_in(model)):
        raise UsageError(
            f"{shira.folder} holds a SHiRA, from which no other adapters can start: load it into a model without any, "
            "or export it as merged and give that folder as backbone."
        )
    require_whole(model)
    warn_if_another_backbone(model, shira.config.get("base_model_name_or_path"), shira.folder)
    patterns, tails = (NamePatterns(f"{shira.folder / CONFIG}: the pattern", tails=tails) for tails in (False, True))
    lora = PeftLoRA(shira.folder, shira.config, {}, set(), shira.whole, {}, patterns, tails)
    targeted = {name for name, layer in survey(model).items() if lora.targets(name)}
    if shira.config["target_modules"] != "all-linear" and targeted != set(shira.values):
        raise UsageError(
            f"{shira.folder} holds entries of {listed(shira.values)}, and {CONFIG} names {listed(targeted)}: the "
            "folder is damaged, or of another model."
        )
    adapters = inject_shira(model, shira, lora.heads(model))
    _load_whole(model, lora, {id(adapter.values) for adapter in adapters.values()})
    return adapters


def _require_new(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> None:
    used = [n for n, a in adapters.items() if not a.lora_B_t.is_meta and bool(a.lora_B_t.any())]
    if used:
        raise UsageError(
            f"{len(used)} adapters of {type(model).__name__} are not as new, the first at {used[0]!r}: its B is not "
            "zero. Load into a freshly loaded model, and inject without init_weights 'pissa', which changes the frozen "
            "weights."
        )


def _require_layers(model: nn.Module, lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    only_there = [name for name in lora.layers if name not in adapters]
    only_here = [name for name in adapters if name not in lora.layers]
    if only_there or only_here:
        raise UsageError(
            f"{lora.folder} and the method adapt other layers. In the folder only: {listed(only_there)}. Here only: "
            f"{listed(only_here)}. Set target_modules to {_tails(lora.layers, {*survey(model), *adapters})}."
        )


def _tails(names: Iterable[str], every: Iterable[str]) -> list[str]:
    """The shortest name suffixes, all of one length, that match ``names`` and no other of ``every``."""
    wanted, others = set(names), set(every) - set(names)
    for length in range(1, max(name.count(".") for name in wanted) + 1):
        tails = sorted({".".join(name.split(".")[-length:]) for name in wanted})
        if not any(matches_tail(name, tail) for name in others for tail in tails):
            return tails
    return sorted(wanted)


def _require_ranks(lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    largest = max(layer.max_rank for layer in lora.layers.values())
    for name, layer in lora.layers.items():
        if layer.max_rank > adapters[name].rank:
            raise UsageError(
                f"The LoRA has rank {layer.max_rank} at {name!r}, the adapter there {adapters[name].rank}. Set rank to "
                f"{largest}, the largest of the LoRA, or override it for this layer."
            )


def _is_same(model: nn.Module, name: str, here: Tensor, stored: Tensor) -> bool:
    """Whether a frozen tensor equals the stored one, apart from rows that are trained separately."""
    owner = model.get_submodule(name.rpartition(".base.")[0]) if ".base." in name else None
    if isinstance(owner, TokenRows):
        stored = stored.index_copy(0, owner.ids, here[owner.ids])
    return torch.equal(here, stored)


def _load_whole(model: nn.Module, lora: PeftLoRA, own: set[int]) -> None:
    """Load the task head; other stored tensors must equal the model's."""
    parameters, places = dict(model.named_parameters(remove_duplicate=False)), places_in(model)
    brought = {_BASE_LAYER.sub(".base.", name): tensor for name, tensor in lora.whole.items()}
    heads = tuple(f"{name}." for name in lora.heads(model))
    require_untied(model, brought, lora.folder, [name for name in brought if name.startswith(heads)])
    require_shapes(model, {name: tensor.shape for name, tensor in brought.items()}, lora.folder)
    for name, tensor in brought.items():
        here = places[name]
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
