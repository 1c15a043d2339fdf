"""EVA: ranks by the variance that the principal components of each layer's inputs explain."""

from collections.abc import Sequence

import torch
from torch import Tensor


def explained_ranks(ratios: Sequence[Tensor], budget: int) -> list[int]:
    """Divide a number of ranks among layers, by the variance that each further component explains.

    The components of all layers compete by their shares of the variance of their own layer's inputs; among equal
    shares, the earlier layer wins. Every layer has at least one rank. PEFT takes the adapter out of a layer that gets
    none; where it leaves none out, the ranks are the same.

    Args:
        ratios: Shares of variance of each layer, largest first, as many as it may have ranks.
        budget: Ranks of all layers together, at least one for each.

    Source:
        Paischer et al. 2024 (EVA, arXiv:2410.07170), as in PEFT 0.21.2 (``_get_rank_distribution``).

    Example:
        >>> explained_ranks([torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.3, 0.2, 0.2])], budget=4)
        [2, 2]
        >>> explained_ranks([torch.tensor([0.6, 0.4, 0.1]), torch.tensor([0.05, 0.04, 0.03])], budget=4)
        [3, 1]
    """
    shares = [torch.cat([share.new_full((1,), torch.inf), share[1:]]) for share in ratios]
    layers = torch.arange(len(shares)).repeat_interleave(torch.tensor([len(share) for share in shares]))
    order = torch.cat(shares).cpu().argsort(descending=True, stable=True)[:budget]
    counts: list[int] = layers[order].bincount(minlength=len(shares)).tolist()
    return counts
