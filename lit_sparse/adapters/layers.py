"""The kinds of layers that can be adapted, and the adapter of each kind."""

from __future__ import annotations

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.convolution import LowRankConv2d
from lit_sparse.adapters.embedding import LowRankEmbedding
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.linear import FrozenLinear, LowRankLinear
from lit_sparse.adapters.quantized import is_quantized
from lit_sparse.errors import UsageError

Layer = FrozenLinear | nn.Conv2d | nn.Embedding | ExpertWeight
"""Layers that can be adapted."""


def make_adapter(layer: Layer, rank: int, scale: float, dropout: float, gated: bool) -> LowRankAdapter:
    """Make the adapter for a layer. The arguments are those of :class:`~lit_sparse.LowRankAdapter`."""
    if isinstance(layer, ExpertWeight):
        return LowRankExperts(layer, rank, scale, dropout, gated)
    if isinstance(layer, nn.Conv2d):
        return LowRankConv2d(layer, rank, scale, dropout, gated)
    if isinstance(layer, nn.Embedding):
        return LowRankEmbedding(layer, rank, scale, gated)
    return LowRankLinear(layer, rank, scale, dropout, gated)


def require_start(init_weights: str, name: str, layer: Layer, rank: int) -> None:
    """Check that A and B can start from a layer as ``init_weights`` says.

    Raises:
        UsageError: If its weight is quantized, or has too few singular values, or its inputs are not those of a linear
            layer, for EVA.
    """
    if init_weights == "lora" or (init_weights == "eva" and isinstance(layer, FrozenLinear)):
        return
    if init_weights == "eva":
        kind = type(layer.module if isinstance(layer, ExpertWeight) else layer).__name__
        raise UsageError(
            f"init_weights 'eva' starts from the inputs of linear layers; {name!r} is not linear ({kind}). Leave it "
            "out of target_modules (exclude_modules), or set another init_weights."
        )
    weight = layer.weight
    if not isinstance(layer, ExpertWeight) and is_quantized(layer):
        source = "singular vectors" if init_weights == "pissa" else "gradient"
        raise UsageError(
            f"init_weights {init_weights!r} starts from the {source} of the frozen weight; that of {name!r} is "
            "quantized. Set init_weights to 'lora', or do not quantize the backbone."
        )
    if init_weights == "gora":
        return
    present = min(weight.shape[1:] if isinstance(layer, ExpertWeight) else weight.flatten(1).shape)
    needed = rank if init_weights == "pissa" else 2 * rank
    if needed > present:
        raise UsageError(
            f"init_weights {init_weights!r} with rank {rank} needs {needed} singular values; the weight of {name!r}, "
            f"of shape {tuple(weight.shape)}, has {present}. Lower rank, or set another for this layer in overrides."
        )
