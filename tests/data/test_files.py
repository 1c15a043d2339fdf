"""lit_sparse.data.files and readers: how files are written, patterns of names, and the file and number of a row."""

import csv
import io
import json

import hypothesis
import pandas
import pyarrow
import pytest
from hypothesis import strategies as st

from lit_sparse import UsageError
from lit_sparse.data.readers import Place
from lit_sparse.data.sources import open_source
from lit_sparse.data.tables import ENDINGS, count_rows, read_files


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def written(end, names, rows):
    """The rows as the content of a file, by Python's own writers."""
    text = io.StringIO()
    objects = [dict(zip(names, row, strict=True)) for row in rows]
    if end in (".csv", ".tsv"):
        quoting = csv.QUOTE_ALL if len(names) == 1 else csv.QUOTE_MINIMAL
        csv.writer(text, delimiter="\t" if end == ".tsv" else ",", quoting=quoting).writerows([names, *rows])
    elif end == ".json":
        json.dump(objects, text)
    else:
        text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in objects)
    return text.getvalue().encode()


def compressed(content, ending):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, {".gz": "gzip", ".zst": "zstd"}[ending]) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


# Ways to write rows.

# A byte-order mark at the start of a file is none of its text.
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\ufeff"), max_size=8)


@st.composite
def tables_of_texts(draw):
    """A header and rows of as many texts; the first row has letters, so that no column is of numbers."""
    names = draw(st.lists(CELLS.filter(bool), min_size=1, max_size=3, unique=True))
    rows = draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=5))
    return names, [["a" for _ in names], *rows]


@pytest.mark.parametrize("end", [".csv", ".tsv", ".json", ".jsonl"])
@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(table=tables_of_texts())
def test_a_table_of_texts_is_read_as_it_was_written(end, table, tmp_path_factory):
    names, rows = table
    file = tmp_path_factory.mktemp("rows") / f"a{end}"
    file.write_bytes(written(end, names, rows))
    found = read_files([file], "train")
    empty = None if end in (".csv", ".tsv") else ""  # CSV has no other way to write that a cell is missing
    assert found.column_names == names
    assert found.to_list() == [{n: cell or empty for n, cell in zip(names, row, strict=True)} for row in rows]


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("end", [".csv", ".tsv", ".json", ".jsonl", ".ndjson"])
def test_endings_in_either_case_say_how_a_file_is_written(end, compression, tmp_path):
    names, rows = ["text", "label"], [['a film,\twith "it"\n', "007"], ["a dog", "7"], ["a cat", "8"]]
    content = written(end, names, rows)
    if compression:  # of two parts, as tools that append write it
        content = b"".join(compressed(part, compression) for part in (content[:9], content[9:]))
    for name in (f"train{end}{compression}", f"train{end.upper()}{compression.upper()}"):
        (tmp_path / name).write_bytes(content)
        expected = [dict(zip(names, row, strict=True)) for row in rows]
        assert opened(name)().to_list() == expected
        # It is also found as the file of its split.
        assert open_source(str(tmp_path), None, None, None, ["train"])["train"]().to_list() == expected
        (tmp_path / name).unlink()


@pytest.mark.parametrize("ending", ENDINGS)
def test_rows_of_every_kind_are_counted(ending, tmp_path):
    file = tmp_path / f"a{ending}"
    if ending == ".parquet":
        pandas.DataFrame({"text": ["a", "b", "c"]}).to_parquet(file)
    else:
        file.write_bytes(written(ending, ["text"], [["a"], ["b"], ["c"]]))
    assert count_rows(file) == 3


# Patterns of names.


@pytest.fixture
def parts(tmp_path):
    """Files for a split, written in another order than that of their names."""
    for name, rows in (("b", "3"), ("a", "12"), ("c", "45")):
        (tmp_path / "parts" / name).mkdir(parents=True)
        (tmp_path / f"parts/part-{name}.csv").write_text("text\n" + "".join(f"{name}{row}\n" for row in rows))
        (tmp_path / f"parts/{name}/deep.csv").write_text(f"text\n{name}\n")
    return tmp_path / "parts"


def opened(given):
    return open_source(None, None, None, {"train": given}, ["train"])["train"]


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ("parts/part-*.csv", "a1 a2 b3 c4 c5"),
        ("parts/*", "a1 a2 b3 c4 c5"),  # folders are no files
        ("parts/part-[ac].csv", "a1 a2 c4 c5"),
        ("parts/**/deep.csv", "a b c"),
        (["parts/part-c.csv", "parts/part-[ab].csv"], "c4 c5 a1 a2 b3"),
    ],
)
def test_the_files_of_a_pattern_are_read_in_the_order_of_their_names(given, texts, parts):
    assert opened(given)()["text"] == texts.split()
    if isinstance(given, str):
        assert opened(f"{parts.parent}/{given}")()["text"] == texts.split()


def test_a_pattern_that_is_the_name_of_a_file_is_that_file(parts):
    (parts / "part-*.csv").write_text("text\nmine\n")
    assert opened("parts/part-*.csv")()["text"] == ["mine"]


def test_a_pattern_without_a_file_is_named(parts):
    with pytest.raises(UsageError, match=r"the split 'train' the pattern 'parts/\*\.tsv', which no file matches"):
        opened(["parts/part-a.csv", "parts/*.tsv"])
    with pytest.raises(UsageError, match=r"'parts/\*\.csv' does not exist: give a pattern .* in data_files"):
        open_source("parts/*.csv", None, None, None, ["train"])


def test_a_file_that_is_given_twice_is_named(parts):
    with pytest.raises(UsageError, match=r"'train' the file parts/part-a\.csv more than once"):
        opened(["parts/part-a.csv", "parts/*.csv"])


# The file and number of a row.


def test_a_row_is_named_by_its_file_and_its_number_in_it(parts):
    reader = opened("parts/part-*.csv")
    places = [str(Place("train", number, 5, reader)) for number in range(5)]
    expected = [("a", 0), ("a", 1), ("b", 0), ("c", 0), ("c", 1)]
    assert places == [
        f"Row {row} (counted from 0 in parts/part-{name}.csv) of the split 'train'" for name, row in expected
    ]
    # Rows that are not those of the files, such as the questions in SQuAD's own files.
    assert str(Place("train", 1, 6, reader)) == "Row 1 (counted from 0) of the split 'train'"


@pytest.mark.parametrize("ending", ENDINGS)
def test_of_several_files_some_may_have_no_rows(ending, tmp_path):
    for name, rows in (("a", []), ("b", [["x"], ["y"]]), ("c", []), ("d", [["z"]])):
        file = tmp_path / f"{name}{ending}"
        if ending == ".parquet":
            pandas.DataFrame({"text": [row[0] for row in rows]}, dtype="string").to_parquet(file)
        else:
            file.write_bytes(written(ending, ["text"], rows))
    reader = opened(f"*{ending}")
    assert reader()["text"] == ["x", "y", "z"]
    assert str(Place("train", 2, 3, reader)) == f"Row 0 (counted from 0 in d{ending}) of the split 'train'"
    with pytest.raises(UsageError, match=rf"'train' is empty .* from a\{ending} \(it has no rows\)"):
        opened([f"a{ending}", f"c{ending}"])()
