"""The frozen part of a model: its names in the state, and a sample of its values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.errors import UsageError

_SAMPLES = 4


def frozen_entries(module: nn.Module) -> set[str]:
    """Names of frozen entries in the state of ``module``: parameters, and the settings of quantized layers."""
    names = {n for n, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}
    for name, layer in quantized_layers(module):
        names.update(f"{name}.{entry}" for entry in layer.state_dict())
    return names


def trained_missing(module: nn.Module, keys: _IncompatibleKeys) -> list[str]:
    """The trained entries that a state lacks, by what ``load_state_dict`` returned; frozen weights may be absent."""
    frozen = frozen_entries(module)
    return [key for key in keys.missing_keys if key not in frozen]


def require_match(module: nn.Module, keys: _IncompatibleKeys, what: str) -> None:
    """Raise a UsageError if a state that was loaded lacks a trained entry, or has one that the module does not know.

    Args:
        module: The module that loaded the state.
        keys: What ``load_state_dict`` returned.
        what: Name of the state for the message, such as "The weights do not fit CausalLM".
    """
    missing = trained_missing(module, keys)
    if missing or keys.unexpected_keys:
        raise UsageError(
            f"{what}: {len(missing)} are missing {missing[:3]}, {len(keys.unexpected_keys)} are unknown "
            f"{keys.unexpected_keys[:3]}."
        )


def leave_out_frozen(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Remove the frozen weights from a checkpoint, which holds two states under Lightning's ``WeightAveraging``."""
    frozen = frozen_entries(module)
    for state in ("state_dict", "current_model_state"):
        if state in checkpoint:
            checkpoint[state] = {name: value for name, value in checkpoint[state].items() if name not in frozen}


def complete_average(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Add the frozen weights to an average that was saved without them, because ``WeightAveraging`` expects them."""
    if "current_model_state" in checkpoint:
        own = module.state_dict()
        checkpoint["state_dict"] = {**{name: own[name] for name in frozen_entries(module)}, **checkpoint["state_dict"]}


def frozen_sample(model: nn.Module) -> Tensor | None:
    """A few values of frozen parameters, float32 of shape (parameters, samples); None on the meta device.

    Packed (quantized) weights are skipped; they derive from the same base weights.
    """
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    plain = (p for p in model.parameters() if p.is_floating_point() and p.numel() and id(p) not in packed)
    frozen = [p.detach() for p in plain if not p.requires_grad]
    if any(p.is_meta for p in frozen) or not frozen:
        return None
    places = [[p.numel() * i // _SAMPLES for i in range(_SAMPLES)] for p in frozen]
    return torch.stack([p.flatten()[where].float().cpu() for p, where in zip(frozen, places, strict=True)])
