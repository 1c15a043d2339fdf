"""LoRA-GA: A and B from the singular vectors of the gradient of the frozen weight."""

import torch
from torch import Tensor


@torch.no_grad()
def gradient_factors(gradient: Tensor, rank: int, gamma: float) -> tuple[Tensor, Tensor]:
    """The A and B whose first step is nearest to a step of full fine-tuning, for each of several matrices.

    With G = U S Vᵀ, A has the rows v_1, …, v_r and B the columns u_{r+1}, …, u_{2r}, each times ⁴√d_out / √γ. The
    frozen weight must give up scale · BA, so that the model computes what it did.

    Args:
        gradient: G, shape ``(…, d_out, d_in)``.
        rank: r, at most half of d_out and of d_in.
        gamma: γ, above 0. A larger one makes a smaller start.

    Returns:
        A of shape ``(…, r, d_in)`` and Bᵀ of shape ``(…, r, d_out)``.

    Source:
        Wang et al. 2024 (LoRA-GA, arXiv:2407.05000), as in the release (Outsider565/LoRA-GA, abfa0c2, ``lora_ga_init``
        with direction ArB2r and scale stable), which approximates the singular vectors at random. These are exact.

    Example:
        >>> A, B_t = gradient_factors(torch.tensor([4.0, 3.0, 2.0, 1.0]).diag(), rank=1, gamma=2.0)
        >>> A.abs(), B_t.abs()
        (tensor([[1., 0., 0., 0.]]), tensor([[0., 1., 0., 0.]]))
    """
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    size = gradient.shape[-2] ** 0.25 / gamma**0.5
    return size * right[..., :rank, :], size * left[..., rank : 2 * rank].mT
