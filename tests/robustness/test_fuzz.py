"""Files and configurations with anything wrong in them: they are read, or refused in plain words; nothing else.

LIT_SPARSE_FUZZ=20 pytest -m "" tests/robustness/test_fuzz.py  tries twenty times as much, from another start each time.
"""

import contextlib
import os
import re
import shutil
import struct
from pathlib import Path

import pandas
import pytest
import torch
from hostile import ROWS, make_trained_project, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.editing.edits import load_edit
from lit_sparse.editing.requests import read_requests
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.reporting.sources import read_adapters

pytestmark = pytest.mark.filterwarnings("ignore")  # what is damaged may be warned of
LONGER = int(os.environ.get("LIT_SPARSE_FUZZ", "0"))
TOKENS = re.compile(rb'"[^"\n]*"|[\w.+-]+|[\[\]{}:,]')
ODD = [b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'""', b"true", b"0.5", b'"../x"', b"99999999999999999999"]
ODD += [b"\x00", b"\xff\xfe", b"!!python/object/apply:os.system [true]", b"&a [*a]", b"*b", b"- ", b"\t", b"[" * 2000]


def fuzz(examples: int):
    """So many examples, always the same ones unless more are asked for."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=examples * max(1, LONGER), deadline=None, derandomize=not LONGER, database=None,
        suppress_health_check=quiet,
    )  # fmt: skip


@st.composite
def damages(draw, least: int = 1):
    """What to do to a file, without knowing it: places are shares of its length."""
    place = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "token", "token", "token"])
    one = st.tuples(kinds, place, place, st.sampled_from(ODD) | st.binary(min_size=1, max_size=8))
    return draw(st.lists(one, min_size=least, max_size=3))


def damaged(content: bytes, done) -> bytes:
    for kind, share, other, word in done:
        place = int(share * len(content))
        end = min(len(content), place + 1 + int(other * 64))
        tokens = [match.span() for match in TOKENS.finditer(content)] if kind == "token" else []
        if kind == "flip" and content:
            content = content[:place] + bytes([content[place] ^ (1 << int(other * 8))]) + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "drop":
            content = content[:place] + content[end:]
        elif kind == "insert":
            content = content[:place] + word + content[place:]
        elif kind == "repeat":
            content = content[:end] + content[place:]
        elif tokens:
            begin, end = tokens[int(share * len(tokens))]
            content = content[:begin] + word + content[end:]
    return content


def damaged_tensors(content: bytes, header, body) -> bytes:
    """A file of safetensors: its header as text, of the length that it then has, and its numbers."""
    size = struct.unpack("<Q", content[:8])[0]
    text = damaged(content[8 : 8 + size], header)
    return damaged(struct.pack("<Q", len(text)) + text, []) + damaged(content[8 + size :], body)


def read_or_refuse(read) -> None:
    with contextlib.suppress(ls.UsageError, ls.TrainingError):
        read()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_trained_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def backbone(project):
    return AutoModelForSequenceClassification.from_pretrained(project / "bert", num_labels=2)


@pytest.mark.slow
@fuzz(150)
@given(done=damages())
def test_checkpoints(done, tmp_path):
    Path("fuzzed.ckpt").write_bytes(damaged((tmp_path / "kept" / "last.ckpt").read_bytes(), done))
    read_or_refuse(lambda: checkpoints.load("fuzzed.ckpt"))
    read_or_refuse(lambda: read_adapters("fuzzed.ckpt"))


LOADERS = {"peft": ls.load_peft, "sparse": ls.load_adapter, "delta": ls.load_adapter}


@pytest.mark.slow
@pytest.mark.parametrize("form", LOADERS)
@fuzz(100)
@given(json=damages(0), header=damages(0), body=damages(0))
def test_folders_of_adapters(form, json, header, body, tmp_path, backbone):
    whole = {name: value.clone() for name, value in backbone.state_dict().items()}
    folder = Path("fuzzed")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tmp_path / form, folder)
    for file in folder.glob("*.json"):
        file.write_bytes(damaged(file.read_bytes(), json))
    for file in folder.glob("*.safetensors"):
        file.write_bytes(damaged_tensors(file.read_bytes(), header, body))
    read_or_refuse(lambda: read_adapters(folder))
    model = AutoModelForSequenceClassification.from_config(backbone.config)
    model.load_state_dict(whole)
    try:
        LOADERS[form](model, folder)
    except ls.UsageError:
        assert not list(ls.adapters_in(model)), "refused, and left adapters in the model"
        assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items()), "half loaded"


@pytest.mark.slow
@fuzz(150)
@given(header=damages(0), body=damages(0))
def test_edits(header, body, tmp_path):
    content = (tmp_path / "an.edit.safetensors").read_bytes()
    Path("fuzzed.safetensors").write_bytes(damaged_tensors(content, header, body))
    read_or_refuse(lambda: load_edit("fuzzed.safetensors"))


@fuzz(150)
@given(done=damages())
def test_edit_requests(done, tmp_path):
    Path("fuzzed.json").write_bytes(damaged((tmp_path / "requests.json").read_bytes(), done))
    read_or_refuse(lambda: read_requests("fuzzed.json"))


def rows_as(form: str) -> bytes:
    frame = pandas.DataFrame(ROWS * 4, columns=["text", "label"])
    file = Path(f"rows.{form}")
    if form == "parquet":
        frame.to_parquet(file)
    elif form == "csv":
        frame.to_csv(file, index=False)
    else:
        frame.to_json(file, orient="records", lines=True)
    return file.read_bytes()


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet"])
@fuzz(15)
@given(done=damages())
def test_tables_of_rows(form, done, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")  # data sets are cached by the names of their files
    whole = rows_as(form)
    (folder / f"validation.{form}").write_bytes(whole)
    (folder / f"train.{form}").write_bytes(damaged(whole, done))
    files = {split: str(folder / f"{split}.{form}") for split in ("train", "validation")}

    def read():
        data = ls.TextClassificationData(data_files=files, tokenizer="bert", batch_size=4)
        data.prepare_data()
        data.setup("fit")
        next(iter(data.train_dataloader()))

    read_or_refuse(read)


def test_a_configuration_that_holds_itself(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text("trainer:\n  callbacks: &a [*a]\n")
    ended = run(["fit", "--config", "own.yaml", "--print_config"])
    assert ended.err == "error: own.yaml has a value that is part of itself, or is nested too deeply.\n"


@pytest.mark.slow
@fuzz(40)
@given(done=damages())
def test_configurations(done, tmp_path):
    Path("fuzzed.yaml").write_bytes(damaged((tmp_path / "config.yaml").read_bytes(), done))
    ended = run(["fit", "--config", "fuzzed.yaml", "--print_config"])
    assert ended.status in (0, 1, 2)
    if ended.status:
        errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, ended.err
        assert ended.err.endswith(errors[0] + "\n")
        assert "Traceback" not in ended.err
