"""lit_sparse.MultipleChoiceData: the forms that data sets have, what a batch holds, and what the user is told."""

import json

import pytest
import torch
from transformers import AutoTokenizer

from lit_sparse import MultipleChoiceData, UsageError

ROWS = [
    {"question": "what is it", "choices": ["a dog", "a cat", "the good man sat in the house"], "label": 2},
    {"question": "who sat", "choices": ["no", "one man", "two"], "label": 0},
]
NAMED = [
    {
        "question": row["question"],
        "choices": {"text": row["choices"], "label": list("ABC")},
        "answerKey": "ABC"[row["label"]],
    }
    for row in ROWS
]


@pytest.fixture
def prepare(tmp_path, bert):
    """A data module of these rows in every split, set up for a stage."""

    def make(rows=ROWS, stage="validate", **arguments):
        file = tmp_path / "rows.json"
        file.write_text(json.dumps(rows))
        files = dict.fromkeys(("train", "validation", "test", "predict"), str(file))
        data = MultipleChoiceData(data_files=files, **{"tokenizer": bert, **arguments})
        data.setup(stage)
        return data

    return make


def pairs_in(batch, bert):
    """The question and the choice of every choice of every row."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    return [
        [
            (
                tokenizer.decode(ids[(mask == 1) & (kind == 0)][1:-1]),
                tokenizer.decode(ids[(mask == 1) & (kind == 1)][:-1]),
            )
            for ids, mask, kind in zip(*row, strict=True)
        ]
        for row in zip(batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], strict=True)
    ]


EXPECTED = [[(row["question"], choice) for choice in row["choices"]] for row in ROWS]


def test_every_choice_stands_beside_its_question(prepare, bert):
    data = prepare()
    (batch,) = data.val_dataloader()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in batch.items()} == {
        **dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), (torch.long, (2, 3, 13))),
        "labels": (torch.long, (2,)),
    }
    assert pairs_in(batch, bert) == EXPECTED
    assert batch["labels"].tolist() == [2, 0]
    assert data.num_labels == 3


def test_choices_with_names_of_their_own(prepare, bert):
    (batch,) = prepare(NAMED, label="answerKey").val_dataloader()
    assert pairs_in(batch, bert) == EXPECTED
    assert batch["labels"].tolist() == [2, 0]
    # As some rows of ARC have them: names that look like numbers, counted from 1.
    numbered = [{**row, "choices": {**row["choices"], "label": ["1", "2", "3"]}, "answerKey": "2"} for row in NAMED]
    (batch,) = prepare(numbered, label="answerKey").val_dataloader()
    assert batch["labels"].tolist() == [1, 1]


def test_choices_in_columns_and_a_question_in_several(prepare, bert):
    rows = [
        {
            "ctx": "so",
            "start": row["question"],
            **{f"ending{i}": choice for i, choice in enumerate(row["choices"])},
            "label": 1,
        }
        for row in ROWS
    ]
    rows[1]["ctx"] = ""
    columns = {"question": ["ctx", "start"], "choices": ["ending0", "ending1", "ending2"]}
    (batch,) = prepare(rows, **columns).val_dataloader()
    assert pairs_in(batch, bert) == [[(f"so {question}", choice) for question, choice in EXPECTED[0]], EXPECTED[1]]
    assert batch["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(("labels", "expected"), [(["2", "0"], [2, 0]), (["C", "A"], [2, 0]), ([1, 0], [1, 0])])
def test_numbers_and_letters_of_choices_without_names(labels, expected, prepare):
    """As digits in HellaSwag, as letters in RACE."""
    rows = [{**row, "label": label} for row, label in zip(ROWS, labels, strict=True)]
    (batch,) = prepare(rows).val_dataloader()
    assert batch["labels"].tolist() == expected


@pytest.mark.parametrize("hidden", [-1, "", None])
def test_hidden_labels_of_a_test_set(hidden, prepare):
    rows = [{**row, "label": hidden} for row in ROWS]
    (batch,) = prepare(rows, "test").test_dataloader()
    assert "labels" not in batch


def test_prediction_needs_no_labels(prepare, bert):
    rows = [{"question": row["question"], "choices": row["choices"]} for row in ROWS]
    (batch,) = prepare(rows, "predict").predict_dataloader()
    assert sorted(batch) == ["attention_mask", "input_ids", "token_type_ids"]
    assert pairs_in(batch, bert) == EXPECTED


def test_long_pairs_lose_tokens_of_the_longer_text(prepare, bert):
    rows = [{**row, "question": "what is it " * 9} for row in ROWS]
    (batch,) = prepare(rows, max_length=12).val_dataloader()
    assert batch["input_ids"].shape == (2, 3, 12)
    assert [choice for _, choice in pairs_in(batch, bert)[1]] == ROWS[1]["choices"]


def test_rows_of_like_length_train_together(prepare):
    rows = [{**ROWS[0], "question": "so " * i} for i in range(1, 13)]
    data = prepare(rows, "fit", batch_size=3)
    widths = [batch["input_ids"].shape for batch in data.train_dataloader()]
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == 4
    assert {shape[:2] for shape in widths} == {(3, 3)}


def refused(prepare, rows, match, **arguments):
    with pytest.raises(UsageError, match=match) as caught:
        prepare(rows, **arguments)
    assert "\n" not in str(caught.value)


def test_rows_with_more_or_fewer_choices_are_named(prepare):
    for count in (2, 4):
        rows = [*ROWS, {**ROWS[0], "choices": ["a dog"] * count, "label": 0}]
        refused(prepare, rows, rf"Row 2 .* 'validation' has {count} choices, but the first row has 3")


@pytest.mark.parametrize("label", [3, -1, "D", "3", "", None, 1.5, "dog"])
def test_labels_that_mean_no_choice_name_the_row(label, prepare):
    rows = [{**row, "label": label} for row in ROWS]
    expected = rf"Row 0 .* has the label {label!r} in the column 'label', which is neither the name of a choice, "
    refused(prepare, rows, expected + r"\['A', 'B', 'C'\], nor a number from 0 to 2")


def test_a_letter_that_is_none_of_the_names(prepare):
    rows = [NAMED[0], {**NAMED[1], "answerKey": "E"}]
    refused(prepare, rows, r"Row 1 .* has the label 'E' .* \['A', 'B', 'C'\]", label="answerKey")


@pytest.mark.parametrize(("column", "value"), [("question", " "), ("question", None), ("choices", ["a", "", "b"])])
def test_empty_texts_name_the_row(column, value, prepare):
    refused(prepare, [*ROWS, {**ROWS[0], column: value}], rf"Row 2 .* has no text in the column '{column}'")


def test_an_empty_choice_in_a_column_names_the_row(prepare):
    rows = [{"question": "so", "a": "dog", "b": "cat", "label": 0}, {"question": "so", "a": "dog", "b": "", "label": 0}]
    refused(prepare, rows, r"Row 1 .* has no text in the column 'b' but ''", choices=["a", "b"])


def test_choices_of_another_form_are_refused(prepare):
    rows = [{"question": "so", "choices": "a dog, a cat", "label": 0}]
    refused(prepare, rows, r"Row 0 .* has no choices in the column 'choices' but 'a dog, a cat': give a list of texts")
    rows = [{"question": "so", "choices": {"text": ["a", "b"], "label": ["A"]}, "label": 0}]
    refused(prepare, rows, r"Row 0 .* has 2 texts but 1 labels in the column 'choices'")


def test_one_choice_is_none(prepare):
    refused(prepare, [{"question": "so", "choices": ["a"], "label": 0}], "gives 1 choices: give at least two")
    refused(prepare, ROWS, r"choices=\['question'\] gives 1 choices", choices=["question"])
    with pytest.raises(UsageError, match="question names no column"):
        MultipleChoiceData("rows.json", question=[])


def test_missing_columns_list_those_found(prepare):
    found = r"; its columns are \['question', 'choices', 'label'\]"
    refused(prepare, ROWS, "has no column 'answerKey'" + found, label="answerKey")
    refused(prepare, ROWS, "has no column 'options'" + found, choices="options")
    refused(prepare, ROWS, "has no column 'ending0', 'ending1'" + found, choices=["ending0", "ending1"])
    refused(prepare, ROWS, "has no column 'ctx'" + found, question="ctx")
