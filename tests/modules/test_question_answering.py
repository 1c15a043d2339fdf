"""lit_sparse.QuestionAnswering: the best span of all windows, SQuAD's figures, and the way through the commands."""

# ruff: noqa: S311 - chance for rows, not for secrets
import collections
import csv
import json
import random
import re
import string
import sys
from pathlib import Path

import pytest
import torch
import yaml
from programs import launch
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.modules.question_answering import SquadScores, best_spans


@pytest.mark.parametrize("max_length", [1, 3, 50])
def test_best_spans_against_all_pairs(max_length):
    generator = torch.Generator().manual_seed(max_length)
    start, end = (torch.randn(40, 9, generator=generator) for _ in range(2))
    allowed = torch.rand(40, 9, generator=generator) < 0.6
    allowed[0] = False
    scores, first, last = best_spans(start, end, allowed, max_length)
    assert scores[0] == -torch.inf
    for window in range(1, 40):
        pairs = [
            (float(start[window, i] + end[window, j]), i, j)
            for i in range(9)
            for j in range(i, min(9, i + max_length))
            if allowed[window, i] and allowed[window, j]
        ]
        assert (float(scores[window]), int(first[window]), int(last[window])) == max(pairs)


def official_scores(predicted, answers):
    """Exact match and F1 of one question as evaluate-v2.0.py of SQuAD has them, with its names and steps."""

    def normalize_answer(text):
        text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
        return " ".join(re.sub(r"\b(a|an|the)\b", " ", text, flags=re.UNICODE).split())

    def compute_f1(a_gold, a_pred):
        gold, pred = normalize_answer(a_gold).split(), normalize_answer(a_pred).split()
        num_same = sum((collections.Counter(gold) & collections.Counter(pred)).values())
        if not gold or not pred:
            return float(gold == pred)
        if num_same == 0:
            return 0.0
        precision, recall = num_same / len(pred), num_same / len(gold)
        return 2 * precision * recall / (precision + recall)

    gold_answers = answers or [""]
    exact = max(float(normalize_answer(a) == normalize_answer(predicted)) for a in gold_answers)
    return exact, max(compute_f1(a, predicted) for a in gold_answers)


CASES = [
    ("The River.", ["a river", "some water"]),  # case, article and punctuation do not count
    ("big river bank", ["river bank of gold", "the big river"]),  # the better of two references
    ("river river", ["river"]),  # a word counts as often as it is there
    ("", []),  # rightly left unanswered
    ("river", []),  # answered although there is no answer
    ("", ["river"]),  # wrongly left unanswered
    ("dog", ["cat"]),
    ("The", ["a"]),  # nothing is left of either
]


@pytest.mark.parametrize(("predicted", "answers"), CASES)
def test_scores_of_a_question_are_the_official_ones(predicted, answers):
    scores = SquadScores()
    scores.update(torch.tensor([7]), [predicted], [answers])
    exact, f1 = official_scores(predicted, answers)
    assert scores.compute() == pytest.approx({"exact_match": exact, "f1": f1})


def test_scores_of_a_set_count_each_question_once():
    scores = SquadScores()
    order = [0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 0]  # a distributed sampler repeats the first rows
    for start in range(0, len(order), 3):
        part = order[start : start + 3]
        scores.update(torch.tensor(part), [CASES[n][0] for n in part], [CASES[n][1] for n in part])
    exact, f1 = (sum(column) / len(CASES) for column in zip(*(official_scores(*case) for case in CASES), strict=True))
    assert scores.compute() == pytest.approx({"exact_match": exact, "f1": f1})


# A task: "how is it" asks for the number in the context, "who is it" for the one man, woman, dog or cat. What
# "when is it" asks for is never there.

OTHERS = "film movie story plot acting good bad great awful fine dull warm".split()  # noqa: SIM905


def questions(count, seed, unanswerable=False, length=7):
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        words = [rng.choice(OTHERS) for _ in range(rng.randint(length - 2, length + 2))]
        there = {"how": str(rng.randint(10, 99)), "who": rng.choice(["man", "woman", "dog", "cat"])}
        for word in there.values():
            words.insert(rng.randint(1, len(words)), word)
        kind = ("how", "who", "when")[number % (3 if unanswerable else 2)]
        context = " ".join(words)
        texts = [there[kind]] if kind in there else []
        answers = {"text": texts, "answer_start": [context.index(text) for text in texts]}
        rows.append({"id": f"{seed}-{number}", "question": f"{kind} is it", "context": context, "answers": answers})
    return rows


def write_questions(folder, **options):
    """Training rows as JSON Lines, validation as SQuAD's own files, test again as lines."""
    for split, count, seed in (("train", 320, 0), ("test", 40, 2)):
        text = "".join(json.dumps(row) + "\n" for row in questions(count, seed, **options))
        (folder / f"{split}.jsonl").write_text(text)
    paragraphs = [
        {
            "context": row["context"],
            "qas": [
                {
                    "id": row["id"],
                    "question": row["question"],
                    "answers": [
                        {"text": text, "answer_start": start}
                        for text, start in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)
                    ],
                }
            ],
        }
        for row in questions(40, 1, **options)
    ]
    squad_form = {"version": "v2.0", "data": [{"title": "all", "paragraphs": paragraphs}]}
    (folder / "validation.json").write_text(json.dumps(squad_form))
    return str(folder)


def answerer(backbone, **options):
    return ls.QuestionAnswering(backbone, ls.LoRA(rank=2), **options)


@torch.no_grad()
def answers_by_hand(module, data, rows, longest):
    """The best span for each row, and by how much CLS beats it: every window on its own, every pair of tokens tried."""
    tokenizer, found = data._tokenizer, []
    module.eval()
    for row in rows:
        question = tokenizer(row["question"], add_special_tokens=False)["input_ids"]
        context = tokenizer(row["context"], add_special_tokens=False, return_offsets_mapping=True)
        room = data._token_limit - len(question) - 3
        best, null, start = (-1e9, ""), 1e9, 0
        while True:
            ids = context["input_ids"][start : start + room]
            inputs = [tokenizer.cls_token_id, *question, tokenizer.sep_token_id, *ids, tokenizer.sep_token_id]
            kinds = [0] * (len(question) + 2) + [1] * (len(ids) + 1)
            output = module.model(input_ids=torch.tensor([inputs]), token_type_ids=torch.tensor([kinds]))
            starts, ends = output.start_logits[0].tolist(), output.end_logits[0].tolist()
            null = min(null, starts[0] + ends[0])
            for i in range(len(ids)):
                for j in range(i, min(len(ids), i + longest)):
                    score = starts[i + len(question) + 2] + ends[j + len(question) + 2]
                    places = context["offset_mapping"]
                    best = max(best, (score, row["context"][places[start + i][0] : places[start + j][1]]))
            if start + room >= len(context["input_ids"]):
                break
            start += room - data.stride
        found.append((best[1], null - best[0]))
    return found


@pytest.mark.parametrize("unanswerable", [False, True])
def test_answers_are_the_best_of_all_windows(unanswerable, tiny_bert, tmp_path, trainer):
    write_questions(tmp_path, length=20, unanswerable=unanswerable)
    rows = questions(40, 2, length=20, unanswerable=unanswerable)
    data = ls.QuestionAnsweringData(
        str(tmp_path), max_length=16, stride=3, eval_batch_size=7, unanswerable=unanswerable
    )
    module, run = answerer(tiny_bert, max_answer_length=4), trainer()
    run.test(module, data, verbose=False)
    assert module.null_threshold == (0 if unanswerable else None)
    spans = answers_by_hand(module, data, rows, longest=4)
    if unanswerable:  # so that half of the questions are left unanswered
        middle = sorted(excess for _, excess in spans)[19:21]
        module.null_threshold = sum(middle) / 2
        predicted = ["" if excess > module.null_threshold else span for span, excess in spans]
        assert predicted.count("") == 20
    else:
        predicted = [span for span, _ in spans]
        assert "" not in predicted
    assert len(set(predicted)) > 10
    (tested,) = run.test(module, data, verbose=False)
    written = run.predict(module, data)
    assert [answer for part in written for answer in part["answer"]] == predicted
    assert [name for part in written for name in part["id"]] == [row["id"] for row in rows]
    scores = [official_scores(p, row["answers"]["text"]) for p, row in zip(predicted, rows, strict=True)]
    exact, f1 = (sum(column) / len(rows) for column in zip(*scores, strict=True))
    assert tested["test_exact_match"] == pytest.approx(exact)
    assert tested["test_f1"] == pytest.approx(f1)
    batches = list(data.test_dataloader())
    inputs = [{k: v for k, v in b.items() if k.endswith(("ids", "mask", "_positions"))} for b in batches]
    with torch.no_grad():
        losses = [module(**{k: v for k, v in i.items() if k != "null_positions"}).loss.item() for i in inputs]
    windows = [len(b["question"]) for b in batches]
    mean = sum(loss * count for loss, count in zip(losses, windows, strict=True)) / sum(windows)
    assert len(set(windows)) > 1
    assert tested["test_loss"] == pytest.approx(mean, rel=1e-5)


def test_other_batches_and_rows_without_answers_are_refused(tiny_bert, tmp_path, trainer):
    batch = {"input_ids": torch.tensor([[5, 6]]), "start_positions": torch.tensor([0])}
    with pytest.raises(ls.UsageError, match=r"this one lacks \['context', 'id', 'null_positions', 'offsets', "):
        trainer().validate(answerer(tiny_bert), DataLoader([batch], batch_size=None), verbose=False)
    row = questions(1, 0)[0]
    (tmp_path / "predict.jsonl").write_text(json.dumps({k: row[k] for k in ("id", "question", "context")}))
    data = ls.QuestionAnsweringData(str(tmp_path), tokenizer=tiny_bert, max_length=40, stride=8)
    data.setup("predict")
    with pytest.raises(ls.UsageError, match=r"The rows have no answers, .* Use predict"):
        trainer().validate(answerer(tiny_bert), data.predict_dataloader(), verbose=False)
    with pytest.raises(ls.UsageError, match="max_answer_length must be at least 1; got 0"):
        answerer(tiny_bert, max_answer_length=0)


# As a user calls it.


def read_metrics(folder):
    with next(Path(folder).glob("*/metrics.csv")).open() as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


@pytest.fixture
def as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def write_config(folder, backbone, **data):
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sparse.QuestionAnswering",
            "init_args": {
                "backbone": backbone,
                "method": {"class_path": "lit_sparse.LoRA", "init_args": {"rank": 8}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "lit_sparse.QuestionAnsweringData",
            "init_args": {"path": str(folder), "batch_size": 16, "stride": 4, "max_length": 24, **data},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 10,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "kept", "filename": "last"},
                }
            ],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


def share_of_first_words(rows):
    """F1 of a program that always answers by the first word."""
    scores = [official_scores(row["context"].split()[0], row["answers"]["text"])[1] for row in rows]
    return sum(scores) / len(scores)


@pytest.mark.slow
def test_answers_are_learned_scored_and_predicted_by_the_commands(tiny_bert, tmp_path, as_from_a_terminal):
    write_questions(tmp_path)
    config, kept = write_config(tmp_path, tiny_bert), ["--ckpt_path", "kept/last.ckpt"]
    main(["fit", "--config", config])
    fitted = read_metrics("runs/lightning_logs")
    assert share_of_first_words(questions(40, 1)) < 0.1
    assert fitted["val_f1"] > 0.8
    main(["validate", "--config", config, *kept, "--trainer.logger.init_args.name", "validated"])
    validated = read_metrics("runs/validated")
    assert sorted(k for k in validated if "val" in k) == ["val_exact_match", "val_f1", "val_loss"]
    assert all(validated[k] == pytest.approx(fitted[k]) for k in validated if "val" in k)
    main(["test", "--config", config, *kept, "--trainer.logger.init_args.name", "tested"])
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "answers.jsonl"]
    main(["predict", "--config", config, *kept, *writer])
    lines = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
    rows = questions(40, 2)
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    exact = [official_scores(p["answer"], r["answers"]["text"])[0] for p, r in zip(lines, rows, strict=True)]
    assert sum(exact) / len(rows) == pytest.approx(read_metrics("runs/tested")["test_exact_match"])


@pytest.mark.slow
def test_unanswerable_questions_are_learned(tiny_bert, tmp_path, as_from_a_terminal):
    write_questions(tmp_path, unanswerable=True)
    config = write_config(tmp_path, tiny_bert, unanswerable=True)
    main(["fit", "--config", config])
    rows = questions(40, 1, unanswerable=True)
    nothing = sum(not row["answers"]["text"] for row in rows) / len(rows)  # what the answer "" always gets
    assert nothing == 13 / 40
    assert read_metrics("runs/lightning_logs")["val_f1"] > nothing + 0.3
    module = ls.QuestionAnswering.load_from_checkpoint("kept/last.ckpt")  # without a data module
    assert module.null_threshold == 0


def test_a_mistake_in_the_data_is_one_line(tiny_bert, tmp_path, as_from_a_terminal, capsys):
    write_questions(tmp_path, unanswerable=True)
    with pytest.raises(SystemExit):
        main(["fit", "--config", write_config(tmp_path, tiny_bert)])
    error = capsys.readouterr().err.splitlines()[-1]
    number = next(n for n, row in enumerate(questions(320, 0, unanswerable=True)) if not row["answers"]["text"])
    row = f"error: Row {number} (counted from 0 in {tmp_path}/train.jsonl) of the split 'train'"
    assert error.startswith(f"{row} has no answer in the column 'answers'")


DDP = """
import json, sys
import lightning as L
import torch
import lit_sparse as ls

if __name__ == "__main__":
    torch.set_num_threads(1)
    backbone, file, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    L.seed_everything(0)
    data = ls.QuestionAnsweringData(
        data_files={"validation": file, "predict": file}, max_length=16, stride=3, eval_batch_size=4
    )
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
        callbacks=[ls.PredictionWriter(f"{processes}.jsonl")],
    )
    module = ls.QuestionAnswering(backbone, ls.LoRA(rank=2))
    (found,) = trainer.validate(module, data, verbose=False)
    trainer.predict(module, data, return_predictions=False)
    with open(f"{processes}_{trainer.global_rank}.json", "w") as stream:
        json.dump({k: v for k, v in found.items() if "loss" not in k}, stream)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_bert, tmp_path):
    """With an odd number of questions, one of which the sampler repeats."""
    (tmp_path / "validate.py").write_text(DDP)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions(11, 0, length=20)))
    for processes in (1, 2):
        done = launch(processes, ["validate.py", tiny_bert, "rows.jsonl", str(processes)], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{run}.json").read_text()) for run in ("1_0", "2_0", "2_1"))
    assert first == second
    assert first == pytest.approx(alone, rel=1e-6)
    assert 0 < alone["val_f1"] < 1
    lines = {file: (tmp_path / file).read_text().splitlines() for file in ("1.jsonl", "2.0.jsonl", "2.1.jsonl")}
    assert sorted(lines["1.jsonl"]) == sorted(lines["2.0.jsonl"] + lines["2.1.jsonl"])
