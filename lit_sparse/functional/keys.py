"""Keys: the inputs of a layer by which some tokens differ most from others."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_sparse.functional.ultraedit import Held

_RARE = 1e-3  # a feature with less than this share of the mean counts as if it had that share
_ROUNDING = 1e-5  # of inputs and gradients in float32
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


def key_directions(inputs: Tensor, gradients: Tensor, held: Held | None, features: Tensor | None, most: int) -> Tensor:
    """The main left singular vectors of (C + λI)⁻¹ Σ x gᵀ, with C = XᵀX of the inputs X that are held.

    Changes of the weight along them do most for the loss and least to the outputs that are held: they are the keys of
    ROME (Meng et al. 2022, arXiv:2202.05262, Eq. 2) of all tokens at once, in the order of what they can do. λ is 0.03
    times the mean of C's diagonal.

    Args:
        inputs: x of some tokens, shape ``(tokens, in_features)``.
        gradients: g, of the loss by the layer's outputs there, shape ``(tokens, out_features)``.
        held: The inputs that are held; None: C is the identity.
        features: Numbers of the only features that may be other than zero; None: all.
        most: Number of directions at most.

    Returns:
        Orthonormal rows, shape ``(directions, in_features)``: at most one for each token with a gradient.

    Example:
        >>> key_directions(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0]]), None, None, 2).abs()
        tensor([[0.6000, 0.8000]])
    """
    chosen = slice(None) if features is None else features
    keys = inputs[:, chosen].double().mT
    if held is not None:
        C = held.gram(features)
        damping = _DAMPING * C.diagonal().mean()
        factor, failed = torch.linalg.cholesky_ex(C + damping * torch.eye(len(C), dtype=C.dtype, device=C.device))
        keys = torch.cholesky_solve(keys, factor).where(failed == 0, keys)  # a layer whose held inputs are all zero
    # Σ x gᵀ is far larger than its factors, and rounding would give it more singular values than there are tokens.
    basis, rest = torch.linalg.qr(keys)
    left, values, _ = torch.linalg.svd(rest @ gradients.double(), full_matrices=False)
    count = min(most, int((values > _ROUNDING * values[:1]).sum()))  # none if all are zero
    rows = inputs.new_zeros(count, inputs.shape[1])
    rows[:, chosen] = (basis @ left[:, :count]).mT.to(rows.dtype)
    return rows
