"""lit_sparse.ReasoningData: sets in folders, prompts with answers, and what the user is told."""

import json

import pytest
import torch
from backbones import save_tiny_causal_tokenizer
from transformers import AutoTokenizer

import lit_sparse as ls


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return save_tiny_causal_tokenizer(tmp_path_factory.mktemp("llama"), add_bos=True, pad_token="<pad>")  # noqa: S106


def rows(count, answer, text="is it good"):
    asked = [f"{text} {'so ' * (n % 4)}{n}" for n in range(count)]
    return [{"instruction": a, "input": "", "output": f"the answer is {answer}", "answer": answer} for a in asked]


@pytest.fixture
def folder(tmp_path):
    """Two sets, of which one has training rows."""
    root = tmp_path / "sets"
    for name, split, content in (
        ("boolq", "train", rows(20, "true")),
        ("boolq", "test", rows(5, "false")),
        ("gsm8k", "test", [{**row, "answer": number} for number, row in enumerate(rows(3, "0"))]),
    ):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{split}.json").write_text(json.dumps(content))
    return root


def data_of(folder, tokenizer, stage, **options):
    data = ls.ReasoningData(str(folder), tokenizer=tokenizer, template="{instruction} : ", batch_size=2, **options)
    data.setup(stage)
    return data


def test_sets_are_those_of_the_folder_or_those_that_are_named(folder, tokenizer):
    assert data_of(folder, tokenizer, "test").test_names == ("boolq", "gsm8k")
    assert data_of(folder, tokenizer, "test", sets=["gsm8k"]).test_names == ("gsm8k",)


def test_test_batches_hold_prompts_padded_on_the_left_and_answers_as_text(folder, tokenizer):
    yes_no, numbers = data_of(folder, tokenizer, "test").test_dataloader()
    answers = [answer for batch in numbers for answer in batch["answers"]]
    assert answers == ["0", "1", "2"]
    known = AutoTokenizer.from_pretrained(tokenizer)
    texts = []
    for batch in yes_no:
        assert batch.keys() == {"input_ids", "attention_mask", "answers"}
        assert (batch["attention_mask"][:, -1] == 1).all()
        assert (batch["input_ids"][batch["attention_mask"] == 0] == known.pad_token_id).all()
        texts += known.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == [f"{row['instruction']} : " for row in rows(5, "false")]


def test_training_rows_are_those_of_the_sets_and_some_are_held_out(folder, tokenizer):
    data = data_of(folder, tokenizer, "fit", validation_fraction=0.2)
    sizes = [
        sum(len(batch["labels"]) for batch in loader) for loader in (data.train_dataloader(), data.val_dataloader())
    ]
    assert sizes == [16, 4]
    assert all((batch["labels"] != -100).any(1).all() for batch in data.val_dataloader())


def test_validation_by_answers(folder, tokenizer):
    data = data_of(folder, tokenizer, "fit", validation_fraction=0.2, validation="answers")
    assert [batch["answers"] for batch in data.val_dataloader()] == [["true", "true"]] * 2
    assert all("labels" in batch for batch in data.train_dataloader())


def test_a_mixture_is_one_file(folder, tokenizer, tmp_path):
    (tmp_path / "mixture.json").write_text(json.dumps(rows(10, "solution1")))
    data = data_of(folder, tokenizer, "fit", train_file=str(tmp_path / "mixture.json"), validation_fraction=0.1)
    assert sum(len(batch["labels"]) for batch in data.train_dataloader()) == 9


def test_prediction_batches_hold_prompts_alone(folder, tokenizer):
    loaders = data_of(folder, tokenizer, "predict").predict_dataloader()
    assert all(batch.keys() == {"input_ids", "attention_mask"} for loader in loaders for batch in loader)


@pytest.mark.parametrize(
    ("name", "text", "answer", "right"),
    [
        ("boolq", "It is false.", "false", True),
        ("gsm8k", "so 3 + 4 = 7", "7.0", True),
        ("", "the correct answer is solution2", "solution2", True),
        ("", "the correct answer is (B)", "B", True),
        ("", "that makes 12", "12", True),
        ("", "answer1", "answer2", False),
    ],
)
def test_answers_are_judged_by_the_rule_of_their_set(folder, name, text, answer, right):
    assert ls.ReasoningData(str(folder)).is_right(text, answer, name) == right


def test_what_the_user_is_told(folder, tokenizer, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ls.UsageError, match=r"sets are some of boolq, .*; got \['bool'\]"):
        ls.ReasoningData(str(folder), sets=["bool"])
    with pytest.raises(ls.UsageError, match="validation must be 'loss' or 'answers'; got 'both'"):
        ls.ReasoningData(str(folder), validation="both")
    with pytest.raises(ls.UsageError, match="no folder: give one that holds a folder for each set"):
        ls.ReasoningData(str(tmp_path / "nowhere"))
    with pytest.raises(ls.UsageError, match="holds none of the sets"):
        ls.ReasoningData(str(tmp_path / "empty"))
    with pytest.raises(ls.UsageError, match=r"'piqa' has no test\.json"):
        data_of(folder, tokenizer, "test", sets=["piqa"])
    with pytest.raises(ls.UsageError, match="train_file names a file that does not exist"):
        data_of(folder, tokenizer, "fit", train_file="nowhere.json")
    with pytest.raises(ls.UsageError, match="needs the split 'train'"):
        data_of(folder, tokenizer, "fit", sets=["gsm8k"])
    (folder / "boolq" / "test.json").write_text(json.dumps([{**rows(1, "x")[0], "answer": " "}]))
    with pytest.raises(ls.UsageError, match=r"Row 0 .* of the split 'boolq' has no text in the column 'answer'"):
        data_of(folder, tokenizer, "test")


def test_batches_are_the_same_in_every_run(folder, tokenizer):
    first, second = (
        [batch["input_ids"] for batch in data_of(folder, tokenizer, "fit").train_dataloader()] for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
