"""The code of places: against its layout, bit by bit; in files, also damaged ones and those of older versions."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from backbones import build_tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from trained import as_trained
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.editing.edits import Edit, load_edit
from lit_sparse.functional.rice import decoded, encoded
from lit_sparse.interchange.patches import Entries

ROOT = Path(__file__).parents[2]
DENSE = st.integers(0, 300).flatmap(lambda size: st.sets(st.integers(0, max(0, size - 1)), max_size=size))
SPARSE = st.sets(st.integers(0, 2**45), max_size=40)  # of weights with more than 2³¹ entries
PLACES = (DENSE | SPARSE).map(sorted)


def slowly(places: list[int]) -> bytes:
    """The layout that docs/formats.md describes, one bit after the other; the width with the fewest bits."""
    gaps = [place - before - 1 for before, place in zip([-1, *places], places, strict=False)]
    width = min(range(64), key=lambda k: sum(k + 1 + (gap >> k) for gap in gaps))
    remainders = [gap >> bit & 1 for gap in gaps for bit in range(width)]
    quotients = [bit for gap in gaps for bit in [0] * (gap >> width) + [1]]
    return bytes([width]) + packed(remainders) + packed(quotients)


def packed(bits: list[int]) -> bytes:
    return bytes(sum(bit << i for i, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8))


def of_the_docs():
    """The reader that the page gives."""
    (block,) = re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs" / "formats.md").read_text(), re.DOTALL | re.MULTILINE
    )
    names = {}
    exec(block, names)  # noqa: S102
    return names["places"]


@given(PLACES)
def test_any_places_come_back_and_the_code_is_the_one_that_is_documented(places):
    code = encoded(torch.tensor(places, dtype=torch.int64))
    assert bytes(code.numpy()) == slowly(places)
    found = decoded(code, len(places))
    assert found.dtype == torch.int64
    assert found.tolist() == places
    assert of_the_docs()(code.numpy(), len(places)).tolist() == places


@pytest.mark.parametrize("places", [[], [0], [2**31], [2**45 - 1], list(range(1000)), [0, 2**59]])
def test_few_all_and_far_places_come_back(places):
    assert decoded(encoded(torch.tensor(places, dtype=torch.int64)), len(places)).tolist() == places


@pytest.mark.parametrize("share", [0.001, 0.02, 0.05, 0.3])
def test_random_places_take_what_their_entropy_is(share):
    drawn = torch.rand(2_000_000, generator=torch.Generator().manual_seed(0)) < share
    places = drawn.nonzero().flatten()
    bits = -(share * math.log2(share) + (1 - share) * math.log2(1 - share)) / share
    assert 0.99 < 8 * len(encoded(places)) / len(places) / bits < 1.02


def test_places_in_another_order_are_no_places():
    for places in ([3, 2], [2, 2], [-1]):
        with pytest.raises(ValueError, match="do not ascend"):
            encoded(torch.tensor(places))


@given(PLACES, st.integers(-2, 2), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3))
def test_any_bytes_are_places_in_order_or_refused(places, more, changes):
    code, count = bytearray(slowly(places)), max(0, len(places) + more)
    for at, byte in changes:
        code[at % len(code)] = byte
    try:
        found = decoded(torch.tensor(list(code), dtype=torch.uint8), count)
    except ValueError:
        return
    assert len(found) == count
    assert bool((found.diff() > 0).all())
    assert not count or int(found[0]) >= 0


@pytest.mark.parametrize("code", [[], [0, 0], [70, 1], [0, 7, 0], [0, 3], [3, 255], [255, 1]])
def test_bytes_that_are_no_code_of_three_places_are_refused(code):
    with pytest.raises(ValueError, match="places are no"):
        decoded(torch.tensor(code, dtype=torch.uint8), 3)
    with pytest.raises(ValueError, match="places are no bytes"):
        decoded(torch.tensor([0, 7]), 3)


# In files.


def bert():
    return build_tiny(BertForSequenceClassification)


@pytest.fixture
def patch(tmp_path):
    method = ls.RoseLoRA(["query", "value"], rank=2, density=0.05)
    ls.export_delta(as_trained(bert(), method), tmp_path / "patch")
    return tmp_path / "patch"


def change(folder, edit, **entries):
    file, described = folder / "adapter.safetensors", folder / "lit_sparse.json"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    described.write_text(json.dumps({**json.loads(described.read_text()), **entries}))


def as_integers(tensors):
    """What version 1 had: the places themselves, in the smallest integers."""
    limits = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}
    for name in [name for name in tensors if name.endswith(".places")]:
        stem = name.removesuffix(".places")
        places = decoded(tensors.pop(name), len(tensors[f"{stem}.values"]))
        dtype = next(dtype for dtype, limit in limits.items() if int(places.max()) < limit)
        tensors[f"{stem}.indices"] = places.to(dtype)


def test_patches_of_version_1_are_read_bit_for_bit(patch, tmp_path):
    expected = bert()
    ls.load_adapter(expected, patch)
    change(patch, as_integers, version=1)
    assert any(name.endswith(".indices") for name in load_file(patch / "adapter.safetensors"))
    assert not any(name.endswith(".places") for name in load_file(patch / "adapter.safetensors"))
    found = bert()
    ls.load_adapter(found, patch)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    ls.combine([str(patch), str(patch)], tmp_path / "sum", weights=[0.5, 0.5])
    again = bert()
    ls.load_adapter(again, tmp_path / "sum")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), expected.parameters(), strict=True))
    assert json.loads((tmp_path / "sum" / "lit_sparse.json").read_text())["version"] == 2


def some(tensors, end):
    return next(name for name in sorted(tensors) if name.endswith(end))


def cut(tensors):
    name = some(tensors, ".places")
    tensors[name] = tensors[name][:-1].clone()


def flip(tensors):
    tensors[some(tensors, ".places")][-1] = 255


def move_out(tensors):
    name = some(tensors, ".places")
    places = decoded(tensors[name], len(tensors[name.replace(".places", ".values")]))
    places[-1] = 32 * 32
    tensors[name] = encoded(places)


def lose_places(tensors):
    tensors.pop(some(tensors, ".places"))


def twice(tensors):
    as_integers(tensors)
    places = tensors[some(tensors, ".indices")]
    places[1] = places[0]


def both(tensors):
    old = dict(tensors)
    as_integers(old)
    tensors |= old


def lose_a_place(tensors):
    as_integers(tensors)
    name = some(tensors, ".indices")
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "places are not those of .* values"),
        (flip, "places are not those of .* values"),
        (move_out, "is changed outside of its shape"),
        (lose_places, "'bert.*weight' has .* values for 1,024 entries, and no places"),
        (twice, "is changed outside of its shape"),
        (both, r"unknown are \['bert.*\.indices'"),
        (lose_a_place, "has .* places and .* values"),
    ],
)
def test_damaged_places_are_refused_and_nothing_is_changed(damage, reason, patch, tmp_path):
    change(patch, damage)
    model = bert()
    with pytest.raises(ls.UsageError, match=rf"patch' is damaged: .*{reason}"):
        ls.load_adapter(model, patch)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), bert().parameters(), strict=True))
    with pytest.raises(ls.UsageError, match=reason):
        ls.combine([str(patch), str(patch)], tmp_path / "sum")


def test_edits_of_version_1_are_read_and_damaged_ones_refused(tmp_path):
    file = tmp_path / "an.safetensors"
    edit = Edit({"weight": Entries(torch.tensor([1, 5, 700]), torch.ones(3)), "whole": Entries(None, torch.ones(4))})
    edit.save(file)
    with safe_open(file, "pt") as stored:
        content = json.loads(stored.metadata()["lit_sparse_edit"])
    tensors = load_file(file)
    assert content["version"] == 2
    assert set(tensors) == {"weight.places", "weight.values", "whole.values"}

    def read(tensors, version):
        save_file(tensors, file, metadata={"lit_sparse_edit": json.dumps({**content, "version": version})})
        return load_edit(file).patch

    old = {name: tensor for name, tensor in tensors.items() if name != "weight.places"}
    unordered = {**old, "weight.indices": torch.tensor([700, 1, 5]), "weight.values": torch.tensor([3.0, 1.0, 2.0])}
    for found in (read(tensors, 2), read({**old, "weight.indices": torch.tensor([1, 5, 700]).to(torch.uint16)}, 1)):
        assert found["weight"].indices.tolist() == [1, 5, 700]
        assert found["whole"].indices is None
    assert read(unordered, 1)["weight"].values.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ls.UsageError, match=r"an.safetensors' cannot be read: .*places are not those of 3 values"):
        read({**tensors, "weight.places": tensors["weight.places"][:-1].clone()}, 2)
    with pytest.raises(ls.UsageError, match=r"The edit .* is of version 3 of its format, and 2 is known here"):
        read(tensors, 3)
    for version in ("2", None, True):
        with pytest.raises(ls.UsageError, match=f"The edit .* is damaged: its version is {version!r}, not a number"):
            read(tensors, version)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.8, 1.0])
def test_a_patch_takes_at_most_a_fifth_more_than_its_values(share, tmp_path):
    """If it changes more than 3.2 % of a weight: the entropy of fewer random places is more."""
    wide = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    model = build_tiny(BertForSequenceClassification, **wide)
    adapters = ls.inject(model, ls.SHiRA(["query", "key", "value"], changed=share, mask="random", train_head=False))
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.values.normal_()
    report = ls.export_delta(model, tmp_path / "patch", tolerance=1e-3)
    values = 4 * sum(adapter.size for adapter in adapters.values())
    size = sum(tensor.nbytes for tensor in load_file(tmp_path / "patch" / "adapter.safetensors").values())
    assert values < size + 1
    assert size <= 1.2 * values + 64
    assert report.bytes - size < 2000  # names
