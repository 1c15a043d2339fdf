"""A backbone that comes with a classifier of its own: whose classes are whose."""

import warnings

import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_roberta
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, BertForTokenClassification

import lit_sparse as ls
from lit_sparse.modules.labels import name_classes

OWN = ["contradiction", "entailment", "neutral"]
OTHER = ["Entailment", "NEUTRAL", "contradiction"]  # another order and case, each class at another number


class Rows(LightningDataModule):
    """The classes that the published model itself gives, under the data's numbers."""

    def __init__(self, folder: str, names: list[str]) -> None:
        super().__init__()
        self.label_names, self.num_labels = names, len(names)
        published = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        ids = torch.randint(5, 60, (24, 8))
        with torch.no_grad():
            given = published(ids).logits.argmax(-1).tolist()
        wanted = [name.casefold() for name in names]
        self.rows = [
            {"input_ids": row, "labels": torch.tensor(wanted.index(OWN[number]))}
            for row, number in zip(ids, given, strict=True)
        ]

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=8)

    predict_dataloader = train_dataloader = val_dataloader


def published(folder, save=save_tiny_bert, names=OWN):
    """A classifier whose classes have names, far enough apart that all are given."""
    save(folder, num_labels=len(names), id2label=dict(enumerate(names)), initializer_range=0.6)
    return str(folder)


@pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_roberta], ids=["one layer", "two layers"])
@pytest.mark.parametrize("names", [OWN, OTHER], ids=["same order", "another order"])
@pytest.mark.parametrize("built", [False, True], ids=["by name", "built"])
def test_the_untouched_model_is_right_whatever_the_datas_order(save, names, built, tmp_path, trainer):
    folder = published(tmp_path / "published", save)
    data = Rows(folder, names)
    backbone = AutoModelForSequenceClassification.from_pretrained(folder) if built else folder
    module = ls.SequenceClassification(backbone, ls.LoRA(["query"], rank=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*classes.*")
        (found,) = trainer().validate(module, data, verbose=False)
    assert found["val_accuracy"] == 1.0
    assert list(module.model.config.id2label.values()) == names
    assert module.model.config.label2id == {name: number for number, name in enumerate(names)}


def test_an_export_has_the_datas_order_and_names(tmp_path, trainer):
    folder = published(tmp_path / "published")
    data = Rows(folder, OTHER)
    module = ls.SequenceClassification(folder, ls.LoRA(["query"], rank=2))
    run = trainer(max_steps=1, default_root_dir=tmp_path)
    run.fit(module, data)
    run.save_checkpoint(tmp_path / "run.ckpt")
    expected = module.model.eval()(data.rows[0]["input_ids"][None]).logits
    ls.export_checkpoint(str(tmp_path / "run.ckpt"), str(tmp_path / "merged"), "merged")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(loaded(data.rows[0]["input_ids"][None]).logits, expected, rtol=0, atol=1e-5)
    assert list(loaded.config.id2label.values()) == OTHER


def test_other_names_are_warned_of_and_the_head_is_kept(tmp_path, trainer):
    folder = published(tmp_path / "published", names=["negative", "neutral", "positive"])
    module = ls.SequenceClassification(folder, ls.LoRA(["query"], rank=2))
    head = AutoModelForSequenceClassification.from_pretrained(folder).classifier.weight
    message = r"head has the classes \['negative', 'neutral', 'positive'\], the data \['contradiction', .* is kept"
    data = Rows(published(tmp_path / "other"), OWN)
    with pytest.warns(UserWarning, match=message):
        trainer().validate(module, data, verbose=False)
    assert torch.equal(module.model.classifier.weight, head)
    assert list(module.model.config.id2label.values()) == OWN


def test_a_new_head_takes_the_datas_names_in_silence(tmp_path, trainer):
    folder = save_tiny_bert(tmp_path / "base")  # two classes without names
    module = ls.SequenceClassification(folder, ls.LoRA(["query"], rank=2))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*classes.*")
        trainer().validate(module, Rows(published(tmp_path / "other"), OWN), verbose=False)
    assert list(module.model.config.id2label.values()) == OWN


@pytest.mark.parametrize("train_head", [False, ["bert.pooler"]])
def test_a_frozen_head_in_another_order_is_refused(train_head, tmp_path, trainer):
    folder = published(tmp_path / "published")
    module = ls.SequenceClassification(folder, ls.LoRA(["query"], rank=2, train_head=train_head))
    message = r"classes are \['contradiction', 'entailment', 'neutral'\], in another order .* its head stays frozen"
    with pytest.raises(ls.UsageError, match=message):
        trainer().validate(module, Rows(folder, OTHER), verbose=False)


def test_tags_are_ordered_too():
    tags = ["O", "B-PER", "I-PER"]
    model = build_tiny(BertForTokenClassification, num_labels=3, id2label=dict(enumerate(tags)))
    before = model.classifier.weight.clone()
    name_classes(model, ["I-per", "O", "B-per"], True)
    assert torch.equal(model.classifier.weight, before[[2, 0, 1]])


def test_names_that_differ_in_case_only_among_themselves_say_nothing():
    model = build_tiny(BertForTokenClassification, num_labels=2, id2label={0: "a", 1: "A"})
    before = model.classifier.weight.clone()
    with pytest.warns(UserWarning, match="The head is kept"):
        name_classes(model, ["A", "a"], True)
    assert torch.equal(model.classifier.weight, before)
