"""Keys: the inputs of a layer by which some tokens differ most from others."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.functional.ultraedit import Held

_RARE = 1e-3  # a feature with less than this share of the mean counts as if it had that share
_DAMPING = 0.03  # a tenth of it gave the same in a trial of 30 edits


def needed_features(squares: Tensor, held: Tensor, share: float) -> Tensor | None:
    """The input features that some tokens need most, relative to others.

    Args:
        squares: Sums of the squared inputs of these tokens, shape ``(in_features,)``.
        held: The same for the other tokens; zeros if there are none.
        share: Share of the features, at least one.

    Returns:
        Their numbers, ascending; None if they are all.

    Example:
        >>> needed_features(torch.tensor([4.0, 1.0, 9.0]), torch.tensor([1.0, 0.1, 9.0]), 0.7)
        tensor([0, 1])
    """
    if share == 1:
        return None
    usual = held + _RARE * held.mean()
    scores = squares / usual.where(usual > 0, 1)
    return scores.topk(max(1, round(share * len(squares)))).indices.sort().values


def key_directions(gradient: Tensor, held: Held | None, features: Tensor | None, most: int) -> Tensor:
    """The main left singular vectors of (C + λI)⁻¹ G, with C = XᵀX of the inputs X that are held.

    Changes of the weight along them do most for the loss and least to the outputs that are held: they are the keys of
    ROME (Meng et al. 2022, arXiv:2202.05262, Eq. 2) of all tokens at once, in the order of what they can do. λ is 0.03
    times the mean of C's diagonal.

    Args:
        gradient: G, of the loss by the transposed weight, or the part of some tokens, shape
            ``(in_features, out_features)``.
        held: The inputs that are held; None: C is the identity.
        features: Numbers of the only features that may be other than zero; None: all.
        most: Number of directions at most.

    Returns:
        Orthonormal rows, shape ``(directions, in_features)``: as many as G has singular values that are not zero.

    Example:
        >>> key_directions(torch.tensor([[3.0], [4.0]]), None, None, 2).abs()
        tensor([[0.6000, 0.8000]])
    """
    chosen = slice(None) if features is None else features
    G = gradient[chosen].double()
    if held is not None:
        C = held.gram(features)
        damping = _DAMPING * C.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(C + damping * torch.eye(len(C), dtype=C.dtype, device=C.device))
        G = torch.cholesky_solve(G, factor).where(failed == 0, G)  # a layer whose held inputs are all zero
    left, values, _ = torch.linalg.svd(G, full_matrices=False)
    count = int((values > values[:1] * 1e-6).sum())  # none if all are zero
    rows = gradient.new_zeros(min(most, count), len(gradient))
    rows[:, chosen] = left[:, : len(rows)].mT.to(rows.dtype)
    return rows
