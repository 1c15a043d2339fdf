"""Compare what a folder of PEFT's holds with what its own configuration describes, for a model."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.head import input_embeddings, output_embeddings, task_head
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.selection import survey
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.peft_folder import CONFIG, WEIGHTS, PeftLoRA


def require_complete(model: nn.Module, lora: PeftLoRA, adapters: Mapping[str, LowRankAdapter]) -> None:
    """Check that a folder holds every tensor that its configuration asks for in this model, and no other.

    PEFT leaves a layer without tensors at its random start, and ignores tensors without a layer. Here both are refused.

    Args:
        model: The model that PEFT was given, with or without adapters.
        lora: What was read.
        adapters: The adapters in ``model``.

    Raises:
        UsageError: If a layer or a module that is saved whole lacks a tensor, a tensor belongs to none, or a layer's
            tensors are those of another kind of layer.
    """
    layers = _layers(model, adapters)
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
    _require_whole(model, lora)


def require_untied(model: nn.Module, lora: PeftLoRA, brought: Mapping[str, Tensor]) -> None:
    """Refuse values that differ for one tensor that the model has under several names.

    Args:
        model: The model that is to take them.
        lora: Where they are from.
        brought: Name of a parameter or buffer to the value in the folder.

    Raises:
        UsageError: If two values for one shared tensor differ, or only one of its names is trained in the folder.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    heads = tuple(f"{name}." for name in lora.heads(model))
    names: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        names.setdefault(id(parameter), []).append(name)
    tied: dict[str, str] = {}
    for same in names.values():
        stored = [name for name in same if name in brought]
        pairs = [pair for pair in combinations(stored, 2) if not torch.equal(*(brought[name] for name in pair))]
        trained = [name for name in stored if name.startswith(heads)]
        tied |= dict(pairs) | {name: trained[0] for name in same if trained and name not in stored}
    if tied:
        raise UsageError(
            f"{lora.folder} trained a copy of what {type(model).__name__} shares: {tied}. Untie them in the backbone "
            "(backbone_args: {tie_word_embeddings: false}) to load it."
        )


def _layers(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> dict[str, nn.Module]:
    """Full name to frozen layer of all that PEFT could adapt."""
    plain = {name: candidate.layer for name, candidate in survey(model).items()}
    adapted = {name: a.layer for name, a in adapters.items() if not isinstance(a, LowRankExperts)}
    return {**{name: layer for name, layer in plain.items() if not isinstance(layer, ExpertWeight)}, **adapted}


def _targets(model: nn.Module, lora: PeftLoRA, name: str, layer: nn.Module) -> bool:
    if lora.config["target_modules"] != "all-linear":
        return lora.targets(name)
    if not isinstance(layer, FrozenLinear):
        return False
    outputs = {id(getattr(output, "base", output)) for output in output_embeddings(model)}
    head = task_head(model) if lora.config.get("task_type") == "SEQ_CLS" else []
    return id(layer) not in outputs and not any(f"{name}.".startswith(f"{part}.") for part in head)


def _require_whole(model: nn.Module, lora: PeftLoRA) -> None:
    """Check the tensors that are not low-rank: those of the heads, and embeddings that PEFT saved unasked."""
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
