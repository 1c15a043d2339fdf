"""Many tensors, a piece at a time: copies of them take no more memory for many layers than for few."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

_AT_HAND = 2**18
"""Entries of a piece on a CPU. With fewer, the number of calls costs time. With more, copies no longer stay in the
cache: one piece of 2.5 million entries takes a quarter more time than pieces of this size."""

_ON_A_DEVICE = 2**22
"""Entries of a piece elsewhere: few pieces even for a large model, as the host launches a dozen kernels for each."""


def is_at_hand(tensor: Tensor) -> bool:
    """Whether reading values does not wait for a device."""
    return tensor.device.type == "cpu"


def piecewise(*tensors: Sequence[Tensor]) -> list[list[int]]:
    """Cut one list of tensors, or several lists of the same length, into pieces of limited size.

    The tensors of a piece may be concatenated, for they differ in their first dimension alone. One that is larger than
    the limit is a piece of its own.

    Args:
        tensors: Lists of tensors, all on one device.

    Returns:
        For every piece the indices of its tensors, in ascending order.

    Example:
        >>> piecewise([torch.ones(2, 3), torch.ones(2, 5), torch.ones(4, 3)])
        [[0, 2], [1]]
    """
    most = _AT_HAND if all(is_at_hand(some[0]) for some in tensors if some) else _ON_A_DEVICE
    return _cut(tuple(tuple(t.shape for t in some) for some in tensors), most)


@functools.lru_cache(maxsize=32)
def _cut(shapes: tuple[tuple[torch.Size, ...], ...], most: int) -> list[list[int]]:
    """The pieces of tensors of these shapes, kept from step to step: nobody changes them."""
    pieces: list[list[int]] = []
    latest: dict[tuple[torch.Size, ...], tuple[list[int], int]] = {}
    for index, together in enumerate(zip(*shapes, strict=True)):
        alike, entries = tuple(shape[1:] for shape in together), sum(shape.numel() for shape in together)
        piece, taken = latest.get(alike, ([], 0))
        if not piece or taken + entries > most:
            piece, taken = [], 0
            pieces.append(piece)
        piece.append(index)
        latest[alike] = piece, taken + entries
    return pieces
