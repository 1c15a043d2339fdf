"""lit_sparse.functional.density against slow, obvious references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sparse.errors import UsageError
from lit_sparse.functional import density, product_density, product_sparsity_bound

modest = settings(max_examples=100, deadline=None)


def slow_zero_share(values: list[float]) -> float:
    return sum(value == 0 for value in values) / len(values)


def slow_bound(lora_A: torch.Tensor, lora_B: torch.Tensor) -> float:
    """Proposition 1 term by term, as the paper writes it."""
    rank = lora_A.shape[0]
    total = 1.0 - rank
    for i in range(rank):
        row, column = slow_zero_share(lora_A[i].tolist()), slow_zero_share(lora_B[:, i].tolist())
        total += row + column - row * column
    return max(0.0, total)


def slow_support_share(lora_A: torch.Tensor, lora_B: torch.Tensor) -> float:
    rank, columns = lora_A.shape
    rows = lora_B.shape[0]
    reached = 0
    for k in range(rows):
        for j in range(columns):
            reached += any(lora_B[k, i] != 0 and lora_A[i, j] != 0 for i in range(rank))
    return reached / (rows * columns)


@st.composite
def sparse_factors(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    rank, columns, rows = (draw(st.integers(1, 6)) for _ in range(3))
    share = draw(st.floats(0, 1))
    factors = []
    for shape in ((rank, columns), (rows, rank)):
        values = torch.randn(shape, generator=generator)
        factors.append(values * (torch.rand(shape, generator=generator) < share))
    return factors


@modest
@given(sparse_factors())
def test_the_bound_is_proposition_1_and_the_density_counts_the_support(factors):
    lora_A, lora_B = factors
    assert product_sparsity_bound(lora_A, lora_B).item() == pytest.approx(slow_bound(lora_A, lora_B), abs=1e-6)
    assert product_density(lora_A, lora_B).item() == pytest.approx(slow_support_share(lora_A, lora_B), abs=1e-6)


@modest
@given(sparse_factors())
def test_the_product_is_at_least_as_sparse_as_the_bound_says(factors):
    lora_A, lora_B = factors
    bound = product_sparsity_bound(lora_A, lora_B)
    assert 0 <= bound <= 1 - product_density(lora_A, lora_B)
    assert bound <= ((lora_B @ lora_A) == 0).double().mean() + 1e-6


def test_the_bound_is_reached_when_the_ranks_do_not_overlap():
    lora_A = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    lora_B = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    assert product_sparsity_bound(lora_A, lora_B).item() == 1 - 3 / 8
    assert product_density(lora_A, lora_B).item() == 3 / 8


def test_cancellation_and_underflow_stay_in_the_support():
    lora_A, lora_B = torch.tensor([[1.0], [1.0]]), torch.tensor([[1.0, -1.0]])
    assert (lora_B @ lora_A).item() == 0
    assert product_density(lora_A, lora_B).item() == 1
    tiny = torch.full((1, 1), 1e-30)
    assert (tiny @ tiny).item() == 0
    assert product_density(tiny, tiny).item() == 1


def test_leading_dimensions_are_a_batch():
    torch.manual_seed(0)
    lora_A = torch.randn(2, 3, 4, 7) * (torch.rand(2, 3, 4, 7) < 0.3)
    lora_B = torch.randn(2, 3, 5, 4) * (torch.rand(2, 3, 5, 4) < 0.3)
    bounds, densities = product_sparsity_bound(lora_A, lora_B), product_density(lora_A, lora_B)
    assert bounds.shape == densities.shape == (2, 3)
    assert densities.unique().numel() > 1
    for m in range(2):
        for n in range(3):
            assert bounds[m, n] == product_sparsity_bound(lora_A[m, n], lora_B[m, n])
            assert densities[m, n] == product_density(lora_A[m, n], lora_B[m, n])


def test_rank_zero_is_an_empty_product():
    lora_A, lora_B = torch.zeros(0, 4), torch.zeros(3, 0)
    assert product_sparsity_bound(lora_A, lora_B).item() == 1
    assert product_density(lora_A, lora_B).item() == 0


def test_density_is_the_share_of_nonzero_entries():
    assert density(torch.tensor([[0.0, -0.0, 1.0], [2.0, float("nan"), -1e-45]])).item() == pytest.approx(4 / 6)
    assert density(torch.tensor(3.0)).item() == 1
    assert density(torch.zeros(0)).item() == 0


@pytest.mark.parametrize("measure", [product_sparsity_bound, product_density])
@pytest.mark.parametrize(
    ("shape_a", "shape_b"), [((2, 4), (4, 3)), ((3, 2, 4), (5, 2)), ((2, 2, 4), (3, 5, 2)), ((4,), (5, 2))]
)
def test_factors_that_make_no_product_are_errors(measure, shape_a, shape_b):
    with pytest.raises(UsageError, match=r"lora_B \(\.\.\., out_features, rank\); got \("):
        measure(torch.ones(shape_a), torch.ones(shape_b))
