"""``lit-sparse init``: rows in, a configuration out that trains as it is."""

import csv
import json
import os
import pty
import sys
from pathlib import Path

import programs
import pytest
import yaml
from backbones import save_tiny_bert, save_tiny_llama, save_tiny_t5
from chat_templates import CHATML
from transformers import AutoTokenizer

from lit_sparse.cli.main import main

CLASSES = [{"review": f"a {('good', 'bad')[i % 2]} film {i}", "stars": i % 2} for i in range(40)]
TURNS = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a dog"}]
ANSWER = {"text": ["dog"], "answer_start": [2]}
# Backbone, rows, and what is expected: module, task-specific arguments of the data, monitored metric.
CASES = {
    "classes": ("bert", CLASSES, "SequenceClassification", {"text": "review", "label": "stars"}, "val_accuracy"),
    "names": (
        "bert",
        [{"id": f"row {i}", "premise": "it is", "hypothesis": "it was", "label": "ab"[i % 2]} for i in range(40)],
        "SequenceClassification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
        "val_accuracy",
    ),
    "numbers": (
        "bert",
        [{"text": f"film {i}", "score": i / 8} for i in range(40)],
        "SequenceClassification",
        {"text": "text", "label": "score", "regression": True},
        "val_pearson",
    ),
    "tags": (
        "bert",
        [{"tokens": ["a", "dog"], "ner_tags": ["O", "B-DOG"]}] * 40,
        "TokenClassification",
        {},
        "val_f1",
    ),
    "spans": (
        "bert",
        [{"id": str(i), "question": "what", "context": "a dog", "answers": ANSWER} for i in range(40)],
        "QuestionAnswering",
        {},
        "val_f1",
    ),
    "choices": (
        "bert",
        [{"question": "what", "choices": ["a dog", "a cat"], "label": i % 2} for i in range(40)],
        "MultipleChoice",
        {},
        "val_accuracy",
    ),
    "texts": ("bert", [{"text": f"a film {i}"} for i in range(40)], "MaskedLM", {}, "val_loss"),
    "chats": ("chat", [{"messages": TURNS}] * 40, "CausalLM", {}, "val_loss"),
    "alpaca of a chat model": (
        "chat",
        [{"instruction": "what is it", "input": "", "output": "a dog"}] * 40,
        "CausalLM",
        {},
        "val_loss",
    ),
    "alpaca": (
        "llama",
        [{"instruction": "what is it", "input": "", "output": "a dog"}] * 40,
        "CausalLM",
        {},
        "val_loss",
    ),
    "pairs": (
        "llama",
        [{"prompt": "what", "chosen": "a dog", "rejected": "a cat"}] * 40,
        "PreferenceLM",
        {},
        "val_reward_accuracy",
    ),
    "numbered": (
        "bert",
        [{"Unnamed: 0": i, "GUID": f"a name longer than texts {i}", **row} for i, row in enumerate(CLASSES)],
        "SequenceClassification",
        {"text": "review", "label": "stars"},
        "val_accuracy",
    ),
    "answers": (
        "llama",
        [{"id": i, "question": f"what is it {i}", "answer": f"a dog {i}"} for i in range(40)],
        "CausalLM",
        {"template": "Question: {question}\nAnswer: ", "response": "answer"},
        "val_loss",
    ),
    "seq2seq": ("t5", [{"source": "a dog", "target": "a cat"}] * 40, "Seq2SeqLM", {}, "val_loss"),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backbones")
    for name, save in {
        "bert": save_tiny_bert,
        "llama": save_tiny_llama,
        "chat": save_tiny_llama,
        "t5": save_tiny_t5,
    }.items():
        save(folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / "chat")
    return folder


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])


def write(name, rows):
    Path(name).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return name


@pytest.mark.parametrize("case", CASES)
def test_the_columns_say_what_the_task_is(case, backbones, capsys):
    backbone, rows, module, arguments, monitored = CASES[case]
    write("my rows.jsonl", rows)
    main(["init", "--data", "my rows.jsonl", "--backbone", str(backbones / backbone), "--budget", "0.5"])
    assert capsys.readouterr().out.endswith("To train:  lit-sparse fit --config config.yaml\n")
    written = yaml.safe_load(Path("config.yaml").read_text())
    assert written["model"]["class_path"] == f"lit_sparse.{module}"
    assert next(iter(written["model"]["init_args"])) == "method"
    assert written["model"]["init_args"]["method"]["init_args"]["budget"] == 0.5
    assert written["model"]["init_args"]["backbone"] == str(backbones / backbone)
    expected = {"path": "my rows.jsonl", **arguments, "validation_fraction": 0.1, "batch_size": 8}
    assert written["data"]["init_args"] == expected
    assert written["trainer"]["max_epochs"] == 20  # of 5 steps
    assert written["trainer"]["callbacks"][0]["init_args"]["monitor"] == monitored
    assert "quickstart" not in Path("config.yaml").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_fit_runs_the_configuration_as_it_is(case, backbones, capsys):
    backbone, rows, module, *_ = CASES[case]
    write("rows.jsonl", rows)
    main(["init", "--data", "rows.jsonl", "--backbone", str(backbones / backbone), "--output", "mine.yaml"])
    # The tiny encoder has 64 positions, fewer than the stride of windows.
    shorter = ["--data.init_args.stride", "8"] if case == "spans" else []
    main(["fit", "--config", "mine.yaml", "--trainer.accelerator", "cpu", *shorter])
    last = "runs/mine/version_0/checkpoints/last.ckpt"
    assert Path(last).is_file()
    # Only a model that continues texts can be talked with.
    assert (f"  lit-sparse chat {last}\n" in capsys.readouterr().out) == (module in ("CausalLM", "PreferenceLM"))


@pytest.mark.parametrize("validation", ["validation", "valid", "val", "dev"])
def test_a_folder_with_a_validation_split_holds_no_rows_out(validation, backbones):
    for split in ("train", validation):
        with Path(f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *[[f"a film {i}", "ab"[i % 2]] for i in range(8)]])
    main(["init", "--data", ".", "--backbone", str(backbones / "bert"), "--task", "masked-lm"])
    written = yaml.safe_load(Path("config.yaml").read_text())
    assert written["data"] == {"class_path": "lit_sparse.MaskedLMData", "init_args": {"path": ".", "batch_size": 8}}


@pytest.mark.parametrize(
    ("count", "batch_size", "epochs"), [(3, 8, 20), (160, 8, 6), (320, 8, 3), (1279, 8, 3), (1280, None, 3)]
)
def test_few_rows_are_repeated_until_adapters_can_learn(count, batch_size, epochs, backbones):
    Path("rows").mkdir()
    write("rows/dev.jsonl", CLASSES)
    write("rows/train.jsonl", [CLASSES[i % 40] for i in range(count)])
    main(["init", "--data", "rows", "--backbone", str(backbones / "bert"), "--task", "classification"])
    written = yaml.safe_load(Path("config.yaml").read_text())
    assert (written["data"]["init_args"].get("batch_size"), written["trainer"]["max_epochs"]) == (batch_size, epochs)
    steps = epochs * -(-count // 8)
    assert (f"# {steps} steps: {count} rows in batches of 8. " in Path("config.yaml").read_text()) == bool(batch_size)


def test_commands_quote_paths(backbones, capsys):
    write("rows.jsonl", CLASSES)
    main(["init", "--data", "rows.jsonl", "--backbone", str(backbones / "bert"), "--output", "o a.yaml"])
    assert capsys.readouterr().out.endswith("lit-sparse fit --config 'o a.yaml'\n")
    assert "# Run:      lightning fit --config 'o a.yaml'\n" in Path("o a.yaml").read_text()


def test_sentences_of_conll_are_recognised_by_their_file(backbones):
    Path("train.conll").write_text("a O\ndog B-DOG\n\na O\ncat B-CAT\n")
    Path("train.txt").write_text("-DOCSTART- -X-\n\na O\ndog B-DOG\n\na O\ncat B-CAT\n")
    for file in ("train.conll", "train.txt"):
        Path("config.yaml").unlink(missing_ok=True)
        main(["init", "--data", file, "--backbone", str(backbones / "bert")])
        assert (
            yaml.safe_load(Path("config.yaml").read_text())["data"]["class_path"]
            == "lit_sparse.TokenClassificationData"
        )


@pytest.mark.parametrize(
    ("rows", "options", "expected"),
    [
        ([{"a": "x", "b": "y", "c": "z"}], [], "The columns ['a', 'b', 'c'] are those of no task that is known. "),
        (
            [{"a": "film", "b": "bad"}, {"a": "dog", "b": "good"}],
            [],
            "one whose values repeat, at most half as many as rows)",
        ),
        (
            [{"review;verdict": "a film;good"}],
            [],
            "The rows have one column; the header 'review;verdict' seems to be separated by ';'",
        ),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], [], "preferences needs a model that writes texts, and "),
        (CLASSES, ["--data", "plain.txt"], "'plain.txt' seems to hold plain text, and a .txt file has a word and its"),
        (CLASSES, ["--data", "words.txt"], "'words.txt' seems to hold plain text, and a .txt file has a word and its"),
        (CLASSES, ["--task", "seq2seq"], "seq2seq needs the columns ['source', 'target'], and the rows have "),
        (CLASSES, ["--budget", "much"], "budget must be a share"),
        (CLASSES, ["--data", "absent.csv"], "The path 'absent.csv' does not exist"),
        (CLASSES, ["--backbone", "absent/model"], "The tokenizer 'absent/model' could not be loaded"),
        (CLASSES, ["--output", "rows.jsonl"], "'rows.jsonl' exists: give another file as output."),
        (CLASSES, ["--output", "no/folder.yaml"], "'no/folder.yaml' cannot be written: No such file or directory."),
        ([{"messages": TURNS}], [], "has no chat template: name a chat model."),
    ],
)
def test_what_cannot_be_is_said_in_one_line(rows, options, expected, backbones, capsys):
    write("rows.jsonl", rows)
    Path("plain.txt").write_text("the bed creaked\nat every move\n\nit was a long night\n")
    Path("words.txt").write_text("bed\nmove\n")
    with pytest.raises(SystemExit, match="1"):
        main(["init", "--data", "rows.jsonl", "--backbone", str(backbones / "bert"), *options])
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert expected in error
    assert not Path("config.yaml").exists()


@pytest.mark.slow
def test_what_is_missing_is_asked_on_a_terminal_only(backbones, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["init"])
    assert capsys.readouterr().err == "error: data is missing: give --data.\n"
    write("rows.jsonl", CLASSES)
    ours, theirs = pty.openpty()
    process = programs.Program(["-m", "lit_sparse", "init"], stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, f"rows.jsonl\n{backbones / 'bert'}\n".encode())
    assert process.wait(60) == 0
    assert "Pretrained model, a hub id or a folder: " in os.read(ours, 65536).decode()
    os.close(ours)
    assert yaml.safe_load(Path("config.yaml").read_text())["data"]["init_args"]["path"] == "rows.jsonl"


def test_a_misspelt_task_suggests_the_near_one(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["init", "--data", "rows.jsonl", "--backbone", "bert", "--task", "clasification"])
    assert "'masked-lm' Given value: clasification. Did you mean 'classification' or " in capsys.readouterr().err
