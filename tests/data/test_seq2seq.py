"""lit_sparse.Seq2SeqData: what the encoder reads, what the decoder is to write, and what the user is told."""

import csv
import json

import pytest
import torch
from backbones import save_tiny_bart, save_tiny_t5, save_tiny_tokenizer
from transformers import AutoTokenizer

from lit_sparse import Seq2SeqData, UsageError

ROWS = [
    {"source": "the dog runs", "target": "a dog"},
    {"source": "one two three", "target": "it is true, so it is not false"},
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_t5(tmp_path_factory.mktemp("t5"))


def batch_of(rows, folder, tokenizer, role="validation", **arguments):
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    files = dict.fromkeys(("train", "validation", "test", "predict"), str(file))
    data = Seq2SeqData(data_files=files, tokenizer=tokenizer, **arguments)
    data.setup({"train": "fit", "validation": "validate"}.get(role, role))
    loader = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    return next(iter(loader.get(role, data.predict_dataloader)()))


def texts(tokenizer, ids):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    return [tokenizer.decode(row[row != -100]) for row in ids]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_sources_and_targets_end_in_eos_and_are_padded(kind, t5, tmp_path):
    tokenizer = t5 if kind == "t5" else save_tiny_bart(tmp_path / "bart")
    batch = batch_of(ROWS, tmp_path, tokenizer, prefix="what is ")
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels", "targets"), torch.long
    )
    bos, eos, pad = ("", "</s>", "<pad>") if kind == "t5" else ("<s>", "</s>", "<pad>")
    read = [text.replace(pad, "") for text in texts(tokenizer, batch["input_ids"])]
    assert read == [f"{bos}what is {row['source']}{eos}" for row in ROWS]
    assert (
        batch["attention_mask"].sum(1) == (batch["input_ids"] != 0 if kind == "t5" else batch["input_ids"] != 2).sum(1)
    ).all()
    assert texts(tokenizer, batch["labels"]) == [f"{bos}{row['target']}{eos}" for row in ROWS]
    assert torch.equal(batch["labels"], batch["targets"])


def test_what_is_too_long_loses_its_end_but_targets_to_compare_with_do_not(t5, tmp_path):
    rows = [{"source": "one two three " * 9, "target": "it is a good film and a fine plot"}, ROWS[0]]
    batch = batch_of(rows, tmp_path, t5, "test", max_length=5, max_target_length=4)
    assert texts(t5, batch["input_ids"])[0] == "one two three one</s>"
    assert texts(t5, batch["labels"]) == ["it is a good", "a dog</s>"]
    assert texts(t5, batch["targets"]) == ["it is a good film and a fine plot</s>", "a dog</s>"]
    trained = batch_of(rows, tmp_path, t5, "train", max_length=5, max_target_length=4)
    assert sorted(trained) == ["attention_mask", "input_ids", "labels"]
    assert trained["labels"].shape == (2, 4)


def test_a_target_without_eos_of_its_tokenizer_gets_one(tmp_path):
    """Such as the tokenizer of GPT-2, when it writes for an encoder of another kind."""
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bart(tmp_path / "bart"))
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "bare")
    batch = batch_of(ROWS, tmp_path, str(tmp_path / "bare"))
    assert texts(tmp_path / "bare", batch["labels"]) == [f"{row['target']}</s>" for row in ROWS]


@pytest.mark.parametrize("adds", [True, False])
def test_a_target_has_one_eos_at_its_end_whatever_its_text_spells(adds, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bart(tmp_path / "bart"))
    if not adds:
        tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path / "own")
    rows = [{**ROWS[0], "target": "a dog</s>"}, {**ROWS[0], "target": "a</s> dog"}]
    bos = "<s>" if adds else ""
    written = texts(tmp_path / "own", batch_of(rows, tmp_path, str(tmp_path / "own"))["labels"])
    assert written == [f"{bos}a dog</s>", f"{bos}a</s> dog</s>"]


def test_prediction_needs_no_targets(t5, tmp_path):
    batch = batch_of([{"source": "the dog"}], tmp_path, t5, "predict")
    assert sorted(batch) == ["attention_mask", "input_ids"]


def test_columns_of_a_csv_of_ones_own(t5, tmp_path):
    with (tmp_path / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["en", "xx"], *([f"the dog {'runs ' * i}", "a dog"] for i in range(1, 9))])
    data = Seq2SeqData(
        str(tmp_path / "train.csv"), validation_fraction=0.25, source="en", target="xx", tokenizer=t5, batch_size=2
    )
    data.setup("fit")
    widths = [batch["input_ids"].shape[1] for batch in data.train_dataloader()]
    assert widths == sorted(widths, reverse=True)
    assert len(widths) == 3
    assert data.decode(next(iter(data.val_dataloader()))["targets"].clamp(min=0)) == ["a dog"] * 2


@pytest.mark.parametrize("column", ["source", "target"])
@pytest.mark.parametrize("text", ["", " \n", None])
def test_empty_texts_name_the_row(column, text, t5, tmp_path):
    rows = [*ROWS, {**ROWS[0], column: text}]
    with pytest.raises(UsageError, match=rf"Row 2 .* 'validation' has no text in the column '{column}'"):
        batch_of(rows, tmp_path, t5)


def test_missing_columns_list_those_found(t5, tmp_path):
    found = r"has no column 'article', 'highlights'; its columns are \['source', 'target'\]"
    with pytest.raises(UsageError, match=found):
        batch_of(ROWS, tmp_path, t5, source="article", target="highlights")


def test_a_target_has_some_token(t5):
    with pytest.raises(UsageError, match="max_target_length must be at least 1; got 0"):
        Seq2SeqData("rows.json", max_target_length=0)


def test_a_tokenizer_without_eos_leaves_targets_as_they_are(tmp_path):
    bert = save_tiny_tokenizer(tmp_path / "bert")
    assert texts(bert, batch_of(ROWS[:1], tmp_path, bert)["labels"]) == ["[CLS] a dog [SEP]"]
