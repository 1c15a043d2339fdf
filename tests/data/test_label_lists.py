"""lit_sparse.data.labels in TextClassificationData: any number of labels per row, in lists or in columns."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value

from lit_sparse import TextClassificationData, UsageError

ROWS = [("a bad film", ["rude", "cold"]), ("a film", []), ("a warm film", ["warm"]), ("sad and cold", ["cold"])]
NAMES = ["cold", "rude", "warm"]
VECTORS = [[1, 1, 0], [0, 0, 0], [0, 0, 1], [1, 0, 0]]


@pytest.fixture
def write(tmp_path):
    def write_rows(name, rows):
        """Rows of a text and a label, or of a text and several columns."""
        file = tmp_path / name
        rows = [row if isinstance(row, dict) else {"text": row[0], "label": row[1]} for row in rows]
        if file.suffix == ".parquet":
            Dataset.from_list(rows).to_parquet(file)
        elif file.suffix == ".csv":
            Dataset.from_list(
                [{k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()} for row in rows]
            ).to_csv(file)
        else:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write_rows


def set_up(train, bert, validation=None, stage="fit", **options):
    files = {"train": train, "validation": validation or train}
    data = TextClassificationData(data_files=files, tokenizer=bert, **options)
    data.setup(stage)
    return data


def labels_of(data):
    return next(iter(data.val_dataloader()))["labels"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_lists_of_names_become_a_column_for_each_label(ending, write, bert):
    data = set_up(write(f"rows.{ending}", ROWS), bert)
    assert (data.multi_label, data.num_labels, data.label_names) == (True, 3, NAMES)
    labels = labels_of(data)
    assert labels.dtype == torch.float
    assert labels.tolist() == VECTORS
    assert sorted(next(iter(data.train_dataloader()))["labels"].tolist()) == sorted(VECTORS)


def test_given_names_have_their_order_and_may_be_ids_in_the_file(write, bert):
    names = ["warm", "unseen", "rude", "cold"]
    given = set_up(write("rows.jsonl", ROWS), bert, labels=names)
    assert labels_of(given).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]]
    by_id = [(text, [names.index(name) for name in labels]) for text, labels in ROWS]
    assert torch.equal(labels_of(set_up(write("ids.jsonl", by_id), bert, labels=names)), labels_of(given))


def test_numbers_without_names_are_names(write, bert):
    data = set_up(write("rows.jsonl", [("a", [10, 2]), ("b", []), ("c", [7])]), bert)
    assert data.label_names == ["2", "7", "10"]
    assert labels_of(data).tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_a_source_names_its_own_labels(tmp_path, bert):
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["b", "a"]))})
    Dataset.from_dict({"text": ["x", "y"], "label": [[0, 1], []]}, features).to_parquet(tmp_path / "rows.parquet")
    data = set_up(str(tmp_path / "rows.parquet"), bert)
    assert data.label_names == ["b", "a"]
    assert labels_of(data).tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize(
    ("ending", "zero", "one"), [("csv", 0, 1), ("csv", 0.0, 1.0), ("jsonl", 0, 1), ("jsonl", False, True)]
)
def test_several_columns_are_a_label_each(ending, zero, one, write, bert):
    rows = [{"text": "a", "x": one, "y": 0}, {"text": "b", "x": zero, "y": 0}, {"text": "c", "x": zero, "y": 1}]
    data = set_up(write(f"rows.{ending}", rows), bert, label=["y", "x"])
    assert (data.multi_label, data.num_labels, data.label_names) == (True, 2, ["y", "x"])
    assert labels_of(data).tolist() == [[0, 1], [0, 0], [1, 0]]


def test_one_class_per_row_is_as_it_was(write, bert):
    for rows in ([("a", "x"), ("b", "y")], [("a", "[x]"), ("b", "y")]):
        data = set_up(write(f"{len(rows[0][1])}.csv", rows), bert)
        assert data.multi_label is False
        assert labels_of(data).dtype == torch.long


def test_prediction_needs_no_labels_and_does_not_know_of_them(write, bert):
    data = TextClassificationData(
        data_files={"predict": write("rows.jsonl", [{"text": "a"}])}, tokenizer=bert, labels=NAMES
    )
    data.setup("predict")
    assert data.multi_label is None
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_with_given_names_only_the_splits_of_the_stage_are_read(write, bert, tmp_path):
    (tmp_path / "broken.jsonl").write_text("{")
    files = {"train": str(tmp_path / "broken.jsonl"), "test": write("rows.jsonl", ROWS)}
    data = TextClassificationData(data_files=files, tokenizer=bert, labels=NAMES)
    data.setup("test")
    assert data.multi_label
    assert next(iter(data.test_dataloader()))["labels"].tolist() == VECTORS


# Errors.


def refused(match, *arguments, **options):
    with pytest.raises(UsageError, match=match) as caught:
        set_up(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (("b", "rude"), "has 'rude' in the column 'label', where other rows have a list of labels: .* An empty list"),
        (("b", None), "has None in the column 'label', where other rows have a list"),
        (("b", [None]), r"has \[None\] in the column 'label', where"),
        (("b", [True, False]), r"has \[True, False\] in the column 'label', where"),
        (("b", [["rude"]]), r"has \[\['rude'\]\] in the column 'label', where"),
        (
            ("b", ["odd"]),
            r"has the label 'odd' in the column 'label', which is none of the labels \['cold', 'rude', 'warm'\]",
        ),
        (("b", ["cold", "cold"]), r"has a label twice in the column 'label', \['cold', 'cold'\]"),
    ],
)
def test_what_is_no_list_of_the_labels_names_file_row_and_column(row, message, write, bert):
    odd = write("odd.jsonl", [*ROWS, row])
    place = r"Row 4 \(counted from 0 in .*odd\.jsonl\) of the split 'validation' "
    refused(place + message, write("rows.jsonl", ROWS), bert, odd)


def test_lists_in_a_csv_are_json(write, bert):
    place = (
        r"Row 0 \(counted from 0 in .*odd\.csv\) of the split 'train' has \"\['cold', 'rude'\]\" in the column 'label'"
    )
    refused(place, write("odd.csv", [("a", "['cold', 'rude']"), ("b", '["cold"]'), ("c", '["rude"]')]), bert)
    refused(place, write("odd.csv", [("a", "['cold', 'rude']"), ("b", "['cold']")]), bert)  # as pandas writes all lists


def test_zeros_and_ones_in_a_list_are_no_labels(write, bert):
    refused(
        "Row 0 .* has a label twice .* Zeros and ones are read from columns",
        write("rows.jsonl", [("a", [0, 1, 0])]),
        bert,
    )


@pytest.mark.parametrize("value", [2, None, -1, "yes", 0.5])
def test_a_cell_that_is_neither_zero_nor_one_names_file_row_and_column(value, write, bert):
    file = write("rows.jsonl", [{"text": "a", "x": 1, "y": 0}, {"text": "b", "x": 0, "y": value}])
    place = r"Row 1 \(counted from 0 in .*rows\.jsonl\) of the split 'train'"
    refused(rf"{place} has '?{value}'? in the column 'y', which must be 0 or 1", file, bert, label=["x", "y"])


def test_a_column_that_is_not_there_is_named(write, bert):
    file = write("rows.jsonl", [{"text": "a", "x": 1}])
    refused(r"'train' has no column 'y'; .* \(.*rows\.jsonl\)", file, bert, label=["x", "y"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label": ["x"]}, r"one column, or several different columns .*; got \['x'\]"),
        ({"label": []}, "several different columns"),
        ({"label": ["x", "x"]}, "several different columns"),
        ({"label": ["x", "y"], "labels": ["a", "b"]}, r"\['x', 'y'\] in label are the labels: leave out labels"),
        ({"label": ["x", "y"], "regression": True}, "are the labels: leave out regression"),
    ],
)
def test_arguments_that_contradict_each_other(options, message):
    with pytest.raises(UsageError, match=message):
        TextClassificationData("rows", **options)


def test_a_single_label_is_not_enough(write, bert):
    refused(r"two different labels, but .* has \['cold'\]", write("rows.jsonl", [("a", ["cold"]), ("b", [])]), bert)


def test_a_list_for_regression_names_the_row(write, bert):
    refused(r"Row 0 .* has the label \[1.5\]", write("rows.jsonl", [("a", [1.5])]), bert, regression=True)
