"""GoRA: ranks by the importance of each layer, and B from the gradient of its weight."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def allotted_ranks(
    importances: Sequence[float], units: Sequence[float], ranks: Sequence[int], highest: Sequence[int]
) -> list[int]:
    """Divide the budget of given ranks among layers, by their importance.

    A layer with the share a_i of all importances gets a_i Σ_j u_j r_j / u_i ranks, rounded, from half to four times its
    given rank r_i.

    Args:
        importances: mean |W ∘ G| of each layer, summed over its experts; not all of them 0.
        units: u_i, the cost of a rank of each layer, √(d_in + d_out), times the number of experts.
        ranks: r_i, the ranks of a uniform LoRA.
        highest: Largest rank that each layer can have.

    Source:
        He et al. 2025 (arXiv:2502.12171), Eqs. (6)–(8).

    Example:
        >>> allotted_ranks([4.0, 1.0, 3.0], units=[2.0, 2.0, 4.0], ranks=[8, 8, 8], highest=[64, 64, 64])
        [16, 4, 6]
    """
    budget = math.fsum(unit * rank for unit, rank in zip(units, ranks, strict=True))
    total = math.fsum(importances)
    return [
        min(max(round(budget * importance / total / unit), (rank + 1) // 2), 4 * rank, most)
        for importance, unit, rank, most in zip(importances, units, ranks, highest, strict=True)
    ]


@torch.no_grad()
def compressed_gradient(lora_A: Tensor, gradient: Tensor, scale: float, gamma: float) -> Tensor:
    """The B by which scale · BA is a step of gradient descent, as far as the rows of A allow.

    B = −γ √(d_in / r) / scale · G Aᵀ(AAᵀ)⁻¹. A random A keeps about √(r / d_in) of the norm of G, so that scale · BA
    has about γ times that norm. With the scale α / √r, the factor is the paper's ξ = γ √d_in / α.

    Args:
        lora_A: Shape ``(r, d_in)``, of independent rows.
        gradient: G, shape ``(d_out, d_in)``.
        scale: Factor of BA.
        gamma: γ.

    Returns:
        Bᵀ, shape ``(r, d_out)``.

    Source:
        He et al. 2025 (arXiv:2502.12171), Eqs. (9) and (10).
    """
    rank, in_features = lora_A.shape
    A = lora_A.double()  # and no lstsq, whose last bits differ from call to call
    best: Tensor = torch.linalg.solve(A @ A.mT, A @ gradient.double().mT)
    return (best * (-gamma * math.sqrt(in_features / rank) / scale)).to(lora_A.dtype)
