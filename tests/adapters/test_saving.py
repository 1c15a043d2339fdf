"""What save_pretrained and its like do while adapters are in a model."""

import copy
import io

import pytest
import torch
from backbones import build_tiny
from huggingface_hub import HfApi
from programs import run
from torch import nn
from transformers import BertForSequenceClassification, LlamaForCausalLM, Trainer, TrainingArguments

import lit_sparse as ls
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
REFUSAL = r"of a \w+ with adapters would write weights that from_pretrained cannot load. Call lit_sparse.export_merged"


def adapted() -> LlamaForCausalLM:
    model = build_tiny(LlamaForCausalLM).eval()
    for adapter in ls.inject(model, ls.LoRA()).values():
        nn.init.normal_(adapter.lora_B_t)
    return model


@pytest.mark.parametrize(
    "made_of",
    [
        lambda model: model,
        copy.deepcopy,
        lambda model: torch.load(_pickled(model), weights_only=False),
        lambda model: model.compile() or model,
        lambda model: model.model,
    ],
    ids=["live", "copied", "pickled", "compiled", "its body"],
)
def test_a_live_model_is_not_saved(made_of, tmp_path, monkeypatch):
    model = made_of(adapted())
    with pytest.raises(UsageError, match=f"save_pretrained {REFUSAL}"):
        model.save_pretrained(tmp_path / "folder")
    with pytest.raises(UsageError, match=f"save_pretrained {REFUSAL}"):
        model.save_pretrained(tmp_path / "folder", state_dict=model.state_dict())
    # Nothing may be made on the hub before the refusal.
    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: pytest.fail("a repository was made"))
    with pytest.raises(UsageError, match=f"push_to_hub {REFUSAL}"):
        model.push_to_hub("me/model")
    assert not (tmp_path / "folder").exists()


def test_a_model_around_the_adapted_one_is_not_saved(tmp_path):
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model.bert, ls.LoRA(["query"]))
    with pytest.raises(UsageError, match=REFUSAL):
        model.save_pretrained(tmp_path / "folder")


def test_a_layer_put_in_by_hand_counts(tmp_path):
    model = build_tiny(LlamaForCausalLM)
    model.model.layers[0].mlp.up_proj = LowRankLinear(model.model.layers[0].mlp.up_proj, rank=2, scale=1.0)
    with pytest.raises(UsageError, match=REFUSAL):
        model.save_pretrained(tmp_path / "folder")


@pytest.mark.slow
def test_a_pickle_is_guarded_where_nothing_was_injected(tmp_path):
    torch.save(adapted(), tmp_path / "model.pt")
    code = "import torch; torch.load('model.pt', weights_only=False).save_pretrained('folder')"
    done = run(["-c", code], cwd=tmp_path)
    assert "UsageError: save_pretrained of a LlamaForCausalLM with adapters" in done.stderr
    assert not (tmp_path / "folder").exists()


def test_the_trainer_of_transformers_is_refused_with_what_to_do(tmp_path):
    model = adapted()
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    arguments = {"output_dir": str(tmp_path / "run"), "report_to": [], "use_cpu": True, "max_steps": 1}
    trainer = Trainer(model, TrainingArguments(**arguments, save_steps=1), train_dataset=rows)
    with pytest.raises(UsageError, match=r"for transformers' Trainer set save_strategy='no'\."):
        trainer.train()
    Trainer(model, TrainingArguments(**arguments, save_strategy="no"), train_dataset=rows).train()


def test_a_plain_model_is_saved_as_ever(tmp_path):
    model = adapted()
    expected = model(IDS).logits
    ls.merge(model)
    model.save_pretrained(tmp_path / "merged")
    found = LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()(IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    build_tiny(LlamaForCausalLM).save_pretrained(tmp_path / "never adapted")


def test_the_state_of_a_live_model_is_the_users_own():
    model, other = adapted(), adapted()
    torch.save(model.state_dict(), buffer := io.BytesIO())
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(IDS).logits, model(IDS).logits)


def _pickled(model: nn.Module) -> io.BytesIO:
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return buffer
