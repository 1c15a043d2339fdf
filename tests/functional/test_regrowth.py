"""lit_sparse.functional.regrown against sets and sorting in Python."""

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lit_sparse.functional import regrown


def slow_regrown(trained: dict[int, float], gradients: dict[int, float], count: int) -> set[int]:
    """One entry after another: the least goes, if a candidate is left that comes instead."""
    dropped = sorted(trained, key=lambda place: abs(trained[place]))[:count]
    kept = set(trained) - set(dropped)
    grown = sorted(set(gradients) - kept, key=lambda place: -abs(gradients[place]))[:count]
    chosen = kept | set(grown)
    for place in reversed(dropped):  # those that changed most stay, if there are not enough candidates
        if len(chosen) < len(trained):
            chosen.add(place)
    return chosen


@given(
    entries=st.integers(1, 60),
    share=st.floats(0, 1),
    candidates=st.floats(0, 1),
    dropped=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
@example(entries=10, share=0.5, candidates=1.0, dropped=1.0, seed=0)
@example(entries=10, share=1.0, candidates=1.0, dropped=0.5, seed=0)  # every candidate is trained
@settings(max_examples=300, deadline=None)
def test_the_least_are_dropped_and_the_candidates_with_the_largest_gradients_grown(
    entries: int, share: float, candidates: float, dropped: float, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    size = max(1, int(share * entries))
    places = torch.randperm(entries, generator=draw)[:size].sort().values
    others = torch.randperm(entries, generator=draw)[: max(1, int(candidates * entries))]
    values, gradients = torch.randn(size, generator=draw), torch.randn(len(others), generator=draw)
    count = int(dropped * size)
    found = regrown(places.int(), values, others.int(), gradients, count, entries).tolist()
    expected = slow_regrown(
        dict(zip(places.tolist(), values.tolist(), strict=True)),
        dict(zip(others.tolist(), gradients.tolist(), strict=True)),
        count,
    )
    assert found == sorted(expected)
