"""Check that a folder in PEFT's format holds the tensors that its configuration describes."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.head import input_embeddings, output_embeddings, task_head
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.patterns import matches_tail
from lit_sparse.adapters.survey import survey
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.peft_folder import CONFIG, WEIGHTS, PeftLoRA, differs_in_peft


def require_complete(model: nn.Module, lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    """Check that a folder holds every tensor that its configuration asks for in this model, and no other.

    PEFT keeps the random start of a layer without tensors, and ignores tensors without a layer. Here both are refused.

    Args:
        model: The model that PEFT was given, with or without adapters.
        lora: The folder.
        adapters: The adapters in ``model``.

    Raises:
        UsageError: If tensors are missing, belong to no layer, or belong to another kind of layer.
    """
    layers = _layers(model, adapters)
    weights = [name for name, layer in layers.items() if isinstance(layer, ExpertWeight)]
    named = lora.config.get("target_parameters") or []
    foreign = [target for target in named if not any(matches_tail(name, target) for name in weights)]
    if foreign:
        raise UsageError(
            f"{lora.folder} adapts the target_parameters {listed(foreign)}, which are no three-dimensional weights of "
            f"experts in {type(model).__name__}. Other parameters cannot be loaded."
        )
    absent = [name for name in lora.layers if name not in layers]
    if absent:
        raise UsageError(
            f"{lora.folder} adapts {listed(absent)}, and {type(model).__name__} has no such layers: its own are "
            f"{listed(layers)}. Load the class of model that PEFT was given."
        )
    targeted = {name for name in layers if _targets(model, lora, name, layers[name])}
    lacking, extra = targeted - set(lora.layers), set(lora.layers) - targeted
    if lacking or extra:
        raise UsageError(
            f"{lora.folder / WEIGHTS} does not hold what {CONFIG} describes for {type(model).__name__}. Layers without "
            f"matrices: {listed(lacking)}; matrices of layers that are not targeted: {listed(extra)}. The folder is "
            "damaged or incomplete: save it again."
        )
    mistaken = [n for n in lora.layers if (n in lora.embeddings) != isinstance(layers[n], nn.Embedding)]
    if mistaken:
        raise UsageError(f"{lora.folder / WEIGHTS} holds {listed(mistaken)} as another kind of layer than it is here.")
    ignored = [n for n in lora.layers if isinstance(conv := layers[n], nn.Conv2d) and differs_in_peft(conv)]
    if ignored:
        raise UsageError(f"{listed(ignored)} are convolutions with dilation or padding modes that PEFT's LoRA ignores.")
    _require_whole(model, lora)


def _layers(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> dict[str, nn.Module | ExpertWeight]:
    """Full name to frozen layer, for all layers that PEFT could adapt."""
    plain = {name: candidate.layer for name, candidate in survey(model).items()}
    return {**plain, **{name: _layer_of(name, adapter) for name, adapter in adapters.items()}}


def _layer_of(name: str, adapter: LowRankAdapter) -> nn.Module | ExpertWeight:
    layer = adapter.layer
    return ExpertWeight(layer, name.rpartition(".")[2]) if isinstance(adapter, LowRankExperts) else layer


def _targets(model: nn.Module, lora: PeftLoRA, name: str, layer: nn.Module | ExpertWeight) -> bool:
    if isinstance(layer, ExpertWeight):
        return any(matches_tail(name, target) for target in lora.config.get("target_parameters") or [])
    if lora.config["target_modules"] != "all-linear":
        return lora.targets(name)
    if not isinstance(layer, FrozenLinear):
        return False
    outputs = {id(getattr(output, "base", output)) for output in output_embeddings(model)}
    head = task_head(model) if lora.config.get("task_type") == "SEQ_CLS" else []
    return id(layer) not in outputs and not any(f"{name}.".startswith(f"{part}.") for part in head)


def _require_whole(model: nn.Module, lora: PeftLoRA) -> None:
    """Check the tensors of heads, and of embeddings, which PEFT may save by itself."""
    wanted = {f"{head}.{key}" for head in lora.heads(model) for key in model.get_submodule(head).state_dict()}
    lacking = wanted - set(lora.whole)
    if lacking:
        raise UsageError(
            f"{lora.folder / WEIGHTS} lacks {listed(lacking)} of the modules that {CONFIG} names in modules_to_save. "
            "The folder is damaged or incomplete: save it again."
        )
    vocabulary = {id(layer) for layer in (*input_embeddings(model), *output_embeddings(model))}
    for name, layer in ((n, m) for n, m in model.named_modules() if id(m) in vocabulary):
        inside = "base_layer." if name in lora.layers else "token_adapter.base_layer." if name in lora.tokens else ""
        frozen = layer.layer if isinstance(layer, LowRankAdapter) else getattr(layer, "base", layer)
        wanted |= {f"{name}.{inside}{key}" for key in frozen.state_dict()}
    extra = set(lora.whole) - wanted
    if extra:
        raise UsageError(
            f"{lora.folder} holds {listed(extra)}, for which {type(model).__name__} has no place by {CONFIG}. Load the "
            "class of model that PEFT was given."
        )
