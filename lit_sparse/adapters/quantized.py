"""Frozen layers whose weight is stored in fewer bits, by torchao or bitsandbytes."""

from __future__ import annotations

from torch import Tensor, nn


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` is packed: a tensor of a class of its own, or of integers."""
    weight = layer.weight
    return isinstance(weight, Tensor) and (type(weight.data) is not Tensor or not weight.is_floating_point())
