"""Which entries of a weight are trained next: drop some of those that are, grow as many."""

from __future__ import annotations

import torch
from torch import Tensor


def regrown(indices: Tensor, values: Tensor, candidates: Tensor, gradients: Tensor, count: int, entries: int) -> Tensor:
    """Drop the entries with the smallest values, and grow the candidates with the largest gradients.

    Candidates that stay trained are left out. A dropped entry may be grown at once. If fewer than ``count`` candidates
    can be grown, dropped entries fill up, those with the largest values first.

    Args:
        indices: Places of the trained entries in the flat weight, each once; shape ``(trained,)``.
        values: Their changes, shape ``(trained,)``.
        candidates: Places of the candidates in the flat weight, each once; shape ``(candidates,)``.
        gradients: Their gradients, shape ``(candidates,)``.
        count: Entries to drop, at most ``trained``.
        entries: Entries of the weight.

    Returns:
        The new places, ascending; shape ``(trained,)``.

    Example:
        >>> trained, candidates = torch.tensor([0, 3, 5]), torch.tensor([1, 3, 6])
        >>> regrown(trained, torch.tensor([0.2, -0.9, 0.1]), candidates, torch.tensor([0.5, 9.0, -2.0]), 1, 8)
        tensor([0, 3, 6])

    Source:
        Ansell et al. 2024 (SpIEL, arXiv:2401.16405).
    """
    order = values.detach().abs().argsort(descending=True, stable=True)
    kept, dropped = indices.long()[order].tensor_split([len(indices) - count])
    # What has priority is trained. Whole numbers: a float32 would confuse ranks above 2²⁴.
    priority = torch.full((entries,), -1, dtype=torch.int32, device=indices.device)
    priority.index_fill_(0, kept, count + 1)
    places = candidates.long()
    scores = gradients.abs().masked_fill(priority[places] > 0, -1)
    grown = places[scores.topk(min(count, len(places)), sorted=False).indices]
    priority[dropped] = torch.arange(count, 0, -1, dtype=torch.int32, device=indices.device) - 1
    priority.index_fill_(0, grown, count)
    priority.index_fill_(0, kept, count + 1)  # for want of others, some of these have been grown
    return priority.topk(len(indices), sorted=False).indices.sort().values
