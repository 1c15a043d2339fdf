"""lit_sparse.data.causal: which rows share a sequence, and that nothing of them is lost."""

import json
import math
from itertools import pairwise

import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from lit_sparse import InstructionData, ReasoningData
from lit_sparse.data.causal import best_fit, packed

IGNORED = -100


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("llama"), add_bos=True, pad_token="<pad>")  # noqa: S106


@pytest.fixture
def file(tmp_path):
    words = ["good", "film", "the", "cat", "sat", "dog", "runs", "house", "man", "woman"]
    rows = [
        {"question": " ".join(words[: 1 + n % 7]), "output": " ".join(words[n % 5 : n % 5 + 1 + n % 3])}
        for n in range(57)
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def data(file, tokenizer, **arguments):
    made = InstructionData(file, template="{question}", tokenizer=tokenizer, validation_fraction=0.2, **arguments)
    made.setup("fit")
    return made


def rows_of(ids, positions):
    """The rows of a sequence, divided where positions restart."""
    starts = [n for n, position in enumerate(positions) if position == 0]
    return [tuple(ids[first:last]) for first, last in pairwise([*starts, len(ids)])]


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(20, 40))
def test_every_item_is_in_one_bin_and_no_bin_is_too_full(lengths, room):
    bins = best_fit(lengths, room)
    assert sorted(item for found in bins for item in found) == list(range(len(lengths)))
    sums = [sum(lengths[item] for item in found) for found in bins]
    assert all(0 < total <= room for total in sums)
    assert all(left + right > room for left, right in pairwise(sorted(sums)))  # no two bins fit into one
    assert len(bins) <= math.ceil(11 / 9 * max(sum(lengths) / room, len([n for n in lengths if 2 * n > room]))) + 1


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=30))
def test_sequences_hold_whole_rows_whose_positions_restart(ids):
    labels = [[IGNORED if n % 3 == 0 else token for n, token in enumerate(row)] for row in ids]
    joined = packed({"input_ids": ids, "labels": labels}, 15)
    found = [
        row
        for sequence, positions in zip(joined["input_ids"], joined["position_ids"], strict=True)
        for row in rows_of(sequence, positions)
    ]
    assert sorted(found) == sorted(map(tuple, ids))
    assert joined["length"] == [len(sequence) for sequence in joined["input_ids"]]
    for sequence, positions, labelled in zip(
        joined["input_ids"], joined["position_ids"], joined["labels"], strict=True
    ):
        assert labelled == [IGNORED if n % 3 == 0 else token for token, n in zip(sequence, positions, strict=True)]


def test_the_first_token_of_a_row_is_not_predicted_from_the_row_before():
    joined = packed({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, 4]]}, 4)
    assert joined["labels"] == [[IGNORED, 2, IGNORED, 4]]


def test_training_batches_are_packed_and_the_others_are_not(file, tokenizer):
    plain, made = data(file, tokenizer, max_length=32), data(file, tokenizer, max_length=32, packing=True, batch_size=4)
    batches = list(made.train_dataloader())
    assert all(set(batch) == {"input_ids", "position_ids", "labels"} for batch in batches)
    found = [
        (tuple(token for token in row if token != made.pad_token_id))
        for batch in batches
        for ids, positions in zip(batch["input_ids"].tolist(), batch["position_ids"].tolist(), strict=True)
        for row in rows_of(ids, positions)
    ]
    wanted = [
        tuple(ids[mask == 1].tolist())
        for batch in plain.train_dataloader()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    assert sorted(filter(None, found)) == sorted(wanted)
    assert sum(len(batch["input_ids"]) for batch in batches) < len(wanted) / 2
    for mine, other in zip(made.val_dataloader(), plain.val_dataloader(), strict=False):
        assert torch.equal(mine["input_ids"][0, :5], other["input_ids"][0, :5])
        assert "attention_mask" in mine


def test_little_of_a_packed_batch_is_padding(file, tokenizer):
    made = data(file, tokenizer, max_length=48, packing=True, batch_size=4)
    ids = [batch["input_ids"] for batch in made.train_dataloader()]
    padding = sum(int((batch == made.pad_token_id).sum()) for batch in ids)
    assert padding < 0.15 * sum(batch.numel() for batch in ids)


def test_processes_share_the_sequences_and_every_epoch_has_another_order(file, tokenizer):
    made = data(file, tokenizer, max_length=32, packing=True, batch_size=2)
    rows = made._prepared["train"][0]
    shares = [list(made._train_sampler(rows, {"num_replicas": 2, "rank": rank})) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1])
    assert set(shares[0]) | set(shares[1]) == set(range(len(rows)))
    sampler = made._train_sampler(rows, {"num_replicas": 1, "rank": 0})
    before = list(sampler)
    sampler.set_epoch(1)
    assert sorted(before) == sorted(sampler)
    assert before != list(sampler)


def test_a_loader_goes_on_in_the_middle_of_an_epoch(file, tokenizer):
    made = data(file, tokenizer, max_length=32, packing=True, batch_size=2)
    loader = made.train_dataloader()
    batches, state = [], None
    for number, batch in enumerate(loader):
        batches.append(batch)
        if number == 1:
            state = made.state_dict()
    other = data(file, tokenizer, max_length=32, packing=True, batch_size=2)
    other.load_state_dict(state)
    rest = list(other.train_dataloader())
    assert len(rest) == len(batches) - 2 > 2
    for mine, wanted in zip(rest, batches[2:], strict=True):
        assert all(torch.equal(mine[name], wanted[name]) for name in wanted)


def test_another_length_is_packed_anew(file, tokenizer):
    long = data(file, tokenizer, max_length=64, packing=True)._prepared["train"][0]
    short = data(file, tokenizer, max_length=32, packing=True)._prepared["train"][0]
    assert max(short["length"]) <= 32 < max(long["length"]) <= 64


def test_reasoning_data_can_be_packed_too(tmp_path, tokenizer):
    (tmp_path / "boolq").mkdir()
    row = {"instruction": "Is it true?", "input": "", "output": "the correct answer is true", "answer": "true"}
    for split in ("train", "test"):
        (tmp_path / "boolq" / f"{split}.json").write_text(json.dumps([row] * 20))
    made = ReasoningData(str(tmp_path), tokenizer=tokenizer, max_length=512, packing=True, validation_fraction=0.5)
    made.setup("fit")
    (batch,) = made.train_dataloader()
    assert int((batch["position_ids"] == 0).sum()) == 10 + int((batch["input_ids"] == made.pad_token_id).sum())
    made.setup("test")
    assert "answers" in next(iter(made.test_dataloader()))
