"""The trained entries of one weight apart from their model: what a checkpoint holds of a DeltaLinear."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from lit_sparse.adapters.delta import DeltaLinear


@dataclass(frozen=True, eq=False, kw_only=True)
class LayerEntries:
    """The changes of single entries of one weight.

    Args:
        name: Full name of the layer.
        indices: Their places in the flattened weight, shape ``(count,)``.
        values: The changes, shape ``(count,)``.
        shape: Rows and columns of the weight.
        packed: Bytes in a file that stores places as a code, or not at all; None: as they are here.
    """

    name: str
    indices: Tensor
    values: Tensor
    shape: tuple[int, int]
    packed: int | None = None

    alpha: ClassVar[float | None] = None
    gate: ClassVar[Tensor | None] = None

    @classmethod
    def of(cls, name: str, adapter: DeltaLinear) -> LayerEntries:
        """The entries of an adapter in a model, sharing its memory."""
        return cls(name=name, indices=adapter.indices, values=adapter.values.detach(), shape=adapter.weight_shape)

    @property
    def weights(self) -> int:
        """Entries of the whole weight."""
        return self.shape[0] * self.shape[1]

    @property
    def start_size(self) -> int:
        """Trained entries."""
        return self.values.numel()

    @property
    def nbytes(self) -> int:
        """Stored bytes of values and places."""
        return self.values.nbytes + self.indices.nbytes if self.packed is None else self.packed

    @cached_property
    def change_norms(self) -> Tensor:
        """Frobenius norm of the change, shape ``(1,)``, as :class:`~lit_sparse.adapters.factors.LayerFactors` has."""
        norm: Tensor = self.values.double().norm()
        return norm.unsqueeze(0)

    def cells(self, cells: int) -> tuple[Tensor, Tensor]:
        """Divide the weight into at most ``cells`` by ``cells`` rectangles.

        Returns:
            Root mean square of each cell's changes, and whether any of its entries changes; both of shape
            ``(rows, columns)``.
        """
        rows, columns = (min(cells, size) for size in self.shape)
        places = self.indices.long().cpu()
        row, column = places // self.shape[1], places % self.shape[1]
        # The first shape[0] % rows parts are one larger, as those of tensor_split.
        parts = [
            torch.arange(size).tensor_split(count) for size, count in zip(self.shape, (rows, columns), strict=True)
        ]
        ends = [torch.tensor([int(part[-1]) for part in split]) for split in parts]
        cell = torch.searchsorted(ends[0], row) * columns + torch.searchsorted(ends[1], column)
        values = self.values.detach().double().cpu()
        squares = torch.bincount(cell, values.square(), minlength=rows * columns).view(rows, columns)
        touched = torch.bincount(cell, (values != 0).double(), minlength=rows * columns).view(rows, columns) > 0
        sizes = torch.outer(*(torch.tensor([len(part) for part in split], dtype=torch.float64) for split in parts))
        return (squares / sizes).sqrt(), touched
