"""lit_sparse.MultipleChoice: accuracy against a loop over rows, and a tiny BERT that learns to choose from files."""

import csv
import json
import sys

import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_roberta
from projects import last_figures, read_lines, write_config
from transformers import AutoTokenizer, BertForMultipleChoice

import lit_sparse as ls
from lit_sparse.cli.main import main

GOOD = "good great fine best warm".split()  # noqa: SIM905
BAD = "bad awful dull worst cold sad funny".split()  # noqa: SIM905
LETTERS = "ABCD"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(
        tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3
    )


def questions(count, seed=0):
    """Questions of four choices, one of which is a good film, with the number of that."""
    generator = torch.Generator().manual_seed(seed)

    def draw(words):
        return words[int(torch.randint(len(words), (), generator=generator))]

    rows = []
    for number in range(count):
        endings = [f"a {draw(BAD)} film" for _ in LETTERS]
        endings[(number * 7 + number // 4) % 4] = f"a {draw(GOOD)} film"
        rows.append((f"what was the {draw(['man', 'dog', 'cat'])}", endings, (number * 7 + number // 4) % 4))
    return rows


def write_swag(folder, splits):
    """As SWAG has it, in columns."""
    for split, rows in splits.items():
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            head = ["sent1", "sent2", *(f"ending{i}" for i in range(4)), "label"]
            csv.writer(stream).writerows([head, *([text, "it was", *endings, n] for text, endings, n in rows)])
    return {"question": ["sent1", "sent2"], "choices": [f"ending{i}" for i in range(4)]}


def write_commonsense_qa(folder, splits):
    """As CommonsenseQA and ARC have it, with the names of the choices."""
    for split, rows in splits.items():
        lines = [
            {"question": text, "choices": {"label": list(LETTERS), "text": endings}, "answerKey": LETTERS[n]}
            for text, endings, n in rows
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"label": "answerKey"}


@pytest.mark.slow
@pytest.mark.parametrize("write", [write_swag, write_commonsense_qa])
def test_a_user_teaches_a_model_to_choose(write, bert, tmp_path, monkeypatch):
    splits = {"train": questions(96), "validation": questions(32, 1), "test": questions(32, 2)}
    arguments = write(tmp_path, splits)
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.MultipleChoice", "init_args": {"backbone": bert}},
        {
            "class_path": "lit_sparse.MultipleChoiceData",
            "init_args": {"path": str(tmp_path), "batch_size": 8, **arguments},
        },
        lr=1e-2,
        max_epochs=4,
        log_every_n_steps=1,
    )
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    main(["fit", "--config", config])
    weights = ["--ckpt_path", "kept/last.ckpt"]
    main(["validate", "--config", config, *weights])
    assert last_figures()["val_accuracy"] > 0.9  # 1/4 by chance
    main(["test", "--config", config, *weights])
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "chosen.jsonl"]
    main(["predict", "--config", config, *weights, *writer])
    chosen = read_lines("chosen.jsonl")
    right = [row["prediction"] == n for row, (_, _, n) in zip(chosen, splits["test"], strict=True)]
    assert last_figures()["test_accuracy"] == pytest.approx(sum(right) / len(right))
    for row in chosen:
        assert sum(row["probabilities"]) == pytest.approx(1)
        assert row["probabilities"][row["prediction"]] == max(row["probabilities"])
    again = ls.MultipleChoice.load_from_checkpoint("kept/last.ckpt")  # which knows the number of choices
    again.configure_model()
    assert again.num_labels == 4


@pytest.mark.filterwarnings("ignore:.* has no weights for .*pooler")
@pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_roberta])
def test_scores_are_those_of_single_choices(save, tmp_path, trainer):
    """Loss, prediction and accuracy, with rows of different lengths and the choices of a row one by one."""
    backbone = save(tmp_path / "backbone", initializer_range=0.3)  # scores that differ
    rows = questions(6)
    lines = [{"question": text * (i + 1), "choices": e, "label": n} for i, (text, e, n) in enumerate(rows)]
    (tmp_path / "rows.json").write_text(json.dumps(lines))
    data = ls.MultipleChoiceData(data_files={"validation": "rows.json", "predict": "rows.json"}, batch_size=4)
    module, run = ls.MultipleChoice(backbone, ls.LoRA(rank=2)), trainer()
    (found,) = run.validate(module, data, verbose=False)
    module.eval()  # the Trainer gives it back as it was, with dropout
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    scores = torch.empty(6, 4)
    for i, line in enumerate(lines):
        for j, choice in enumerate(line["choices"]):
            inputs = tokenizer(line["question"], choice, return_tensors="pt", truncation=True, max_length=64)
            with torch.no_grad():
                scores[i, j] = module.model(**{k: v[None] for k, v in inputs.items()}).logits.item()
    labels = torch.tensor([line["label"] for line in lines])
    losses = -scores.double().softmax(-1)[torch.arange(6), labels].log()
    assert found["val_loss"] == pytest.approx(losses.mean().item(), rel=1e-4)
    assert found["val_accuracy"] == pytest.approx((scores.argmax(-1) == labels).float().mean().item())
    assert scores.std() > 0.1
    predicted = run.predict(module, data)
    torch.testing.assert_close(torch.cat([p["probabilities"] for p in predicted]), scores.softmax(-1))
    assert torch.cat([p["prediction"] for p in predicted]).tolist() == scores.argmax(-1).tolist()


def test_a_built_model_does_not_say_how_many_choices_there_are():
    model = build_tiny(BertForMultipleChoice)
    assert model.config.num_labels == 2
    with pytest.raises(ls.UsageError, match="The number of choices is not known: give num_labels"):
        ls.MultipleChoice(model, ls.LoRA(rank=2)).configure_model()


def test_a_single_choice_is_none():
    with pytest.raises(ls.UsageError, match="nothing to choose among 1 choices: num_labels is at least 2"):
        ls.MultipleChoice(build_tiny(BertForMultipleChoice), ls.LoRA(rank=2), num_labels=1).configure_model()


def test_another_number_of_choices_than_the_data_has_is_refused(bert, tmp_path, trainer):
    write_commonsense_qa(tmp_path, {"validation": questions(2)})
    data = ls.MultipleChoiceData(str(tmp_path), label="answerKey")
    with pytest.raises(ls.UsageError, match="num_labels is 3, but the data has 4"):
        trainer().validate(ls.MultipleChoice(bert, ls.LoRA(rank=2), num_labels=3), data, verbose=False)
