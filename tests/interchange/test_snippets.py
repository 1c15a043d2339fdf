"""The code on every card, run as it stands, and the labels and tokenizers beside it."""

import json
import re

import peft
import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_llama, save_tiny_vit, save_tiny_wav2vec2
from huggingface_hub import HfApi, ModelCard
from trained import as_trained, logits
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertForSequenceClassification,
)

import lit_sparse as ls

WRITERS = {
    "peft": ls.export_peft,
    "sparse": ls.save_adapter,
    "delta": ls.export_delta,
    "merged": ls.export_merged,
}
NAMES = ["good", 'not "good"', "gut & günstig"]
IDS = torch.tensor([[5, 6, 7, 8]])


def code_of(folder):
    return re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]


def metadata(folder):
    return json.loads((folder / "lit_sparse.json").read_text())


def classifier(folder, auto=AutoModelForSequenceClassification, names=NAMES):
    """A backbone with two unnamed classes, as most are, and a new head with names of its own."""
    labels = {"num_labels": len(names), "id2label": dict(enumerate(names)), "ignore_mismatched_sizes": True}
    return as_trained(auto.from_pretrained(folder, **labels))


@pytest.mark.parametrize("form", WRITERS)
def test_the_code_of_a_classifiers_card_runs_and_prints_our_label(form, tmp_path, capsys):
    base = save_tiny_bert(tmp_path / "model")  # a name that says nothing
    model = classifier(base)
    expected = logits(model, IDS)
    text = dict(AutoTokenizer.from_pretrained(base)("An example of a text.", return_tensors="pt"))
    label = NAMES[int(logits(model, text).argmax())]
    WRITERS[form](model, tmp_path / form, tolerance=1e-3)
    names = {}
    capsys.readouterr()
    exec(compile(code_of(tmp_path / form), form, "exec"), names)  # noqa: S102
    assert capsys.readouterr().out == f"{label}\n"
    torch.testing.assert_close(logits(names["model"], IDS), expected, rtol=0, atol=1e-4)
    assert isinstance(names["model"], peft.PeftModel) == (form == "peft")
    assert list(names["model"].config.id2label.values()) == NAMES
    assert names["tokenizer"].name_or_path == str(tmp_path / form)
    assert metadata(tmp_path / form)["labels"] == NAMES
    assert "0: good, 1: " in (tmp_path / form / "README.md").read_text()


@pytest.mark.parametrize("form", WRITERS)
def test_the_code_of_a_card_prints_several_labels(form, tmp_path, capsys):
    base = save_tiny_bert(tmp_path / "model", initializer_range=0.6)
    model = classifier(base)
    model.config.problem_type = "multi_label_classification"
    text = dict(AutoTokenizer.from_pretrained(base)("An example of a text.", return_tensors="pt"))
    found = logits(model, text)[0]
    with torch.no_grad():
        model.classifier.bias += torch.tensor([1.0, 1.0, -1.0]) - found  # the first two labels apply
    WRITERS[form](model, tmp_path / form, tolerance=1e-3)
    names = {}
    capsys.readouterr()
    exec(compile(code_of(tmp_path / form), form, "exec"), names)  # noqa: S102
    assert capsys.readouterr().out == f"{NAMES[:2]}\n"
    assert names["model"].config.problem_type == "multi_label_classification"
    assert list(names["model"].config.id2label.values()) == NAMES


@pytest.mark.parametrize("form", WRITERS)
def test_the_code_of_a_language_models_card_runs(form, tmp_path, monkeypatch, capsys):
    save_tiny_llama(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = as_trained(AutoModelForCausalLM.from_pretrained("base"))
    expected = logits(model, IDS)
    WRITERS[form](model, f"runs/{form}", tolerance=1e-3)
    code = code_of(tmp_path / "runs" / form)
    assert str(tmp_path) not in code  # folders as the user named them
    names = {}
    exec(compile(code, form, "exec"), names)  # noqa: S102
    assert capsys.readouterr().out.strip()
    torch.testing.assert_close(logits(names["model"], IDS), expected, rtol=0, atol=1e-4)
    assert metadata(tmp_path / "runs" / form)["labels"] is None
    assert "Labels" not in (tmp_path / "runs" / form / "README.md").read_text()


@pytest.mark.parametrize(
    ("save", "auto"),
    [
        (save_tiny_bert, AutoModelForTokenClassification),
        (save_tiny_vit, AutoModelForImageClassification),
        (save_tiny_wav2vec2, AutoModelForAudioClassification),
    ],
    ids=["tags", "images", "sounds"],
)
def test_the_code_of_other_tasks_runs(save, auto, tmp_path):
    model = classifier(save(tmp_path / "base"), auto)
    ls.save_adapter(model, tmp_path / "sparse")
    names = {}
    exec(compile(code_of(tmp_path / "sparse"), "card", "exec"), names)  # noqa: S102
    assert list(names["model"].config.id2label.values()) == NAMES
    assert "tokenizer" in names or "processor" in names


@pytest.mark.parametrize("names", [["LABEL_0"], ["LABEL_0", "LABEL_1"], [f"LABEL_{i}" for i in range(5)]], ids=len)
def test_labels_without_names_are_only_counted(names, tmp_path):
    model = classifier(save_tiny_bert(tmp_path / "base"), names=names)
    ls.export_peft(model, tmp_path / "peft", tolerance=1e-3)
    code = code_of(tmp_path / "peft")
    assert ("num_labels" in code) == (len(names) != 2)
    assert "labels =" not in code
    exec(compile(code, "card", "exec"), {})  # noqa: S102


def test_peft_and_transformers_load_the_folder_as_they_did_without_our_files(tmp_path):
    """No config.json beside: transformers would take the folder for a whole model. PEFT enlarges no embedding."""
    model = classifier(save_tiny_bert(tmp_path / "base", vocab_size=200), names=["LABEL_0", "LABEL_1"])
    expected = logits(model, IDS)
    ls.export_peft(model, tmp_path / "lora")
    assert "tokenizer.json" in {file.name for file in (tmp_path / "lora").iterdir()}
    for auto in (peft.AutoPeftModelForSequenceClassification, AutoModelForSequenceClassification):
        loaded = auto.from_pretrained(str(tmp_path / "lora"))
        torch.testing.assert_close(logits(loaded, IDS), expected, rtol=0, atol=1e-4)


def test_a_pushed_folder_is_loaded_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
    about = ls.Provenance(base_model="google/bert")
    for form, loads in {
        "peft": 'PeftModel.from_pretrained(model, "me/x")',
        "sparse": 'ls.from_pretrained("me/x", backbone="google/bert")',
    }.items():
        model = as_trained(BertForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "base")))
        WRITERS[form](model, tmp_path / form, provenance=about, push_to_hub="me/x")
        code = code_of(tmp_path / form)
        assert loads in code
        assert '"google/bert"' in code
        assert str(tmp_path) not in code


@pytest.mark.parametrize(
    ("name", "on_hub"),
    [
        ("microsoft/deberta-v3-base", "microsoft/deberta-v3-base"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/huggingface/hub/models--google--bert/snapshots/0123", "google/bert"),
        ("/home/me/model", None),
        ("./model", None),
        (None, None),
    ],
)
def test_only_names_of_the_hub_are_given_as_base_model(name, on_hub, tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification))
    ls.save_adapter(model, tmp_path / "sparse", provenance=ls.Provenance(base_model=name))
    assert ModelCard.load(tmp_path / "sparse" / "README.md").data.base_model == on_hub
