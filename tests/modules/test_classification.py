"""lit_sparse.SequenceClassification in a real Trainer, on text and on toy rows."""

import csv
import functools
import random

import pytest
import torch
from lightning.pytorch import LightningDataModule
from projects import last_figures, write_config
from scipy import stats
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.cli.main import main

GOOD, BAD = ["good", "great", "best", "fine", "warm", "funny"], ["bad", "awful", "worst", "dull", "cold", "sad"]


def classifier(backbone, method=None, lr=1e-2, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=lr)
    return ls.SequenceClassification(backbone, method or ls.LoRA(rank=4), optimizer=optimizer, **options)


def write_csv(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def sentences(count, seed=0):
    """Four words of one mood among neutral ones."""
    draw = random.Random(seed)  # noqa: S311
    rows = []
    for number in range(count):
        words = draw.choices([BAD, GOOD][number % 2], k=4) + draw.choices(["the", "film", "was", "and"], k=4)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": ["bad", "good"][number % 2]})
    return rows


@pytest.fixture
def sentiment(tmp_path):
    for split, count in (("train", 256), ("validation", 64), ("test", 30)):
        write_csv(tmp_path / "rows" / f"{split}.csv", sentences(count, seed=count))
    return ls.TextClassificationData(str(tmp_path / "rows"), batch_size=16)


def test_sora_learns_a_separable_task_and_zeroes_gates(tiny_bert, sentiment, trainer):
    module = classifier(tiny_bert, ls.SoRA(rank=4, sparsity_weight=2.0), lr=2e-2)
    run = trainer(max_epochs=4, num_sanity_val_steps=0)
    run.validate(module, sentiment, verbose=False)
    before = run.callback_metrics["val_accuracy"]
    run.fit(module, sentiment)
    assert before < 0.7
    assert run.callback_metrics["val_accuracy"] > 0.95
    gates = torch.cat([adapter.gate.detach() for _, adapter in ls.adapters_in(module)])
    zero = (gates == 0).float().mean()
    assert 0.1 < zero < 1
    assert run.callback_metrics["sparsity/zero_gates"] == pytest.approx(float(zero), abs=0.1)
    assert run.test(module, sentiment, verbose=False)[0]["test_accuracy"] > 0.95


@pytest.mark.slow
def test_a_user_teaches_sentiments_by_the_command_line(tiny_bert, sentiment, tmp_path, monkeypatch):
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.SequenceClassification", "init_args": {"backbone": tiny_bert}},
        {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": sentiment.path}},
        lr=1e-2,
        max_epochs=6,
    )
    monkeypatch.setattr("sys.argv", ["lit-sparse"])
    main(["fit", "--config", config])
    main(["validate", "--config", config, "--ckpt_path", "kept/last.ckpt"])
    assert last_figures()["val_accuracy"] > 0.9  # each class is half of the rows


def test_labels_and_their_names_come_from_the_data(tiny_bert, sentiment, trainer):
    module = classifier(tiny_bert)
    trainer(max_steps=1, limit_val_batches=1).fit(module, sentiment)
    assert (module.num_labels, module.label_names) == (2, ["bad", "good"])
    assert module.model.config.id2label == {0: "bad", 1: "good"}
    assert module.hparams["num_labels"] == 2


def test_num_labels_that_contradict_the_data_are_an_error(tiny_bert, sentiment, trainer):
    with pytest.raises(ls.UsageError, match=r"num_labels is 3, but the data has 2 \(\['bad', 'good'\]\)"):
        trainer(max_steps=1).fit(classifier(tiny_bert, num_labels=3), sentiment)


def test_pairs_and_regression_log_correlations(tiny_bert, tmp_path, trainer):
    draw = random.Random(0)  # noqa: S311
    for split, count in (("train", 128), ("validation", 22)):
        rows = [{"one": "the film", "two": " ".join(draw.choices(draw.choice([GOOD, BAD]), k=3))} for _ in range(count)]
        for row in rows:
            row["score"] = (row["two"].split()[0] in GOOD) + 0.01 * draw.random()
        write_csv(tmp_path / "pairs" / f"{split}.csv", rows)
    data = ls.TextClassificationData(
        str(tmp_path / "pairs"), text="one", text_pair="two", label="score", regression=True, batch_size=8
    )
    module = classifier(tiny_bert, lr=3e-3)
    run = trainer(max_epochs=6)
    run.validate(module, data, verbose=False)  # correlations that were reset in inference mode must still work
    run.fit(module, data)
    assert module.num_labels == 1
    predicted, scores = [], []
    module.eval()
    for batch in data.val_dataloader():
        assert batch["token_type_ids"].max() == 1
        predicted += module.predict_step(batch, 0)["prediction"].tolist()
        scores += batch["labels"].tolist()
    assert run.callback_metrics["val_pearson"] == pytest.approx(stats.pearsonr(predicted, scores)[0], abs=1e-4)
    assert run.callback_metrics["val_spearman"] == pytest.approx(stats.spearmanr(predicted, scores)[0], abs=1e-4)
    assert run.callback_metrics["val_pearson"] > 0.5
    squared = [(p - s) ** 2 for p, s in zip(predicted, scores, strict=True)]
    assert run.callback_metrics["val_loss"] == pytest.approx(sum(squared) / len(squared), rel=1e-4)


@torch.no_grad()
def evaluate_slowly(module, loader):
    """Mean loss per row and accuracy, one row at a time."""
    module.eval()
    losses, right = [], []
    for batch in loader:
        for row in range(len(batch["labels"])):
            output = module(**{key: value[row : row + 1] for key, value in batch.items()})
            losses.append(output.loss.item())
            right.append(float(output.logits.argmax() == batch["labels"][row]))
    return sum(losses) / len(losses), sum(right) / len(right)


def test_validation_figures_are_those_of_the_last_state_over_all_rows(tiny_bert, trainer, loader):
    """Batches of unequal size, and a second epoch that must not remember the first."""
    validation = loader(count=22, batch_size=8, seed=5)
    module = classifier(tiny_bert, num_labels=2, lr=1e-3)
    run = trainer(max_epochs=2)
    run.fit(module, loader(count=64), validation)
    loss, accuracy = evaluate_slowly(module, validation)
    assert run.callback_metrics["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert run.callback_metrics["val_accuracy"] == pytest.approx(accuracy)


def test_several_validation_sets_of_mnli_have_names(tiny_bert, tmp_path, trainer):
    names, folder = ["entailment", "neutral", "contradiction"], tmp_path / "mnli"
    for split, count in (("train", 24), ("validation_matched", 10), ("validation_mismatched", 7)):
        rows = [{"premise": "a man sat", "hypothesis": GOOD[i % 6], "label": names[i % 3]} for i in range(count)]
        write_csv(folder / f"{split}.csv", rows)
    data = ls.GLUE(str(folder), task="mnli", batch_size=4)
    module = classifier(tiny_bert)
    run = trainer(max_epochs=1)
    run.fit(module, data)
    for name, loader in zip(("matched", "mismatched"), data.val_dataloader(), strict=True):
        loss, accuracy = evaluate_slowly(module, loader)
        assert run.callback_metrics[f"val_{name}_accuracy"] == pytest.approx(accuracy)
        assert run.callback_metrics[f"val_{name}_loss"] == pytest.approx(loss, rel=1e-4)
    assert "val_accuracy" not in run.callback_metrics


def test_several_loaders_without_names_are_numbered(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    module = classifier(tiny_bert, num_labels=2)
    run.fit(module, loader(), [loader(), loader(count=4)])
    assert {"val_0_accuracy", "val_1_accuracy"} <= run.callback_metrics.keys()
    run.test(module, [loader(), loader(count=4)], verbose=False)
    assert {"test_0_loss", "test_1_loss"} <= run.callback_metrics.keys()


class OwnData(LightningDataModule):
    """A user's data module, which knows nothing of this library."""

    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def train_dataloader(self):
        return DataLoader(self.rows, batch_size=8)

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=8)


def test_a_data_module_of_the_users_own_needs_num_labels_only(tiny_bert, toy_rows, trainer):
    run = trainer(max_epochs=1)
    module = classifier(tiny_bert, num_labels=3, metrics=["accuracy", "f1"])
    run.fit(module, OwnData(toy_rows(16, classes=3)))
    assert module.model.config.num_labels == 3
    assert {"val_accuracy", "val_f1", "val_loss"} <= run.callback_metrics.keys()


def test_without_num_labels_anywhere_there_is_an_error(tiny_bert, toy_rows, trainer):
    with pytest.raises(ls.UsageError, match="give num_labels, or fit with a data module that has it"):
        trainer(max_epochs=1).fit(classifier(tiny_bert), OwnData(toy_rows(16)))


def test_a_built_model_knows_its_number_of_labels(tiny_bert, toy_rows, trainer):
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3, ignore_mismatched_sizes=True)
    run = trainer(max_epochs=1)
    run.fit(classifier(model), OwnData(toy_rows(16, classes=3)))
    assert "val_accuracy" in run.callback_metrics


def test_a_test_set_with_hidden_labels_says_to_use_predict(tiny_bert, tmp_path, trainer):
    folder = tmp_path / "rte"
    for split in ("train", "validation", "test"):
        rows = [
            {"sentence1": "a man", "sentence2": word, "label": -1 if split == "test" else i % 2}
            for i, word in enumerate(GOOD)
        ]
        write_csv(folder / f"{split}.csv", rows)
    data, module, run = ls.GLUE(str(folder), task="rte", batch_size=4), classifier(tiny_bert), trainer(max_epochs=1)
    run.fit(module, data)
    with pytest.raises(ls.UsageError, match=r"The rows have no labels .* Use predict"):
        run.test(module, data, verbose=False)
    found = run.predict(module, data)
    assert [len(batch["prediction"]) for batch in found] == [4, 2]
    for batch in found:
        torch.testing.assert_close(batch["probabilities"].sum(1), torch.ones(len(batch["prediction"])))
        assert torch.equal(batch["probabilities"].argmax(1), batch["prediction"])


def test_regression_predicts_values(tiny_bert, trainer, loader):
    module = classifier(tiny_bert, num_labels=1)
    (batch,) = trainer().predict(module, loader(count=4, regression=True))
    assert batch.keys() == {"prediction"}
    assert batch["prediction"].shape == (4,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_labels": 0}, "num_labels must be at least 1; got 0"),
        ({"num_labels": 2, "label_names": ["a"]}, r"num_labels is 2, but label_names has 1: \['a'\]"),
    ],
)
def test_labels_out_of_range_are_errors(options, message, tiny_bert):
    with pytest.raises(ls.UsageError, match=message):
        classifier(tiny_bert, **options)


def test_an_unfit_metric_is_an_error_before_anything_is_trained(tiny_bert):
    with pytest.raises(ls.UsageError, match="pearson"):
        classifier(tiny_bert, num_labels=2, metrics=["pearson"]).configure_model()
