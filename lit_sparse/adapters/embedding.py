"""The adapter of an embedding."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankLayer


class LowRankEmbedding(LowRankLayer):
    """A frozen embedding plus a low-rank one: ``y = base(ids) + scale · B (gate ∘ A[:, ids])``.

    As in PEFT, A is ``(rank, num_embeddings)`` and B ``(embedding_dim, rank)``: the weight is the transpose of the
    matrix. Its arguments are those of every adapter that replaces a layer, without dropout, since the input is token
    ids. The output for the ``padding_idx`` of ``base`` does not change: that column of A starts at zero and gets no
    gradient.
    """

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, rank: int, scale: float, gated: bool = False) -> None:
        super().__init__(base, rank, scale, gated=gated)
        if base.padding_idx is not None:
            nn.init.zeros_(self.lora_A[:, base.padding_idx])

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    @property
    def bias(self) -> None:
        """An embedding has none."""
        return None

    def forward(self, ids: Tensor) -> Tensor:
        """Map ids ``(...)`` to ``(..., embedding_dim)``."""
        y = self.base(ids)
        if not self.enabled or not self.rank:
            return y  # type: ignore[no-any-return]
        hidden = F.embedding(ids, self.lora_A.t(), self.base.padding_idx)
        return y + (hidden @ self.scaled_lora_B_t(self.training)).to(y.dtype)  # type: ignore[no-any-return]

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t()
