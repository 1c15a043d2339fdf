"""Keep the top share of every slice of a tensor of scores."""

import math

import torch
from torch import Tensor

from lit_sparse.errors import UsageError

_SMALLEST_GROUP = 3
"""With groups of two, what is left to select among is nearly as much as before."""


def kept_entries(fraction: float, length: int) -> int:
    """How many of ``length`` entries a share of ``fraction`` keeps: its floor, at least one.

    Args:
        fraction: Share to keep, unitless, in (0, 1].
        length: Entries to choose from, at least 1.

    Returns:
        A count from 1 to ``length``.

    Raises:
        UsageError: If ``fraction`` is outside (0, 1] or ``length`` is below 1.

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (6): ``fraction`` = τ bounds the share from above.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"fraction is the share of entries to keep, in (0, 1]; got {fraction}.")
    if length < 1:
        raise UsageError(f"There is nothing to keep along a dimension of length {length}; give it entries.")
    # 0.29 · 100 is 28.999999999999996 in floating point, and the user's 0.29 means 29.
    return max(1, math.floor(fraction * length + 1e-9))


def top_fraction_mask(scores: Tensor, fraction: float, dim: int) -> Tensor:
    """Mark the largest ``fraction`` of ``scores`` along ``dim``, equally many in every slice.

    Equal scores go to the lower index, and nothing depends on memory layout or device, so every process
    draws the same mask from the same scores. NaN ranks with −inf: below every finite score. No value is
    read back from a device.

    Args:
        scores: Sensitivities, any shape: ``(..., rank, in_features)`` for A, ``(..., out_features, rank)``
            for B.
        fraction: Share to keep, unitless, in (0, 1]; rounded down to whole entries, at least one.
        dim: The dimension to choose along, may be negative: −1 ranks within each row of A, −2 within each
            column of B.

    Returns:
        Boolean mask shaped like ``scores``, with ``kept_entries(fraction, scores.shape[dim])`` True in
        every slice.

    Raises:
        UsageError: If ``fraction`` is outside (0, 1] or ``scores`` is empty along ``dim``.

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Eq. (8): the pruning of A and B at τ⁽ᵗ⁾ = ``fraction``.
    """
    keep = kept_entries(fraction, scores.shape[dim])
    if keep == scores.shape[dim]:
        return torch.ones_like(scores, dtype=torch.bool)
    scores = scores.movedim(dim, -1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)
    # Not a stable argsort, which takes many times as long on a CPU; and not the indices of topk, which may order equal
    # scores anyhow, while A's scores are all zero at first.
    smallest_kept = _kth_largest(scores, keep)
    if _is_at_hand(scores):
        # Without ties that is all, and a third of the time.
        kept = scores >= smallest_kept
        if int(kept.count_nonzero()) == keep * (kept.numel() // kept.shape[-1]):
            return kept.movedim(-1, dim)
    above, tied = scores > smallest_kept, scores == smallest_kept
    places = keep - above.sum(-1, keepdim=True, dtype=torch.int32)
    return (above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= places))).movedim(-1, dim)


def _is_at_hand(scores: Tensor) -> bool:
    """Whether looking at the values makes nobody wait, as it would for a GPU."""
    return scores.device.type == "cpu"


def _kth_largest(scores: Tensor, k: int) -> Tensor:
    """The k-th largest entry of every last dimension, shape ``(..., 1)``.

    The k largest lie in those k groups of entries that have the largest maxima (or entries equal to them do): with
    groups of g, two selections among width / g and k · g entries replace one among all. They are fewest for
    g = √(width / k), and take a quarter less time at density 0.05 on a CPU.
    """
    width = scores.shape[-1]
    size = round(math.sqrt(width / k))
    if size >= _SMALLEST_GROUP:
        count = width // size
        groups = scores[..., : size * count].unflatten(-1, (size, count))  # each of entries that lie count apart
        chosen = groups.amax(-2).topk(k, sorted=False).indices
        among = groups.gather(-1, chosen.unsqueeze(-2).expand(*groups.shape[:-1], k)).flatten(-2)
        scores = torch.cat([among, scores[..., size * count :]], dim=-1)
    return scores.topk(k, sorted=False).values.amin(-1, keepdim=True)
