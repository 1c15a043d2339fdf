"""Keys: the directions of inputs by which some tokens differ most from others."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_sparse.functional.keys import key_directions, needed_features
from lit_sparse.functional.ultraedit import Held


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    st.integers(2, 8), st.integers(1, 6), st.integers(1, 9), st.integers(1, 20), st.integers(1, 5), st.integers(0, 99),
    st.booleans(),
)  # fmt: skip
def test_directions_are_those_of_the_dense_formula(features, outputs, tokens, texts, most, seed, some):
    x, g = drawn(tokens, features, seed=seed), drawn(tokens, outputs, seed=seed + 200)
    X = drawn(texts, features, seed=seed + 1)
    chosen = torch.arange(0, features, 2) if some else None
    found = key_directions(x, g, Held(X), chosen, most)
    places = torch.arange(features) if chosen is None else chosen
    C = (X.T @ X)[places][:, places]
    whitened = torch.linalg.inv(C + 0.03 * C.diagonal().mean() * torch.eye(len(C))) @ x.T[places] @ g
    left, values, _ = torch.linalg.svd(whitened, full_matrices=False)
    count = min(most, int((values > 1e-5 * values[0]).sum()))
    expected = torch.zeros(count, features, dtype=torch.float64)
    expected[:, places] = left[:, :count].T
    assert found.shape == expected.shape
    # The sign of a singular vector is free.
    torch.testing.assert_close((found * expected).sum(1).abs(), torch.ones(count, dtype=torch.float64))
    torch.testing.assert_close(found @ found.T, torch.eye(count, dtype=torch.float64))


@given(st.integers(1, 5), st.integers(0, 99))
def test_rounding_gives_no_more_directions_than_there_are_tokens(tokens, seed):
    x, g, X = (drawn(rows, 12, seed=seed + rows).float() for rows in (tokens, tokens, 40))
    X[:, 0] *= 1e4  # as the massive activations of some models
    x[:, 0] *= 1e4
    assert len(key_directions(x.bfloat16().float(), g, Held(X), None, 12)) <= tokens


def test_a_single_token_has_one_key_that_other_texts_have_not():
    own, common, slope = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([[3.0, -1.0]])
    (plain,) = key_directions((own + common)[None], slope, None, None, 4)
    torch.testing.assert_close(plain.abs(), torch.tensor([1.0, 1.0, 0.0]).div(2**0.5))
    (direction,) = key_directions((own + common)[None], slope, Held(common[None].repeat(5, 1)), None, 4)
    assert abs(direction @ common) < 0.1 * abs(plain @ common), "what the texts have is left out"


def test_nothing_to_learn_has_no_key():
    held, inputs = torch.ones(2, 3), torch.ones(1, 3)
    assert key_directions(inputs, torch.zeros(1, 2), Held(held), None, 4).shape == (0, 3)
    assert key_directions(inputs, torch.ones(1, 2), Held(0 * held), None, 4).shape == (1, 3), "texts without inputs"


def test_needed_features_are_relative_to_what_is_usual():
    squares, usual = torch.tensor([9.0, 4.0, 1.0, 4.0]), torch.tensor([9.0, 1.0, 0.0, 4.0])
    assert needed_features(squares, usual, 1.0) is None
    # A feature that is zero on the other texts counts as one with a thousandth of the mean.
    assert needed_features(squares, usual, 0.5).tolist() == [1, 2]
    assert needed_features(squares, torch.zeros(4), 0.25).tolist() == [0]
    assert needed_features(squares, usual, 0.01).tolist() == [2], "at least one"
