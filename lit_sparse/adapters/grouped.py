"""Products of rows with a matrix of their own group, such as tokens with the weights of their expert."""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse.adapters.fused import autocasts

_BYTES = 16
"""The kernels take rows of a multiple of this."""

_CAPABILITIES = (9, 10)
"""Major compute capabilities of GPUs for which torch has a kernel. On others, it multiplies one group after the other,
and waits at every product to learn how many rows each has (aten/src/ATen/native/cuda/GroupedBlas.cpp)."""

ALIGNED = 8
"""A number of features that is such a multiple in every dtype of the kernels."""


class RowGroups:
    """Rows that are sorted by group, each group with a matrix of its own.

    Torch multiplies all groups in one call where it can (``grouped_mm``), so that nothing here waits for a GPU to tell
    how many rows there are in each. Otherwise, groups are multiplied one by one, and the sizes are read once.

    Args:
        group: Group of each row, ascending, shape ``(rows,)``.
        count: Number of groups; some may have no row.
    """

    def __init__(self, group: Tensor, count: int) -> None:
        self.group = group
        self.ends = torch.searchsorted(group, torch.arange(count, device=group.device), right=True, out_int32=True)

    @cached_property
    def sizes(self) -> list[int]:
        """Number of rows of each group; waits for the device, once."""
        return self.ends.diff(prepend=self.ends.new_zeros(1)).tolist()

    def product(self, rows: Tensor, matrices: Tensor) -> Tensor:
        """Multiply ``(rows, in)`` by ``(groups, in, out)``, in the dtype of autocast where it is on."""
        if autocasts(rows) and rows.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, matrices = rows.to(dtype), matrices.to(dtype)
        if _can_group(rows, matrices):
            return F.grouped_mm(rows.contiguous(), matrices, offs=self.ends)
        parts = [part @ matrices[i] for i, part in enumerate(rows.split(self.sizes)) if part.shape[0]]
        return torch.cat(parts or [rows @ matrices[0]])  # torch.cat needs at least one tensor


def _can_group(rows: Tensor, matrices: Tensor) -> bool:
    """Whether ``grouped_mm`` takes these tensors, and multiplies them faster than one by one."""
    if not hasattr(F, "grouped_mm"):
        return False  # torch has it since 2.10
    if not rows.shape[0] or any(n * rows.element_size() % _BYTES for n in matrices.shape[1:]):
        return False
    if rows.device.type == "cuda":
        known = rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device)[0] in _CAPABILITIES
    else:
        known = rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if not known or torch.compiler.is_compiling():
        return known and rows.dtype == torch.bfloat16  # the compiler knows it in no other
    return matrices.data_ptr() % _BYTES == 0  # FSDP's views and mapped files may begin anywhere
