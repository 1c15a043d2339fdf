"""TIES and DARE on numbers; tests/test_combine.py holds whole adapters against the papers and PEFT."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_sparse.functional.combining import Conflicts, conflicts, drop_and_rescale, trim_threshold


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=40), st.floats(0.01, 1), st.integers(1, 3))
def test_the_threshold_is_the_smallest_kept_magnitude(values, density, parts):
    change = torch.tensor(values)
    nonzero = sorted((abs(v) for v in values if v), reverse=True)
    found = trim_threshold(lambda: change.chunk(parts), density)
    assert found == (nonzero[max(1, int(density * len(nonzero))) - 1] if nonzero else 0.0)


def test_conflicts_are_those_of_changed_entries():
    changes = torch.tensor([[1.0, 1.0, 0.0, -1.0, 0.0], [0.0, -2.0, 0.0, -1.0, 3.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    assert conflicts(changes) == Conflicts(2, 1)
    assert conflicts(changes) + conflicts(changes[:1]) == Conflicts(2, 1)


def test_dropped_entries_keep_the_mean():
    generator = torch.Generator().manual_seed(0)
    found = drop_and_rescale(torch.full((20_000,), 3.0), 0.25, generator)
    assert set(found.tolist()) == {0.0, 12.0}
    assert abs(float(found.mean()) - 3.0) < 4 * 3.0 * (3 / 20_000) ** 0.5  # four standard errors
