"""Files of rows that are broken, empty, or not what they are named."""

from pathlib import Path

import pandas
import pytest
from hostile import DATA, ROWS, Case, require_refused, run, whole, write_rows

TRAIN, VALIDATION = Path("data/train.csv"), Path("data/validation.csv")


def train(content: str | bytes):
    def prepare():
        TRAIN.write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def rows(train_rows=None, validation_rows=None, header=("text", "label")):
    def prepare():
        write_rows(TRAIN, ROWS * 8 if train_rows is None else train_rows, header)
        write_rows(VALIDATION, ROWS * 4 if validation_rows is None else validation_rows, header)

    return prepare


def instead(name: str, content: str | bytes):
    """A training file of another name and kind, and a validation file of the same kind that is right."""

    def prepare():
        TRAIN.unlink()
        VALIDATION.unlink()
        kind = Path(name).suffix
        Path("data", name).write_bytes(content.encode() if isinstance(content, str) else content)
        frame = pandas.DataFrame(ROWS * 4, columns=["text", "label"])
        if kind == ".parquet":
            frame.to_parquet("data/validation.parquet")
        else:
            frame.to_json(f"data/validation{kind}", orient="records", lines=kind == ".jsonl")

    return prepare


def replaced_by_folder():
    TRAIN.unlink()
    TRAIN.mkdir()


def link_to_itself():
    TRAIN.unlink()
    TRAIN.symlink_to("train.csv")


def truncated_parquet() -> bytes:
    pandas.DataFrame(ROWS * 8, columns=["text", "label"]).to_parquet("whole.parquet")
    content = Path("whole.parquet").read_bytes()
    Path("whole.parquet").unlink()
    return content[: len(content) // 2]


NUMBERS = [(text, number) for (text, _), number in zip(ROWS * 8, range(16), strict=True)]
REGRESSION = [f"{DATA}regression", "true"]
GOOD = "text,label\n" + "a good film,yes\na bad film,no\n" * 8

LABELLED = '{"text": ?, "label": "yes"}\n{"text": ?, "label": "no"}\n' * 4
COLUMNS = ("text", "label", "year")

REFUSED = [
    Case("an empty file", [], "train", train("")),
    Case("a header and no row", [], "empty", train("text,label\n")),
    Case("one blank line", [], "train", train("\n")),
    Case("NUL bytes alone", [], "train", train(b"\0" * 4096)),
    Case("rows in UTF-16", [], "UTF-8", train(GOOD.encode("utf-16"))),
    Case("rows in Latin-1", [], "UTF-8", train("text,label\nun café,yes\nun thé,no\n".encode("latin-1"))),
    Case("a picture named .csv", [], "train", train(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4)),
    Case("a row with too many columns", [], "row 16, ", train(GOOD + "a film,yes,and,more\n")),
    Case("a row with too few columns", [], "row 16, ", train(GOOD + "a film\n")),
    Case("a quote within a quoted text", [], "row 16, ", train(GOOD + '"a "good" film",yes\n')),
    Case("a quote that is never closed", [], "train", train(GOOD + '"a film,yes\n')),
    Case("no column of texts", [], "'text'", rows(header=("sentence", "label"))),
    Case("no column of labels", [], "'label'", rows(header=("text", "class"))),
    Case("no header", [], "its columns are ['a good film', 'yes']", train("a good film,yes\na bad film,no\n" * 8)),
    Case("a header with a space", [], "'label'", train(GOOD.replace("text,label", "text, label"))),
    Case("two columns of one name", [], "'text' twice", train("text,text\n" + "a,b\n" * 8)),
    Case("semicolons", [], "'text;label' seems to be separated by ';'", train(GOOD.replace(",", ";"))),
    Case("empty labels", [], "label", rows([("a film", "")] * 4 + ROWS * 4)),
    Case("texts that are numbers", [], "has no text in the column", rows([(1, "yes"), (2, "no")] * 4, [(3, "yes")])),
    Case("empty texts", [], "text", rows([("", "yes")] * 4 + ROWS * 4)),
    Case("a single class", [], "class", rows([("a film", "yes")] * 8, [("a film", "yes")] * 8)),
    Case("a label that only validation has", [], "maybe", rows(None, [("a film", "maybe"), *ROWS])),
    Case("every row its own label", [], "label", rows([(f"film {i}", f"label {i}") for i in range(2000)])),
    Case("words as numbers", REGRESSION, "label", rows()),
    Case("a number that is none", REGRESSION, "label 'nan'", rows([*NUMBERS, ("a film", "nan")], NUMBERS)),
    Case("an infinite number", REGRESSION, "label", rows([*NUMBERS, ("a film", "inf")], NUMBERS)),
    Case("no validation file", [], "validation", lambda: VALIDATION.unlink()),
    Case("an empty validation file", [], "validation", lambda: VALIDATION.write_text("text,label\n")),
    Case("no training file", [], "train", lambda: TRAIN.unlink()),
    Case("a folder named train.csv", [], "train", replaced_by_folder),
    Case("a link to itself", [], "train", link_to_itself),
    Case("a file that is not there", [f"{DATA}path", "gone.csv"], "gone.csv"),
    Case("a data set of the hub, offline", [f"{DATA}path", "nobody/nothing"], "nobody/nothing"),
    Case("a program as data set", [f"{DATA}path", "rows.py"], "rows.py", lambda: Path("rows.py").write_text("x = 1\n")),
    Case("a path with a NUL byte", [f"{DATA}path", "da\0ta"], "data"),
    Case("a path above all", [f"{DATA}path", "/../../nowhere"], "nowhere"),
    Case("another file of the same split", [], "train", lambda: Path("data/train.jsonl").write_text('{"text": "x"}\n')),
    Case("a line of JSON that is cut", [], "train", instead("train.jsonl", '{"text": "a film", "label": "yes"}\n{"te')),
    Case("lines that are lists", [], "train", instead("train.jsonl", "[1, 2]\n" * 4)),
    Case("lines that are numbers", [], "train", instead("train.jsonl", "1\n2\n3\n")),
    Case("a row that is null", [], "line 9 is 'null'", instead("train.jsonl", LABELLED.replace("?", '"x"') + "null\n")),
    Case("a file that begins with null", [], "line 1", instead("train.json", 'null{"text": "x", "label": "yes"}\n')),
    Case(
        "JSON that is not in UTF-8", [], "UTF-8", instead("train.jsonl", b'{"text": "caf\xe9", "label": "yes"}\n' * 4)
    ),
    Case("JSON that is a sentence", [], "train", instead("train.json", '"a film"')),
    Case("nested texts", [], "text", instead("train.jsonl", LABELLED.replace("?", '{"a": 1}'))),
    Case("lists in the place of texts", [], "text", instead("train.jsonl", LABELLED.replace("?", '["a"]'))),
    Case("a parquet file cut in half", [], "train", lambda: instead("train.parquet", truncated_parquet())()),
    Case("text named .parquet", [], "train", instead("train.parquet", GOOD)),
    Case("a validation_fraction of 2", [f"{DATA}validation_fraction", "2"], "validation_fraction"),
    Case(
        "a tokenizer that is not there",
        [f"{DATA}tokenizer", "nobody/nothing"],
        "nobody/nothing",
    ),
    Case("a tokenizer from a folder without one", [f"{DATA}tokenizer", "data"], "data"),
]

HANDLED = [
    Case("a byte-order mark", [], "", train(b"\xef\xbb\xbf" + GOOD.encode())),
    Case("the ends of lines of Windows", [], "", train(GOOD.replace("\n", "\r\n"))),
    Case("no end of the last line", [], "", train(GOOD.rstrip("\n"))),
    Case("a line of a megabyte", [], "", rows([("very " * 200_000, "yes"), *(ROWS * 4)])),
    Case("emoji and other scripts", [], "", rows([("🎬 фильм 映画", "yes"), ("🎥 ταινία", "no")] * 4, None)),
    Case("commas, quotes and lines within texts", [], "", rows([('a "good", film\nin two lines', "yes"), *ROWS] * 4)),
    Case("one training row per class", [], "", rows(ROWS)),
    Case("spaces around labels", [], "", rows([("a film", " yes"), ("a bad film", " no")] * 4, [("a", " yes")])),
    Case("a column more", [], "", rows([(*row, 1) for row in ROWS * 4], [(*ROWS[0], 2)], COLUMNS)),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_it_is_refused(case):
    require_refused(case)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", HANDLED, ids=lambda case: case.what)
def test_it_is_read(case):
    case.prepare()
    ended = run(whole(case.words))
    assert ended.status == 0, ended.err
    assert Path("kept/last.ckpt").is_file()
