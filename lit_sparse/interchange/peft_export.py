"""Write adapters as the plain LoRA that PEFT and serving engines load, or as PEFT's SHiRA."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.convolution import LowRankConv2d
from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.embedding import LowRankEmbedding
from lit_sparse.adapters.experts import LowRankExperts
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.token_rows import vocabulary_layers
from lit_sparse.errors import UsageError, listed, require_choice
from lit_sparse.interchange.card import ExportReport
from lit_sparse.interchange.engines import engine_notes
from lit_sparse.interchange.export import ExportOptions, exporting, save_tensors
from lit_sparse.interchange.peft_config import common_config
from lit_sparse.interchange.peft_folder import CONFIG, PREFIX, ROWS, WEIGHTS, differs_in_peft
from lit_sparse.interchange.peft_parameters import stored_names, to_peft
from lit_sparse.interchange.peft_readback import ELSE, has_peft, read_back
from lit_sparse.interchange.peft_shira import write_shira
from lit_sparse.interchange.remains import (
    folded,
    padded,
    plain_copy,
    require_trained,
    trained_whole,
    whole_modules,
    with_rank,
    without_empty,
)
from lit_sparse.interchange.vocabulary import rows_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

Layout = Literal["ragged", "padded"]


def export_peft(
    model: nn.Module,
    folder: str | os.PathLike[str],
    layout: Layout = "padded",
    with_head: bool = True,
    **options: Unpack[ExportOptions],
) -> ExportReport:
    """Write the adapters as a plain LoRA, or as a SHiRA, in PEFT's format.

    Gate and scale are folded into B, so that every layer's scale is 1. Engines compute that scale differently: PEFT and
    transformers divide ``alpha_pattern`` by ``rank_pattern``, vLLM and TGI ``lora_alpha`` by ``r`` for all layers,
    llama.cpp ``lora_alpha`` by the rank of the tensor. The layout ``padded`` is right in all of them: every adapted
    layer is written with the same rank, padded with zeros, even if it lost all of its ranks. The layout ``ragged`` is
    smaller, leaves out layers without a rank, and is for PEFT and transformers only. So are weights of experts, which
    are written as ``target_parameters``, with the same rank for all experts of a weight.

    Adapters without factors, as those of :class:`~lit_sparse.SHiRA`, are no LoRA, and are written as PEFT's SHiRA, for
    PEFT alone.

    PEFT reads the folder back into a copy of the model, or :func:`~lit_sparse.load_peft` where PEFT is not installed.
    The folder is kept only if the outputs agree.

    Args:
        model: The Hugging Face model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        layout: Of a LoRA. ``padded``: all layers with the largest rank that remains. ``ragged``: each layer with its
            own.
        with_head: Write the modules trained whole, as ``modules_to_save``.
        **options: See :class:`~lit_sparse.ExportOptions`.

    Returns:
        Sizes, and the difference that was found.

    Raises:
        UsageError: If PEFT cannot express the adapters or the head, the frozen weights were changed by PiSSA, the
            folder is not empty, or outputs differ by more than the tolerance. Nothing is then left behind.
    """
    require_choice("layout", layout, ("ragged", "padded"))
    adapters = require_trained(model, original="a LoRA")
    _require_expressible(model, adapters)
    _require_expressible_rows(model)
    deltas = {name: adapter for name, adapter in adapters.items() if isinstance(adapter, DeltaLinear)}
    if deltas and (layout != "padded" or rows_of(model)):
        what = "layout is for A and B" if layout != "padded" else "PEFT's SHiRA has no rows of new tokens"
        raise UsageError(f"These adapters are changes of single entries, which PEFT stores as SHiRA: {what}. {ELSE}")
    with exporting("peft", model, folder, options) as draft:
        if deltas:
            notes = _write_entries(model, deltas, with_head, draft.folder)
        else:
            notes = _write(model, low_rank_in(model, "PEFT's LoRA holds A and B"), layout, with_head, draft.folder)
        if not has_peft():
            notes.append("PEFT was not installed when this folder was written: lit_sparse's own reader checked it.")
        draft.record({"layout": layout, "with_head": with_head, "notes": notes})
        draft.compare(read_back(model, plain_copy(model, forget_head=with_head), draft.folder))
    return draft.report


def _write(
    model: nn.Module, adapters: Mapping[str, LowRankAdapter], layout: Layout, with_head: bool, draft: Path
) -> list[str]:
    """Write weights and configuration; notes on the engines that can read them."""
    layers = {name: folded(name, adapter) for name, adapter in adapters.items()}
    ragged = {name: with_rank(layer, max(layer.ranks)) for name, layer in without_empty(layers).items()}
    written = ragged if layout == "ragged" else padded(layers)
    ranks = {name: layer.ranks[0] for name, layer in written.items()}
    places = stored_names(name for name in written if isinstance(adapters[name], LowRankExperts))
    tensors: dict[str, Tensor] = {}
    for name, layer in written.items():
        tensors |= _tensors(f"{PREFIX}{places.get(name, name)}", adapters[name], layer)
    saved = _saved_modules(model) if with_head else []
    tensors |= _whole(model, saved)
    rows = rows_of(model)
    tensors |= {f"{PREFIX}{name}{ROWS}": stored.rows for name, stored in rows.items()}
    save_tensors(tensors, draft / WEIGHTS)
    config = _config(model, ranks, saved, set(places))
    config["trainable_token_indices"] = {name: stored.ids for name, stored in rows.items()} or None
    (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    size, ragged_size = (sum(layer.nbytes for layer in found.values()) for found in (written, ragged))
    return engine_notes(layout, max(ranks.values()), size, ragged_size, saved, experts=bool(places))


def _write_entries(model: nn.Module, adapters: Mapping[str, DeltaLinear], with_head: bool, draft: Path) -> list[str]:
    """Write weights and configuration of a SHiRA; notes on what can read them."""
    saved = _saved_modules(model) if with_head else []
    return write_shira(adapters, common_config(model, list(adapters), saved, ()), _whole(model, saved), draft)


def _whole(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    """The tensors of modules that are saved whole."""
    states = {module: model.get_submodule(module).state_dict() for module in saved}
    return {f"{PREFIX}{m}.{key}": tensor for m, state in states.items() for key, tensor in state.items()}


def _tensors(name: str, adapter: LowRankAdapter, layer: LayerFactors) -> dict[str, Tensor]:
    """The tensors of one layer, as PEFT shapes and names them."""
    lora_A, lora_B = layer.lora_A, to_peft(layer.lora_B_t, adapter.copies)
    if isinstance(adapter, LowRankEmbedding):
        return {f"{name}.lora_embedding_A": lora_A, f"{name}.lora_embedding_B": lora_B}
    if isinstance(adapter, LowRankConv2d):
        lora_A = lora_A.view(-1, *adapter.base.weight.shape[1:])
        lora_B = lora_B[..., None, None]
    return {f"{name}.lora_A.weight": lora_A, f"{name}.lora_B.weight": lora_B}


def _config(
    model: nn.Module, ranks: Mapping[str, int], saved: list[str], parameters: Collection[str]
) -> dict[str, Any]:
    largest = max(ranks.values())
    pattern = {_pattern_key(name, ranks): rank for name, rank in ranks.items() if rank != largest}
    return {
        "peft_type": "LORA",
        **common_config(model, list(ranks), saved, parameters),
        "r": largest,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "init_lora_weights": True,
        "target_parameters": sorted(parameters) or None,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }


def _pattern_key(name: str, names: Collection[str]) -> str:
    """The full name; if another layer's name ends with it, a pattern that only matches this one."""
    others = [other for other in names if other != name and re.match(rf"(.*\.)?({name})$", other)]
    return f"^{re.escape(name)}" if others else name


def _require_expressible(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    reasons: dict[str, list[str]] = {}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for name, adapter in adapters.items():
        reason = _inexpressible(adapter)
        if reason is None and len(names[id(adapter)]) > 1:
            reason = "has several names, of which PEFT would adapt one"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    if reasons:
        told = "; ".join(f"{listed(found)} {reason}" for reason, found in reasons.items())
        raise UsageError(f"PEFT cannot express these adapters: {told}. {ELSE}")


def _require_expressible_rows(model: nn.Module) -> None:
    """Check the rows of tokens: PEFT ignores a layer's bias, and relies on the configuration for tied weights."""
    stored = rows_of(model)
    layers = vocabulary_layers(model) if stored else {}
    for name, rows in stored.items():
        tied = [other for other, layer in layers.items() if layer.weight is layers[name].weight]
        reason = None
        if rows.bias is not None:
            reason = "has a bias, which PEFT ignores"
        elif len(tied) > 1 and not getattr(model.config, "tie_word_embeddings", False):
            reason = f"shares its weight with {listed(tied[1:])} in another way than PEFT knows"
        elif any(other.endswith(name) and other not in tied for other, _ in model.named_modules()):
            reason = "has a name with which another name ends, so PEFT would confuse them"
        if reason is not None:
            raise UsageError(f"PEFT cannot express the rows of new tokens: {name!r} {reason}. {ELSE}")


def _inexpressible(adapter: Adapter) -> str | None:
    if isinstance(adapter, DeltaLinear):
        return "is a Conv1D, which PEFT's SHiRA does not know" if isinstance(adapter.base, Conv1D) else None
    if isinstance(adapter, LowRankConv2d):
        if adapter.base.groups > 1:
            return "is a convolution with groups"
        unusual = "is a convolution with dilation or other padding than zeros"
        return unusual if differs_in_peft(adapter.base) else None
    if isinstance(adapter, LowRankLinear | LowRankEmbedding | LowRankExperts):
        return None
    return "is of a kind that PEFT does not know"


def _saved_modules(model: nn.Module) -> list[str]:
    """The modules to save whole: those that are trained entirely, and those that hold another trained parameter."""
    saved = whole_modules(model)
    for name in trained_whole(model):
        if any(name.startswith(f"{module}.") for module in saved):
            continue
        owner = name.rpartition(".")[0]
        if not owner or any(isinstance(m, Adapter) for m in model.get_submodule(owner).modules()):
            raise UsageError(
                f"{name!r} is trained beside adapters in one module, and PEFT saves whole modules only. Export "
                f"with_head=False, or: {ELSE}"
            )
        saved.append(owner)
    return saved
