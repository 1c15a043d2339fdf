"""``lit-sparse evaluate``: a model's metrics by lm-eval, from every place where it is stored."""

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import programs
import pytest
import torch
from backbones import save_tiny_llama
from language_models import FORMS, TEMPLATE, save_language_model
from lightning.pytorch import Trainer
from trained import save_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.serving.benchmarks import Settings, evaluate
from lit_sparse.serving.language_models import open_language_model

INSTALLED = importlib.util.find_spec("lm_eval") is not None
_skip = pytest.mark.skipif(not INSTALLED, reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:::(lm_eval|evaluate|nltk|sacrebleu)", "ignore:.*DataPropertyMatrix")


def needs_lm_eval(test):
    """lm-eval reads thousands of files for its index of tasks."""
    return pytest.mark.slow(_skip(test))


CHOICES = [" dog", " warm house", " river"]
QUESTIONS = [f"the {a} {b} a" for a in ("man", "woman", "tree", "city") for b in ("saw", "has", "likes")]
ROWS = [{"question": text, "choices": CHOICES, "answer": i % 3} for i, text in enumerate(QUESTIONS)]
ANIMALS = """
task: animals
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{metric: acc}]
"""
WORDS = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity}]
"""

ASKED = list(enumerate(f"is the {a} {b}" for a in ("film", "story", "plot", "acting") for b in ("good", "bad", "dull")))
ASKED_TASK = """
task: asked
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: [], max_gen_toks: 16, do_sample: false}
metric_list: [{metric: exact_match}]
"""

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    return save_language_model(tmp_path_factory.mktemp("stored"), chat=False)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with two tasks of a few rows."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    for name, text in (("animals", ANIMALS), ("words", WORDS)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(folder / "rows.jsonl")))
    return str(folder)


@torch.no_grad()
def log_probability(folder, context, text):
    """Of the tokens of ``text`` after those of ``context``."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    first, ids = tokenizer(context)["input_ids"], tokenizer(context + text)["input_ids"]
    logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(first), len(ids)))


def right_answers(folder, rows=ROWS):
    likely = [[log_probability(folder, row["question"], text) for text in row["choices"]] for row in rows]
    return sum(found.index(max(found)) == row["answer"] for found, row in zip(likely, rows, strict=True)) / len(rows)


def perplexity(folder):
    """By word; lm-eval puts a bos token before that of the tokenizer, and scores the second."""
    total = sum(log_probability(folder, "", f"<s>{row['question']}") for row in ROWS)
    return math.exp(-total / sum(len(row["question"].split()) for row in ROWS))


def measured(capsys, *words):
    """The results in the file, and the lines of the table."""
    main(["evaluate", *words, "--output", "out.json"])
    lines = capsys.readouterr().out.splitlines()
    return json.loads(Path("out.json").read_text()), [line.split() for line in lines if line.startswith("animals")]


@needs_lm_eval
@pytest.mark.parametrize("form", FORMS)
def test_metrics_are_those_of_the_merged_model(form, stored, tasks, capsys):
    words = ["--tasks", "animals,words", "--include_path", tasks, "--batch_size", "5"]
    found, lines = measured(capsys, stored[form], *words)
    expected = right_answers(stored["merged"])
    assert found["results"]["animals"]["acc,none"] == pytest.approx(expected)
    assert found["results"]["words"]["word_perplexity,none"] == pytest.approx(perplexity(stored["merged"]), rel=1e-5)
    assert lines[0][:4] == ["animals", "acc", "0", f"{expected:.4f}"]
    assert found["source"] == stored[form]
    assert found["n-samples"]["animals"] == {"original": 12, "effective": 12}


@needs_lm_eval
@pytest.mark.parametrize("form", ["checkpoint", "peft"])
def test_compare_has_the_backbone_in_the_same_line(form, stored, tasks, capsys):
    live, without = right_answers(stored["merged"]), right_answers(stored["base"])
    assert live != without
    found, lines = measured(capsys, stored[form], "--tasks", "animals", "--include-path", tasks, "--compare")
    error = {x: f"{math.sqrt(x * (1 - x) / 11):.4f}" for x in (live, without)}
    assert lines == [["animals", "acc", "0", f"{live:.4f}", error[live], f"{without:.4f}", error[without]]]
    assert found["results_without_adapters"]["animals"]["acc,none"] == pytest.approx(without)


@needs_lm_eval
def test_rows_and_examples_can_be_limited(stored, tasks, capsys):
    words = [stored["checkpoint"], "--tasks", "animals", "--include_path", tasks]
    found, _ = measured(capsys, *words, "--limit", "5")
    assert found["n-samples"]["animals"]["effective"] == 5
    assert found["results"]["animals"]["acc,none"] == pytest.approx(right_answers(stored["merged"], ROWS[:5]))
    found, lines = measured(capsys, *words, "--limit", "0.25", "--num_fewshot", "2")
    assert (found["n-samples"]["animals"]["effective"], found["n-shot"]["animals"], lines[0][2]) == (3, 2, "2")


@needs_lm_eval
def test_tied_embeddings_with_new_tokens(tasks, tmp_path):
    module = ls.CausalLM(
        save_tiny_llama(tmp_path / "base", tie_word_embeddings=True), ls.LoRA(rank=2), new_tokens=["<person>"]
    )
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt", std=1.0)
    ls.export_checkpoint(checkpoint, "merged", format="merged")
    settings = Settings(["words"], tasks)
    found = evaluate(open_language_model(checkpoint), settings)["results"]["words"]["word_perplexity,none"]
    assert found == pytest.approx(perplexity("merged"), rel=1e-5)


def save_answering_llama(folder, template=None):
    """A tiny Llama that likes to say "true" and "false"."""
    save_tiny_llama(folder)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(["Ġtrue", "Ġfalse"])] *= 5
    model.save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


@needs_lm_eval
def test_answers_of_reasoning_data_are_judged_alike(tmp_path):
    """By the task of docs/how-to/answers.md, for another set."""
    rows = [{"instruction": text, "input": "", "output": "", "answer": ["true", "false"][i % 2]} for i, text in ASKED]
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "test.json").write_text(json.dumps(rows))
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "answers.md").read_text(encoding="utf-8")
    (task,) = re.findall(r'title="my_tasks/arc_easy_answers.yaml"\n(.*?)^```', page, re.DOTALL | re.MULTILINE)
    for found, instead in (("LLM-Adapters/dataset/ARC-Easy", f"{tmp_path}/boolq"), ("answer[1-5]", "true|false")):
        assert found in task
        task = task.replace(found, instead)
    (tmp_path / "boolq_answers.yaml").write_text(task)

    module = ls.CausalLM(save_answering_llama(tmp_path / "base"), ls.LoRA(rank=2), max_new_tokens=16)
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt", std=1.0)
    ours = Trainer(**QUIET).test(module, ls.ReasoningData(str(tmp_path), max_length=512, batch_size=8))[0][
        "test_boolq_accuracy"
    ]
    theirs = evaluate(open_language_model(checkpoint), Settings(["arc_easy_answers"], str(tmp_path), batch_size=8))
    assert theirs["results"]["arc_easy_answers"]["exact_match,first"] == pytest.approx(ours, abs=1e-6)
    assert 0.2 < ours < 0.8


@needs_lm_eval
def test_questions_in_the_chat_format(tmp_path):
    """The prompts, and so the answers, are those of ChatData."""
    rows = [{"prompt": text, "completion": "true"} for _, text in ASKED]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    module = ls.CausalLM(save_answering_llama(tmp_path / "base", TEMPLATE), ls.LoRA(rank=2), max_new_tokens=16)
    checkpoint = save_checkpoint(module, tmp_path / "run.ckpt", std=1.0)
    data = ls.ChatData(data_files={"predict": str(tmp_path / "rows.jsonl")}, batch_size=8)
    answers = [text for batch in Trainer(**QUIET).predict(module, data) for text in batch["text"]]
    rows = [{**row, "completion": answers[i if i % 2 else i - 1]} for i, row in enumerate(rows)]
    expected = sum(row["completion"] == answer for row, answer in zip(rows, answers, strict=True)) / len(rows)
    (tmp_path / "asked.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (tmp_path / "asked.yaml").write_text(ASKED_TASK.replace("FILE", str(tmp_path / "asked.jsonl")))
    settings = {"include_path": str(tmp_path), "batch_size": 8}
    model = open_language_model(checkpoint)
    in_format, plain = (
        evaluate(model, Settings(["asked"], **settings, apply_chat_template=apply))["results"]["asked"][
            "exact_match,none"
        ]
        for apply in (True, False)
    )
    assert in_format == pytest.approx(expected)
    assert plain < expected < 1


@needs_lm_eval
def test_what_the_user_is_told(stored, tasks, capsys, tmp_path):
    (tmp_path / "absent.yaml").write_text(ANIMALS.replace("FILE", "absent.jsonl").replace("animals", "absent"))
    source, known = stored["merged"], ["--tasks", "animals", "--include_path", tasks]
    cases = [
        (
            [source, "--tasks", "animls", "--include_path", tasks],
            "There is no task 'animls' in lm-eval or include_path.",
        ),
        ([source, "--tasks", "animls", "--include_path", tasks], "'animals'"),
        ([source, "--tasks", "zzzzzz"], "lm-eval ls tasks lists those it has"),
        ([source, "--tasks", "animals", "--include_path", "nowhere"], "include_path 'nowhere' is no folder"),
        ([source, "--tasks", "absent", "--include_path", str(tmp_path)], "lm-eval cannot run ['absent']"),
        ([source, *known, "--limit", "0"], "limit must be above 0"),
        ([source, *known, "--batch_size", "0"], "batch_size must be at least 1"),
        ([source, *known, "--num_fewshot", "-1"], "num_fewshot must be at least 0"),
        ([source, *known, "--output", "nowhere/out.json"], "folder of output='nowhere/out.json' does not exist"),
        ([source, *known, "--compare"], "compare switches adapters off"),
        ([source, *known, "--apply_chat_template"], "apply_chat_template needs a chat template, and the tokenizer of"),
        (["nowhere.ckpt", *known], "'nowhere.ckpt' does not exist"),
    ]
    for words, message in cases:
        with pytest.raises(SystemExit):
            main(["evaluate", *words])
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
        assert message in line


@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_the_package(stored, capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", stored["merged"], "--tasks", "hellaswag"])
    assert 'not installed: run pip install "lit-sparse[lm-eval]"' in capsys.readouterr().err


@needs_lm_eval
def test_in_a_process_of_its_own(stored, tasks):
    words = ["--tasks", "animals", "--include_path", tasks, "--compare"]
    done = programs.run(["-m", "lit_sparse", "evaluate", stored["sparse"], *words])
    assert done.returncode == 0, done.stderr
    heads, _, line = done.stdout.splitlines()
    assert heads.split() == ["task", "metric", "shots", "with", "adapters", "±", "s.e.", "without", "±", "s.e."]
    assert line.split()[3] == f"{right_answers(stored['merged']):.4f}"
