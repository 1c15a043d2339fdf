"""Bad input, and what the command line says to it: what the files in tests/robustness share."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import yaml
from backbones import save_tiny_bert, save_tiny_llama

import lit_sparse as ls
from lit_sparse.cli.main import main

METHOD = "--model.init_args.method.init_args."
DATA = "--data.init_args."
MODEL = "--model.init_args."
PAGE = Path(__file__).parents[1] / "docs" / "robustness.md"
LONGEST = 240  # characters of a message in the table
BEGIN, END = "<!-- generated: begin -->", "<!-- generated: end -->"
ROWS = [("a good film", "yes"), ("a bad film", "no")]


class Case(NamedTuple):
    """Something wrong, and a part of the line in which it is refused.

    Args:
        what: In words.
        words: What the command line is given after ``fit --config config.yaml``, or all of it where it begins with
            another command.
        says: A part of the message.
        prepare: Makes the bad thing in the folder of the test, in which there are ``config.yaml``, ``data`` with
            train.csv and validation.csv, and ``bert``.
    """

    what: str
    words: list[str]
    says: str
    prepare: Callable[[], Any] = lambda: None


class Ended(NamedTuple):
    status: int | str | None
    out: str
    err: str


def make_project(folder: Path) -> Path:
    """What a user has: a backbone, rows, a configuration."""
    save_tiny_bert(folder / "bert")
    save_tiny_llama(folder / "llama")
    (folder / "data").mkdir()
    write_rows(folder / "data" / "train.csv", ROWS * 8)
    write_rows(folder / "data" / "validation.csv", ROWS * 4)
    method = {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 2, "sparsity_weight": 1.0}}
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    settings = {"backbone": "bert", "method": method, "optimizer": adamw}
    kept = {"dirpath": "kept", "filename": "last"}
    config = {
        "model": {"class_path": "lit_sparse.SequenceClassification", "init_args": settings},
        "data": {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": "data", "batch_size": 8}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def make_trained_project(folder: Path) -> Path:
    """That, with a trained checkpoint and every kind of file that is made of it."""
    make_project(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        _train_and_export()
    finally:
        os.chdir(before)
    return folder


def _train_and_export() -> None:
    assert run(whole([])).status == 0
    for form in ("peft", "sparse", "delta"):
        words = ["export", "--ckpt_path", "kept/last.ckpt", "--format", form, "--output", form]
        assert run(words).status == 0
    requests = [{"prompt": "the cat is", "target_new": "a dog", "subject": "cat"}]
    Path("requests.json").write_text(json.dumps(requests))
    method = ls.RoseLoRA(["v_proj"], rank=2, density=0.2, begin=0, end=1)
    editor = ls.Editor("llama", method, "edits-run", steps=2, save_edits=True, fluency_tokens=0, generated_tokens=0)
    trainer = L.Trainer(accelerator="cpu", inference_mode=False, logger=False, enable_progress_bar=False)
    trainer.test(editor, ls.EditingData("requests.json"), verbose=False)
    shutil.copy("edits-run/edits/000000.safetensors", "an.edit.safetensors")
    shutil.rmtree("edits-run")


def write_rows(file: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("text", "label")) -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([header, *rows])


def enter(project: Path, folder: Path) -> None:
    """Lay a copy of the project into the folder of a test."""
    shutil.copytree(project, folder, dirs_exist_ok=True)


def run(words: list[str]) -> Ended:
    """The command line in this process. Anything but an exit is an error of ours, and comes out as it is."""
    out, err = io.StringIO(), io.StringIO()
    before = list(sys.path)
    status: int | str | None = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(words)
    except SystemExit as ended:
        status = ended.code
    finally:
        sys.path[:] = before
    return Ended(status, out.getvalue(), err.getvalue())


COMMANDS = {"fit", "validate", "test", "predict", "inspect", "export", "merge", "edit"}


def whole(words: list[str]) -> list[str]:
    return words if words and words[0] in COMMANDS else ["fit", "--config", "config.yaml", *words]


def require_refused(case: Case) -> None:
    """Run a case; it must end in one line with ``says`` in it, and leave no checkpoint or output."""
    case.prepare()
    before = everything()
    ended = run(whole(case.words))
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert ended.status in (1, 2), (ended.status, ended.out, ended.err)
    assert len(lines) == 1, ended.err
    assert ended.err.endswith(lines[0] + "\n"), ended.err
    assert "Traceback" not in ended.err
    assert case.says in lines[0], lines[0]
    left = everything()
    assert not {name for name in left - before if not re.match(r"(runs\b|lightning_logs\b|run_config\.yaml)", name)}, (
        left - before
    )
    assert before <= left
    if "LIT_SPARSE_HOSTILE_TABLE" not in os.environ:
        assert f"| {case.what} |" in PAGE.read_text(encoding="utf-8"), "write the table anew, as the page says"
    else:
        with Path(os.environ["LIT_SPARSE_HOSTILE_TABLE"]).open("a", encoding="utf-8") as stream:
            message = lines[0].removeprefix("error: ").replace(f"{Path.cwd()}/", "")
            stream.write(json.dumps([case.what, message]) + "\n")


def everything() -> set[str]:
    """Names of all files below the folder of the test."""
    return {str(path) for path in Path().rglob("*") if path.is_file() and "__pycache__" not in path.parts}


def table(file: Path) -> str:
    """The rows of docs/robustness.md from what the tests wrote, in the order of their cases."""
    lines = ["| what is wrong | what is said |", "|---|---|"]
    for line in sorted(set(file.read_text(encoding="utf-8").splitlines())):
        what, message = json.loads(line)
        message = message if len(message) <= LONGEST else f"{message[:LONGEST]}…"
        shown = re.sub(r"[\x00-\x1f]", "·", message).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
        lines.append(f"| {what} | {shown} |")
    return "\n".join(lines)


# What makes files bad, given to a case as its ``prepare``.


class Evil:
    """What a pickle runs when it is read."""

    def __reduce__(self):
        return os.mkdir, ("pickle-was-run",)


def cut(file: str, share: float = 0.5):
    def prepare():
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: int(len(content) * share)])

    return prepare


def flipped(file: str, at: float):
    """A bit of a byte, at a share of the file, is another."""

    def prepare():
        content = bytearray(Path(file).read_bytes())
        content[int(len(content) * at)] ^= 0x40
        Path(file).write_bytes(bytes(content))

    return prepare


def replaced(file: str, content: bytes | str):
    def prepare():
        Path(file).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def evil(file: str):
    def prepare():
        torch.save({"state_dict": {}, "x": Evil()}, file)

    return prepare


def plain_pickle(file: str):
    def prepare():
        Path(file).write_bytes(pickle.dumps({"state_dict": {}, "x": Evil()}))

    return prepare


def settings(file: str, change):
    def prepare():
        content = json.loads(Path(file).read_text())
        change(content)
        Path(file).write_text(json.dumps(content))

    return prepare


def huge_header(file: str):
    return replaced(file, struct.pack("<Q", 1 << 60) + b"{}")


if __name__ == "__main__":
    page = Path(sys.argv[2])
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{table(Path(sys.argv[1]))}\n{END}{rest.split(END)[1]}", encoding="utf-8")
