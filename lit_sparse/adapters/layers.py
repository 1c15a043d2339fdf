"""Which layers can be adapted, and by which adapter."""

from __future__ import annotations

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.convolution import LowRankConv2d
from lit_sparse.adapters.embedding import LowRankEmbedding
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.linear import FrozenLinear, LowRankLinear

Layer = FrozenLinear | nn.Conv2d | nn.Embedding | ExpertWeight
"""What can be adapted."""


def make_adapter(layer: Layer, rank: int, scale: float, dropout: float, gated: bool) -> LowRankAdapter:
    """The adapter for the kind of ``layer``; arguments as in :class:`~lit_sparse.LowRankAdapter`."""
    if isinstance(layer, ExpertWeight):
        return LowRankExperts(layer, rank, scale, dropout, gated)
    if isinstance(layer, nn.Conv2d):
        return LowRankConv2d(layer, rank, scale, dropout, gated)
    if isinstance(layer, nn.Embedding):
        return LowRankEmbedding(layer, rank, scale, gated)
    return LowRankLinear(layer, rank, scale, dropout, gated)
