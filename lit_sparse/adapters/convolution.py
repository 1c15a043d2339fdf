"""The adapter of a two-dimensional convolution."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankLayer


class LowRankConv2d(LowRankLayer):
    """A frozen convolution plus a low-rank one: A has the kernel of ``base`` and ``rank`` outputs, B is 1 × 1.

    The matrix has a column for each input channel (of a group) and position in the kernel. With several groups, no
    pair of convolutions by A and B equals it, so that their product is formed and applied as one convolution.

    Its arguments are those of every adapter that replaces a layer; ``base`` may have any kernel, stride, padding,
    dilation and groups.
    """

    base: nn.Conv2d

    @staticmethod
    def _features(base: Any) -> tuple[int, int]:
        return base.weight[0].numel(), base.out_channels

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
