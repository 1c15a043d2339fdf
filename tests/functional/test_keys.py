"""Keys: the directions of inputs by which some tokens differ most from others."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_sparse.functional.keys import key_directions, needed_features
from lit_sparse.functional.ultraedit import Held


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(st.integers(2, 8), st.integers(1, 6), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99), st.booleans())
def test_directions_are_those_of_the_dense_formula(features, outputs, texts, most, seed, some):
    G, X = drawn(features, outputs, seed=seed), drawn(texts, features, seed=seed + 1)
    chosen = torch.arange(0, features, 2) if some else None
    found = key_directions(G, Held(X), chosen, most)
    places = torch.arange(features) if chosen is None else chosen
    C = (X.T @ X)[places][:, places]
    whitened = torch.linalg.inv(C + 0.03 * C.diagonal().mean() * torch.eye(len(C))) @ G[places]
    left, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    count = min(most, len(values))
    expected = torch.zeros(count, features, dtype=torch.float64)
    expected[:, places] = left[:, :count].T
    assert found.shape == expected.shape
    # The sign of a singular vector is free.
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, torch.eye(count, dtype=torch.float64))


def test_a_single_token_has_one_key_that_other_texts_have_not():
    key, common, slope = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[3.0, -1.0]])
    (plain,) = key_directions((key + common)[:, None] @ slope, None, None, 4)
    torch.testing.assert_close(plain.abs(), torch.tensor([0.5, 0.5, 0.0]).mul(2).div(2**0.5))
    (direction,) = key_directions((key + common)[:, None] @ slope, Held(common[None].repeat(5, 1)), None, 4)
    assert abs(direction @ common) < 0.1 * abs(plain @ common), "what the texts have is left out"


def test_nothing_to_learn_has_no_key():
    assert key_directions(torch.zeros(3, 2), Held(torch.ones(2, 3)), None, 4).shape == (0, 3)
    assert key_directions(torch.ones(3, 2), Held(torch.zeros(2, 3)), None, 4).shape == (1, 3), "texts without inputs"


def test_needed_features_are_relative_to_what_is_usual():
    squares, usual = torch.tensor([9.0, 4.0, 1.0, 4.0]), torch.tensor([9.0, 1.0, 0.0, 4.0])
    assert needed_features(squares, usual, 1.0) is None
    # A feature that is zero on the other texts counts as one with a thousandth of the mean.
    assert needed_features(squares, usual, 0.5).tolist() == [1, 2]
    assert needed_features(squares, torch.zeros(4), 0.25).tolist() == [0]
    assert needed_features(squares, usual, 0.01).tolist() == [2], "at least one"
