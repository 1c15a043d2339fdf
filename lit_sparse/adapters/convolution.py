"""The adapter of a two-dimensional convolution."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankLayer


class LowRankConv2d(LowRankLayer):
    """A frozen convolution plus a low-rank one: A has the kernel of ``base`` and ``rank`` outputs, B is 1 × 1.

    The matrix has a column for each input channel (of a group) and place in the kernel. With several groups no
    convolution by A and B exists that equals it; their product is then formed and applied as one convolution.

    Args:
        base: Frozen convolution, of any kernel, stride, padding, dilation and groups.
        rank: Number of ranks r, at least 1.
        scale: What B diag(gate) A is multiplied by.
        dropout: Probability of zeroing an entry of x before A, while training, in [0, 1).
        gated: Whether each rank has a gate.
    """

    base: nn.Conv2d

    def __init__(self, base: nn.Conv2d, rank: int, scale: float, dropout: float = 0.0, gated: bool = False) -> None:
        super().__init__(base, base.weight[0].numel(), base.out_channels, rank, scale, dropout, gated)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in_channels, height, width)`` as ``base`` does."""
        y = self.base(x)
        if not self.enabled or not self.rank:
            return y  # type: ignore[no-any-return]
        x = self.dropout(x).to(y.dtype)
        lora_B_t = self.scaled_lora_B_t(self.training)
        if self.base.groups > 1:
            delta = self._as_weight(lora_B_t.t() @ self.lora_A)
            return y + self.base._conv_forward(x, delta.to(y.dtype), None)  # type: ignore[no-any-return]
        kernel = self.lora_A.view(self.rank, *self.base.weight.shape[1:])
        hidden = self.base._conv_forward(x, kernel.to(y.dtype), None)
        return y + F.conv2d(hidden, lora_B_t.t()[..., None, None].to(y.dtype))  # type: ignore[no-any-return]

    def _as_matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.view(self.base.weight.shape)
