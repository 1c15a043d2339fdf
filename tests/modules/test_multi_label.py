"""SequenceClassification with any number of labels per row: training, metrics, predictions, checkpoints, exports."""

import json
import random

import numpy as np
import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from peft import PeftModel
from programs import launch
from projects import last_figures, read_lines, write_config
from sklearn import metrics as sk
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.cli.main import main

NAMES = ["animal", "good", "bad"]  # not in the order of the alphabet
WORDS = {"animal": ["cat", "dog"], "good": ["good", "great", "fine"], "bad": ["bad", "awful", "dull"]}


def write_rows(folder, split, count):
    """Texts with a word for each of their labels; every eighth has none."""
    draw = random.Random(count)  # noqa: S311
    folder.mkdir(exist_ok=True)
    with (folder / f"{split}.jsonl").open("w") as file:
        for number in range(count):
            labels = [name for bit, name in enumerate(NAMES) if number >> bit & 1]
            words = [draw.choice(WORDS[name]) for name in labels] + draw.choices(["the", "film", "was", "and"], k=4)
            draw.shuffle(words)
            row = {"text": " ".join(words), "label": draw.sample(labels, len(labels))}
            file.write(json.dumps(row) + "\n")


def write_single(file):
    """Rows of one label each."""
    file.write_text("text,label\n" + "".join(f"a film,{name}\n" for name in NAMES))
    return ls.TextClassificationData(data_files={"train": str(file), "validation": str(file)}, labels=NAMES)


def ordered(labels):
    return [name for name in NAMES if name in labels]


@pytest.fixture(scope="module")
def wide_bert(tmp_path_factory):
    """A BERT whose outputs differ from row to row before it is trained."""
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return save_tiny_bert(tmp_path_factory.mktemp("wide"), initializer_range=0.2, **still)


@pytest.fixture
def data(tmp_path):
    for split, count in (("train", 32), ("validation", 21)):
        write_rows(tmp_path / "rows", split, count)
    return ls.TextClassificationData(str(tmp_path / "rows"), labels=NAMES, batch_size=8)


def module_of(backbone, **options):
    return ls.SequenceClassification(backbone, ls.LoRA(["query"], rank=2), **options)


def test_the_loss_and_the_metrics_are_those_of_a_slow_reference(wide_bert, data, trainer, tmp_path):
    data.metrics = ["accuracy", "f1_macro", "f1_micro", "auroc"]
    module = module_of(wide_bert)
    (found,) = trainer().validate(module, data, verbose=False)
    given = read_lines(tmp_path / "rows" / "validation.jsonl")
    inputs = AutoTokenizer.from_pretrained(wide_bert)([row["text"] for row in given], padding=True, return_tensors="pt")
    with torch.no_grad():
        probabilities = (1 / (1 + (-module.model.eval()(**inputs).logits.double()).exp())).numpy()
    true = np.array([[name in row["label"] for name in NAMES] for row in given])
    predicted = probabilities > 0.5
    assert found == pytest.approx(
        {
            "val_loss": -np.log(np.where(true, probabilities, 1 - probabilities)).mean(),
            "val_accuracy": (true == predicted).mean(),
            "val_f1_macro": sk.f1_score(true, predicted, average="macro", zero_division=0),
            "val_f1_micro": sk.f1_score(true, predicted, average="micro", zero_division=0),
            "val_auroc": sk.roc_auc_score(true, probabilities, average="macro"),
        },
        abs=1e-5,
    )


@pytest.mark.slow
def test_a_user_teaches_several_labels_by_the_command_line(wide_bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 256), ("validation", 64), ("predict", 24)):
        write_rows(tmp_path / "rows", split, count)
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.SequenceClassification", "init_args": {"backbone": wide_bert}},
        {
            "class_path": "lit_sparse.TextClassificationData",
            "init_args": {"path": "rows", "labels": NAMES, "batch_size": 16},
        },
        lr=3e-3,
        max_epochs=16,
    )
    main(["fit", "--config", config])
    figures = last_figures()
    assert {"val_accuracy", "val_f1_macro", "val_f1_micro"} <= figures.keys()
    assert figures["val_f1_macro"] > 0.95
    kept = ["--ckpt_path", "kept/last.ckpt"]
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output"]
    main(["predict", "--config", config, *kept, *writer, "out.jsonl"])
    predicted, given = read_lines("out.jsonl"), read_lines("rows/predict.jsonl")
    chosen = [[n for n, p in zip(NAMES, row["probabilities"], strict=True) if p > 0.5] for row in predicted]
    assert [row["prediction"] for row in predicted] == chosen
    assert sum(a == ordered(row["label"]) for a, row in zip(chosen, given, strict=True)) > 20

    main(["export", *kept, "--output", "lora"])
    main(["merge", *kept, "--output", "merged"])
    told = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert told["problem_type"] == "multi_label_classification"
    assert told["id2label"] == {str(number): name for number, name in enumerate(NAMES)}
    inputs = AutoTokenizer.from_pretrained("merged")([row["text"] for row in given], padding=True, return_tensors="pt")
    base = AutoModelForSequenceClassification.from_pretrained(wide_bert, num_labels=3, ignore_mismatched_sizes=True)
    merged = AutoModelForSequenceClassification.from_pretrained("merged")
    expected = torch.tensor([row["probabilities"] for row in predicted])
    for model in (merged, PeftModel.from_pretrained(base, "lora")):
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**inputs).logits.sigmoid(), expected, rtol=0, atol=1e-4)


def test_rows_without_labels_are_predicted_as_the_checkpoint_was_trained(tiny_bert, data, trainer, tmp_path):
    module = module_of(tiny_bert)
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    (tmp_path / "new.csv").write_text("text\na good cat\n")
    alone = ls.TextClassificationData(data_files={"predict": str(tmp_path / "new.csv")}, labels=NAMES)
    (found,) = trainer().predict(module_of(tiny_bert), alone, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    expected = module.eval().predict_step(next(iter(alone.predict_dataloader())), 0)
    assert found["prediction"] == expected["prediction"]
    torch.testing.assert_close(found["probabilities"], expected["probabilities"])


def test_a_checkpoint_keeps_labels_and_kind_without_data(tiny_bert, data, trainer, tmp_path):
    module = module_of(tiny_bert)
    run = trainer(max_steps=1)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    loaded = ls.SequenceClassification.load_from_checkpoint(tmp_path / "run.ckpt")
    assert (loaded.multi_label, loaded.num_labels, loaded.label_names) == (True, 3, NAMES)
    assert loaded.model.config.problem_type == "multi_label_classification"
    batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[1.0, 0, 1]])}
    assert torch.equal(loaded.eval()(**batch).loss, module.eval()(**batch).loss)


def test_a_checkpoint_of_several_labels_refuses_rows_of_one(tiny_bert, data, trainer, tmp_path):
    run = trainer(max_steps=1)
    run.fit(module_of(tiny_bert), data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    match = "was trained with any number of labels per row, and the data is of the other kind"
    with pytest.raises(ls.UsageError, match=match):
        trainer().validate(
            module_of(tiny_bert), write_single(tmp_path / "one.csv"), ckpt_path=tmp_path / "run.ckpt", weights_only=True
        )


@pytest.mark.parametrize("several", [True, False])
def test_the_data_decides_what_a_published_head_is_trained_for(several, data, trainer, tmp_path):
    kinds = {True: "multi_label_classification", False: "single_label_classification"}
    folder = save_tiny_bert(tmp_path / "published", num_labels=3, problem_type=kinds[not several])
    given = data if several else write_single(tmp_path / "one.csv")
    for backbone in (folder, AutoModelForSequenceClassification.from_pretrained(folder)):
        module = module_of(backbone)
        trainer(max_steps=1).fit(module, given)
        assert module.multi_label is several
        assert module.model.config.problem_type == kinds[several]


def test_a_built_model_says_itself_that_it_has_several_labels():
    model = build_tiny(BertForSequenceClassification, num_labels=3, problem_type="multi_label_classification")
    module = module_of(model)
    module.configure_model()
    assert module.multi_label
    assert set(module.make_metrics()) == {"loss", "accuracy", "f1_macro", "f1_micro"}


def test_arguments_that_contradict_the_data(tiny_bert, data, trainer):
    with pytest.raises(ls.UsageError, match="multi_label is False, but each row of the data has any number of labels"):
        trainer().validate(module_of(tiny_bert, multi_label=False), data, verbose=False)
    with pytest.raises(ls.UsageError, match="multi_label needs at least two labels"):
        module_of(tiny_bert, multi_label=True, num_labels=1).configure_model()
    with pytest.raises(ls.UsageError, match=r"metrics \['f1'\] do not exist"):
        trainer().validate(module_of(tiny_bert, metrics=["f1"]), data, verbose=False)


DDP = """
import json, sys
import lightning as L
import torch
import lit_sparse as ls

if __name__ == "__main__":
    torch.set_num_threads(1)
    backbone, processes = sys.argv[1], int(sys.argv[2])
    L.seed_everything(0)
    metrics = ["accuracy", "f1_macro", "f1_micro", "auroc"]
    data = ls.TextClassificationData(data_files={"validation": "rows/*.jsonl"}, labels=["animal", "good", "bad"],
                                     metrics=metrics, eval_batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )
    (found,) = trainer.validate(ls.SequenceClassification(backbone, ls.LoRA(rank=2)), data, verbose=False)
    with open(f"{processes}_{trainer.global_rank}.json", "w") as stream:
        json.dump(found, stream)
"""


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(wide_bert, tmp_path):
    (tmp_path / "validate.py").write_text(DDP)
    for part in (8, 14):  # two files, read by their pattern
        write_rows(tmp_path / "rows", f"part{part}", part)
    for processes in (1, 2):
        done = launch(processes, ["validate.py", wide_bert, str(processes)], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{run}.json").read_text()) for run in ("1_0", "2_0", "2_1"))
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    assert len(alone) == 5
