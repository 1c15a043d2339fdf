"""Which entries a budget pays for, by their scores."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_sparse.errors import UsageError, require_range


@torch.no_grad()
def within_budget(scores: Tensor, costs: Sequence[int], counts: Sequence[int], budget: int) -> Tensor:
    """Mark the entries that are kept when they are taken by score, the highest first, as long as the budget lasts.

    An entry that costs more than is left is skipped, and the next ones are tried: what remains of the budget pays for
    none of the entries left out. Among equal scores the lower index wins, so that every process keeps the same entries.
    NaN counts as −inf. No value is read back from a device: costs are numbers of the host, and each distinct cost takes
    one pass over the entries.

    Setting the others to zero minimises Σ sᵢ over what is removed, if all costs are equal: with the scores |xᵢ|² it is
    the projection onto the vectors of at most so many non-zero entries, which is the proximal map of that set's
    indicator. With several costs the exact projection is a knapsack, and this is its greedy approximation.

    Args:
        scores: Shape ``(n,)``.
        costs: The cost of one entry in each run of consecutive entries, whole numbers of at least 1.
        counts: The number of entries in each of these runs; they add up to n.
        budget: What the kept entries may cost together, at least 0.

    Returns:
        Booleans, shape ``(n,)``.

    Raises:
        UsageError: If ``scores`` is not a vector of as many entries as ``counts`` adds up to, there is not one cost for
            each count, a cost is below 1, or ``budget`` is negative.

    Example:
        >>> within_budget(torch.tensor([3.0, 9.0, 5.0, 4.0]), costs=[2, 5], counts=[2, 2], budget=8)
        tensor([False,  True,  True, False])
    """
    require_range("budget", budget, at_least=0)
    cost = cost_of_each(tuple(costs), tuple(counts), scores.device)
    if scores.shape != cost.shape:
        raise UsageError(f"There are costs for {cost.numel()} entries; got scores of shape {tuple(scores.shape)}.")
    order = scores.nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf).argsort(descending=True, stable=True)
    cost = cost.gather(0, order)
    end = cost.new_full((1,), torch.iinfo(cost.dtype).max)
    candidates = torch.ones_like(cost, dtype=torch.bool)
    # What is left never grows: where an entry does not fit, neither does any later one that costs as much. The first
    # entry that does not fit is cheaper in every pass, so that after as many passes as there are costs all fit.
    for _ in set(costs):
        fits = (cost * candidates).cumsum(0) <= budget
        too_much = torch.cat([cost, end]).gather(0, fits.sum(0, keepdim=True))
        candidates &= fits | (cost < too_much)
    return torch.zeros_like(candidates).scatter_(0, order, candidates)


@functools.lru_cache(maxsize=16)
def cost_of_each(costs: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    """The cost of every entry; kept, because copying it to a device at every step would wait for that."""
    if len(costs) != len(counts) or min(costs, default=1) < 1:
        raise UsageError(f"Give one cost of at least 1 for each count; got {costs} for {len(counts)} counts.")
    return torch.tensor([c for c, n in zip(costs, counts, strict=True) for _ in range(n)], device=device).long()
