"""lit_sparse.data.tables, csv_rows and json_rows: that very file, and one type for each column over all of its rows."""

import gzip
import json

import pandas
import pytest
from datasets import ClassLabel, Dataset, Features, Value

from lit_sparse import UsageError
from lit_sparse.data import csv_rows, json_rows, tables
from lit_sparse.data.sources import open_source
from lit_sparse.data.tables import ENDINGS, read_files


@pytest.fixture(autouse=True)
def _small_parts(tmp_path, monkeypatch):
    """Parts of two rows or so, so that small files have several."""
    for module in (tables, csv_rows, json_rows):
        monkeypatch.setattr(module, "_CHUNK_ROWS", 2)
    monkeypatch.chdir(tmp_path)


def read(folder, name, content):
    file = folder / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_files([file], "train")


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        (["1", "2", "-3"], [1, 2, -3]),
        (["1", "2", "3", "3.7"], [1.0, 2.0, 3.0, 3.7]),
        (["1", "", "3"], [1, None, 3]),
        (["1", "2", "3", "late"], ["1", "2", "3", "late"]),
        (["007", "012"], ["007", "012"]),
        (["7", "8", "9", "007"], ["7", "8", "9", "007"]),
        (["+5", "6"], ["+5", "6"]),
        (["1234567890123456789", "1"], ["1234567890123456789", "1"]),
        (["-.5", "2e3", "1."], [-0.5, 2000.0, 1.0]),
        (["nan", "1"], ["nan", "1"]),
        (["true", "false"], ["true", "false"]),
        (["NA", "None", "null"], ["NA", "None", "null"]),
        (["2020-01-01", "x"], ["2020-01-01", "x"]),
    ],
)
def test_a_column_of_csv_is_of_numbers_only_if_all_its_cells_are(cells, values, tmp_path):
    rows = read(tmp_path, "a.csv", "other,cell\n" + "".join(f"x,{cell}\n" for cell in cells))
    assert rows["cell"] == values
    assert list(map(type, rows["cell"])) == list(map(type, values))


@pytest.mark.parametrize(
    ("given", "values"),
    [
        ([1, 2, 3, 3.7], [1.0, 2.0, 3.0, 3.7]),
        ([None, None, None, "late"], [None, None, None, "late"]),
        ([[], [], [], ["late"]], [[], [], [], ["late"]]),
        ([1, 2, 3, "late"], ["1", "2", "3", "late"]),
        (["early", "b", "c", 4.5, True], ["early", "b", "c", "4.5", "true"]),
        (["é", 1], ["é", "1"]),
        (["2020-01-01"] * 3, ["2020-01-01"] * 3),
        (["2020-01-01"] * 3 + ["late"], ["2020-01-01"] * 3 + ["late"]),
        ([{"a": ["2020-01-01"]}] * 3, [{"a": ["2020-01-01"]}] * 3),
        ([10**30, "late"], [str(10**30), "late"]),
        ([{"a": 1}, {"a": 1}, {"b": "late"}], [{"a": 1, "b": None}, {"a": 1, "b": None}, {"a": None, "b": "late"}]),
        # No type holds these: they stay as they are, for messages that name the row.
        (["text", "text", {"a": 1}, None], ["text", "text", {"a": 1}, None]),
        ([[1, "two"], None, [3]], [[1, "two"], None, [3]]),
        # Nor does one hold lists of objects with other keys, or with keys in another order, unchanged.
        ([[{"a": 1}, {"b": "c"}], [{"a": 2}]], [[{"a": 1}, {"b": "c"}], [{"a": 2}]]),
        ([[{"a": 1}]] * 3 + [[{"a": 2}, {"a": None}]], [[{"a": 1}]] * 3 + [[{"a": 2}, {"a": None}]]),
    ],
)
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_a_column_of_json_has_the_type_that_holds_all_its_values(given, values, ending, tmp_path):
    rows = [{"other": "x" * 20, "value": value} for value in given]
    assert read(tmp_path, f"a.{ending}", json.dumps(rows) if ending == "json" else lines(*rows))["value"] == values


@pytest.mark.parametrize("later", [{"a": 2.5}, {"a": 2, "b": 1}, {"a": None}], ids=str)
@pytest.mark.parametrize("between", [0, 1_000], ids=["one part", "two parts"])
def test_lists_of_objects_come_back_as_they_were_written(later, between, tmp_path):
    values = [[{"b": 1, "a": 2}], *([[{"b": 1, "a": 2}]] * between), [later]]
    found = read(tmp_path, "a.jsonl", lines(*({"value": value} for value in values)))["value"]
    assert json.dumps(list(found)) == json.dumps(values)  # which tells 2 from 2.0, and knows the order of keys


def test_a_column_may_begin_late_and_end_early(tmp_path):
    rows = read(tmp_path, "a.jsonl", lines({"a": "x" * 40}, {"a": "y", "b": 1}, {"b": 2}))
    assert rows.to_list() == [{"a": "x" * 40, "b": None}, {"a": "y", "b": 1}, {"a": None, "b": 2}]


def test_parts_of_a_split_share_their_types(tmp_path):
    pandas.DataFrame({"label": [1, 2]}).to_parquet("a.parquet")
    pandas.DataFrame({"label": [3.7]}).to_parquet("b.parquet")
    assert read_files([tmp_path / "a.parquet", tmp_path / "b.parquet"], "train")["label"] == [1.0, 2.0, 3.7]
    for name, content in (("a.csv", "label\n7\n"), ("b.csv", "label\n007\n")):
        (tmp_path / name).write_text(content)
    assert read_files([tmp_path / "a.csv", tmp_path / "b.csv"], "train")["label"] == ["7", "007"]


def test_parquet_keeps_the_names_of_its_classes(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_files([tmp_path / "a.parquet"], "train").features == features


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n'),
        ("a.json", b'\xef\xbb\xbf[{"a": 1}, {"a": 2}]'),
        ("a.csv", b"\xef\xbb\xbfa\n1\n2\n"),
        ("a.csv", b"a\r\n1\r\n2"),
        ("a.jsonl", b'\n{"a": 1}\n\n{"a": 2}'),
        ("a.jsonl", b'[{"a": 1},\n{"a": 2}]'),
    ],
)
def test_ways_to_write_the_same_rows(name, content, tmp_path):
    assert read(tmp_path, name, content).to_list() == [{"a": 1}, {"a": 2}]


def test_an_object_over_several_lines_is_one_row(tmp_path):
    content = {"version": "1", "data": [{"title": "x" * 40}]}
    assert read(tmp_path, "a.json", json.dumps(content, indent=1)).to_list() == [content]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"}\n{"a":\n', r"as json from .*line 2, column 6"),
        (
            "a.jsonl",
            '{"a": 1}\n{"a": 2}\n[3]\n',
            r"line 3 is '\[3\]', and no object with columns",
        ),
        ("a.json", "[1, 2]", "row 0, counted from 0, is '1', and no object"),
        ("a.json", '"x"', "it holds 'x', and no objects"),
        ("a.json", "[]", "it has no rows"),
        ("a.csv", "a,b\n", "it has no rows"),
        ("a.csv", "a,b\n1,2,3\n4,5,6\n", "row 0, counted from 0, has 3 instead of 2 cells"),
        ("a.csv", "a,b\n1,2\n3,4\n5,6\n7\n", "row 3, counted from 0, has 1 instead of 2 cells"),
        ("a.tsv", "a\tb\n1\t2\n\n3\t4\t\n", "row 1, counted from 0, has 3 instead of 2 cells"),
        (
            "a.csv",
            "a;b\n1;2\n3;4,5\n",
            "has 2 instead of 1 cells; the header 'a;b' seems to be separated by ';'",
        ),
        ("a.tsv", "a,b\n1,2\n3\t4\n", "the header 'a,b' seems to be separated by ',': .* by tabs in .tsv files"),
        ("a.csv", 'a,b\n1,2\n3,"4\n5,6\n', "row 1, counted from 0: unexpected end of data"),
        ("a.tsv", 'a\tb\n1\t2\n"A film" he saw\t4\n', "row 1, counted from 0: .* double each quote in it"),
        (
            "a.csv",
            b"a,b\n1,2\n3,4\n5,caf\xe9\n",
            r"row 2, counted from 0, in the column 'b' is not UTF-8 \(byte 0xe9\)",
        ),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "its header is not UTF-8"),
        ("a.csv", "a,b,a\n1,2,3\n", "its header names the column 'a' twice"),
        ("a.csv", "", "it is empty"),
        ("a.jsonl", b'{"a": 1}\n{"a": "caf\xe9"}\n', r"line 2 is not UTF-8 \(byte 0xe9\): save the file as UTF-8"),
        ("a.json", b'[{"a": 1},\n{"a": "caf\xe9"}]\n', "line 2 is not UTF-8"),
        (
            "a.jsonl",
            '{"a": 1}\n' * 3 + '{"a": ["\\ud83d"]}\n',
            "row 3, counted from 0, .* surrogate .* in the column 'a'",
        ),
        ("a.csv.gz", "a,b\n1,2\n", "as csv from .*incorrect header check"),
        ("a.jsonl.zst", b'{"a": 1}\n', "as json from .*Unknown frame"),
        ("a.csv.gz", gzip.compress(b"a,b\n1,2\n" * 99, mtime=0)[:-8], "Truncated compressed stream"),
    ],
)
def test_what_cannot_be_read_is_named(name, content, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        read(tmp_path, name, content)


# Names of files.

NAMES = ["train[1]", "[proj]/train", "a*/train?", "b::c/train::d", "e f/train", "{g}/train", "https:/train", "~h"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_very_file(name, ending, tmp_path):
    frames = {name: pandas.DataFrame({"text": ["mine"]})}
    others = ("train1", "p/train", "ax/trainx", "b/train")  # which the names match as patterns
    frames |= {other: pandas.DataFrame({"text": ["another's"] * 2}) for other in others}
    for stem, frame in frames.items():
        file = tmp_path / f"{stem}{ending}"
        file.parent.mkdir(exist_ok=True)
        if ending in (".csv", ".tsv"):
            frame.to_csv(file, index=False, sep="\t" if ending == ".tsv" else ",")
        elif ending == ".parquet":
            frame.to_parquet(file)
        else:
            frame.to_json(file, orient="records", lines=ending != ".json")
    for given in (f"{tmp_path}/{name}{ending}", f"./{name}{ending}"):
        readers = open_source(None, None, None, {"train": given}, ["train"])
        assert readers["train"]()["text"] == ["mine"]


@pytest.mark.parametrize("name", ["[p]roj", "a*", "b::c"])
def test_a_folder_of_the_hub_form_whose_name_is_a_pattern_is_refused(name, tmp_path):
    for folder in (name, "proj"):
        (tmp_path / folder / "data").mkdir(parents=True)
        (tmp_path / folder / "data" / "train-00000-of-00001.csv").write_text("text\na\n")
    with pytest.raises(UsageError, match=r"reads as a pattern, .* rename it, or name its files in data_files"):
        open_source(name, None, None, None, ["train"])


def test_a_list_of_files_is_read_one_after_another(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.csv").write_text(f"text\n{name}1\n{name}2\n")
    files = [str(tmp_path / "b.csv"), tmp_path / "a.csv"]
    readers = open_source(None, None, None, {"train": files}, ["train"])
    assert readers["train"]()["text"] == ["b1", "b2", "a1", "a2"]


@pytest.mark.parametrize("given", [[], 3, [["a.csv"]], None])
def test_what_is_no_list_of_files_is_refused(given):
    with pytest.raises(UsageError, match=r"each split a file or a list of files; the split 'train' has"):
        open_source(None, None, None, {"train": given}, ["train"])


def test_the_files_of_a_split_are_of_one_kind(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UsageError, match=r"the split 'train' must be of one kind; data_files has .*a\.csv.*a\.jsonl"):
        open_source(None, None, None, {"train": ["a.csv", "a.jsonl"]}, ["train"])


def test_of_several_files_the_one_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"te\n')
    with pytest.raises(UsageError, match=r"from [^,]*b\.jsonl \(line 2"):
        read_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], "train")


def test_a_parquet_file_with_a_damaged_page_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    pandas.DataFrame({"text": ["a film"] * 9}).to_parquet(file)
    content = bytearray(file.read_bytes())
    content[4:12] = b"\0" * 8  # the footer with the schema stays
    file.write_bytes(content)
    with pytest.raises(UsageError, match=r"cannot be read as parquet from .*a\.parquet"):
        read_files([file], "train")
    assert not list((tmp_path / "cache" / "lit_sparse").iterdir())


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path, monkeypatch):
    first = read(tmp_path, "a.csv", "text\na\n")
    monkeypatch.setattr(tables, "texts_of", None)  # the file is not opened
    assert read_files([tmp_path / "a.csv"], "train")._fingerprint == first._fingerprint
    monkeypatch.undo()
    assert read(tmp_path, "a.csv", "text\nbb\n")["text"] == ["bb"]


def test_the_column_that_one_of_several_files_lacks_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,b\n")
    (tmp_path / "b.csv").write_text("text\na\n")
    with pytest.raises(UsageError, match=r"b\.csv \(it lacks the column 'label', which another file of the split has"):
        read_files([tmp_path / "a.csv", tmp_path / "b.csv"], "train")


def test_a_cell_may_be_longer_than_pythons_limit(tmp_path):
    assert read(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n")["text"] == ["x" * 200_000]


def test_columns_without_a_name_and_blank_lines_are_no_mistake(tmp_path):
    rows = read(tmp_path, "a.csv", ",text,\n0,a film,\n\n   \n1,a dog,\n")
    assert rows.to_list() == [
        {"Unnamed: 0": 0, "text": "a film", "Unnamed: 2": None},
        {"Unnamed: 0": 1, "text": "a dog", "Unnamed: 2": None},
    ]
