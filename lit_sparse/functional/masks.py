"""Masks of the largest scores in every slice of a tensor."""

import math

import numpy as np
import torch
from torch import Tensor

from lit_sparse.errors import require_range
from lit_sparse.functional import piecewise

_FEW_THREADS = 4
"""Numpy selects in one thread, with AVX2 or AVX-512 in a third to a sixth of the time that torch takes in one."""


def kept_entries(fraction: float, length: int) -> int:
    """How many of ``length`` entries a share of ``fraction`` keeps: its floor, at least one.

    Args:
        fraction: Share to keep, unitless, in (0, 1].
        length: Entries to choose from, at least 1.

    Returns:
        A count from 1 to ``length``.

    Raises:
        UsageError: If ``fraction`` is outside (0, 1] or ``length`` is below 1.

    Example:
        >>> kept_entries(0.25, 10), kept_entries(0.01, 10)
        (2, 1)

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (6): ``fraction`` = τ bounds the share from above.
    """
    require_range("fraction", fraction, above=0, at_most=1)
    require_range("length", length, at_least=1)
    # In floating point 0.29 · 100 is 28.999999999999996; 29 is meant.
    return max(1, math.floor(fraction * length + 1e-9))


def top_fraction_mask(scores: Tensor, fraction: float, dim: int) -> Tensor:
    """Mark the largest ``fraction`` of ``scores`` along ``dim``, equally many in every slice.

    Among equal scores the lower index wins, independent of memory layout and device: every process computes the same
    mask from the same scores. NaN counts as −inf, below every finite score. No value is read back from a device.

    Args:
        scores: Sensitivities, any shape: ``(..., rank, in_features)`` for A, ``(..., out_features, rank)``
            for B.
        fraction: Share to keep, unitless, in (0, 1]; rounded down to whole entries, at least one.
        dim: The dimension to choose along, may be negative: −1 chooses within each row of A, −2 within each
            column of B.

    Returns:
        Boolean mask shaped like ``scores``, with ``kept_entries(fraction, scores.shape[dim])`` True in
        every slice.

    Raises:
        UsageError: If ``fraction`` is outside (0, 1] or ``scores`` is empty along ``dim``.

    Example:
        >>> top_fraction_mask(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), 0.5, dim=-1)
        tensor([[ True, False,  True, False]])

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (8): the pruning of A and B at τ⁽ᵗ⁾ = ``fraction``.
    """
    keep = kept_entries(fraction, scores.shape[dim])
    if keep == scores.shape[dim]:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.movedim(dim, -1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    # A stable argsort takes many times as long on a CPU. The indices of topk are in no fixed order among equal scores,
    # and A's scores are all zero at first.
    smallest_kept = _kth_largest(scores, keep)
    if piecewise.is_at_hand(scores):
        # Without ties this mask is complete, in a third of the time. Comparing to floats first is faster by far.
        kept = torch.ge(scores, smallest_kept, out=torch.empty_like(scores)).bool()
        if int(kept.count_nonzero()) == keep * (kept.numel() // kept.shape[-1]):
            return kept.movedim(-1, dim)
    above, tied = scores > smallest_kept, scores == smallest_kept
    places = keep - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= places))).movedim(-1, dim)


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest entry along the last dimension, shape ``(..., 1)``; no entry is NaN."""
    known = scores.dtype in (torch.float32, torch.float64)  # numpy has no bfloat16
    if known and piecewise.is_at_hand(scores) and torch.get_num_threads() <= _FEW_THREADS:
        place = scores.shape[-1] - k
        return torch.from_numpy(np.partition(scores.detach().numpy(), place)[..., place : place + 1])
    return scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
