"""Shares of non-zero entries, of a tensor and of the product BA."""

from torch import Tensor

from lit_sparse.errors import UsageError


def density(x: Tensor) -> Tensor:
    """Share of the entries of ``x`` that are not zero.

    Args:
        x: Any shape.

    Returns:
        Scalar in [0, 1], in the default floating dtype; 0 for a tensor without entries.

    Example:
        >>> density(torch.tensor([0.0, 2.0, 0.0, -1.0]))
        tensor(0.5000)
    """
    return x.count_nonzero() / max(1, x.numel())


def product_sparsity_bound(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Lower bound on the share of zeros in BA, from the shares of zeros in the rows of A and columns of B.

    With s(·) the share of zeros, s(BA) ≥ max{0, 1 + Σᵢ (s(Aᵢ*) + s(B*ᵢ) − s(Aᵢ*)·s(B*ᵢ)) − r}. It is computed as
    1 − Σᵢ (1 − s(Aᵢ*))·(1 − s(B*ᵢ)) on counts, so that rounding never lifts it above 1 − :func:`product_density`.

    Args:
        lora_A: A, shape ``(..., rank, in_features)``.
        lora_B: B, shape ``(..., out_features, rank)``, same leading dimensions.

    Returns:
        Shape ``(...)``, in [0, 1], in the default floating dtype; 1 for rank 0.

    Raises:
        UsageError: If the shapes of ``lora_A`` and ``lora_B`` do not make a product BA.

    Example:
        >>> product_sparsity_bound(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
        tensor(0.8750)

    Source:
        Wang et al. 2024 (RoseLoRA, arXiv:2406.10777), Proposition 1.
    """
    entries = _product_entries(lora_A, lora_B)
    touched = lora_A.count_nonzero(dim=-1) * lora_B.count_nonzero(dim=-2)
    return (1 - touched.sum(-1) / entries).clamp(min=0)


def product_density(lora_A: Tensor, lora_B: Tensor) -> Tensor:
    """Share of the entries of BA in its support.

    Entry (k, j) is in the support if B_ki ≠ 0 and A_ij ≠ 0 for some i. Outside the support BA is exactly zero in every
    precision, and merging leaves W0 unchanged. Sums that cancel and products that underflow count as non-zero, because
    they depend on the precision.

    Args:
        lora_A: A, shape ``(..., rank, in_features)``.
        lora_B: B, shape ``(..., out_features, rank)``, same leading dimensions.

    Returns:
        Shape ``(...)``, in [0, 1], in the default floating dtype; 0 for rank 0.

    Raises:
        UsageError: If the shapes of ``lora_A`` and ``lora_B`` do not make a product BA.

    Example:
        >>> product_density(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
        tensor(0.1250)
    """
    entries = _product_entries(lora_A, lora_B)
    paths = (lora_B != 0).float() @ (lora_A != 0).float()  # for each entry, the number of such i
    return paths.count_nonzero(dim=(-2, -1)) / entries


def _product_entries(lora_A: Tensor, lora_B: Tensor) -> int:
    shape_a, shape_b = tuple(lora_A.shape), tuple(lora_B.shape)
    if min(len(shape_a), len(shape_b)) < 2 or shape_a[:-2] != shape_b[:-2] or shape_a[-2] != shape_b[-1]:
        raise UsageError(
            f"lora_A must be (..., rank, in_features) and lora_B (..., out_features, rank); got {shape_a}, {shape_b}."
        )
    return shape_a[-1] * shape_b[-2]
