"""Places of entries as few bytes: each gap between two of them is a Rice code.

The gaps of places drawn at random from a share p of all entries follow a geometric distribution. A place then has an
entropy of log₂(1/p) + ((1 − p)/p) log₂(1/(1 − p)) bits: 7.07 where p = 2 %, of which the code makes 7.10. The width k
of a gap's remainder is the same for all gaps, and stands in the first byte (docs/formats.md has the layout).

Source: Rice 1979, "Some practical universal noiseless coding techniques", for codes of numbers; Golomb 1966,
"Run-length encodings", for the gaps.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_WIDEST = 62
"""Bits of a place."""


def encoded(places: Tensor) -> Tensor:
    """Pack places.

    Args:
        places: Integers at least 0, ascending, each once; shape ``(count,)``.

    Returns:
        The bytes, of dtype uint8 and one dimension, on the CPU.

    Raises:
        ValueError: If the places do not ascend.

    Example:
        >>> encoded(torch.tensor([2, 3, 9])).tolist()
        [1, 4, 38]
    """
    gaps = np.diff(places.detach().cpu().numpy().astype("<i8"), prepend=-1) - 1
    if len(gaps) == 0:
        return torch.zeros(1, dtype=torch.uint8)
    if gaps.min() < 0:
        raise ValueError("places do not ascend")
    widths = range((int(places[-1]) // len(gaps)).bit_length() + 1)
    width = min(widths, key=lambda k: len(gaps) * k + int((gaps >> k).sum()))
    remainders = np.unpackbits(gaps.view(np.uint8).reshape(-1, 8), axis=1, count=width, bitorder="little")
    ends = np.cumsum((gaps >> width) + 1) - 1
    quotients = np.zeros(ends[-1] + 1, dtype=np.uint8)
    quotients[ends] = 1
    parts = [np.packbits(bits, bitorder="little") for bits in (remainders, quotients)]
    return torch.from_numpy(np.concatenate([np.array([width], dtype=np.uint8), *parts]))


def decoded(code: Tensor, count: int) -> Tensor:
    """Unpack places.

    Args:
        code: What :func:`encoded` returned.
        count: How many places these are.

    Returns:
        The places, of dtype long.

    Raises:
        ValueError: If ``code`` is not the code of so many places.

    Example:
        >>> decoded(torch.tensor([1, 4, 38], dtype=torch.uint8), 3).tolist()
        [2, 3, 9]
    """
    if code.dtype != torch.uint8 or code.ndim != 1 or not len(code):
        raise ValueError("places are no bytes")
    data = code.cpu().numpy()
    width = int(data[0])
    begin = 1 + (count * width + 7) // 8
    ends = np.flatnonzero(np.unpackbits(data[begin:], bitorder="little"))
    length = int(ends[-1]) + 1 if len(ends) else 0  # in bits
    if len(ends) != count or len(data) != begin + (length + 7) // 8 or (length << width).bit_length() > _WIDEST:
        raise ValueError(f"places are not those of {count:,} values")
    remainders = np.unpackbits(data[1:begin], count=count * width, bitorder="little").reshape(count, width)
    low = np.zeros((count, 8), dtype=np.uint8)
    low[:, : (width + 7) // 8] = np.packbits(remainders, axis=1, bitorder="little")
    quotients = np.diff(ends, prepend=-1) - 1
    return torch.from_numpy(np.cumsum((quotients << width) + low.view("<i8").ravel() + 1) - 1)
