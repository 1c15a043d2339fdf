"""SHiRA in PEFT's format: what PEFT reads of ours, and we of PEFT's."""

import json

import pytest
import torch
from backbones import build_tiny
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM

import lit_sparse as ls

peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
MODELS = {"BERT": BertForSequenceClassification, "Llama": LlamaForCausalLM}
by_model = pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)


def plain(kind):
    torch.manual_seed(0)
    return build_tiny(kind).eval()


@torch.no_grad()
def trained(kind, **arguments):
    model = plain(kind)
    ls.inject(model, ls.SHiRA(**{"changed": 0.1, **arguments}))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@by_model
def test_peft_computes_what_the_live_model_does(kind, tmp_path):
    model = trained(kind)
    report = ls.export_peft(model, tmp_path / "out")
    assert report.difference <= 1e-5
    loaded = peft.PeftModel.from_pretrained(plain(kind), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert type(loaded.peft_config["default"]) is peft.ShiraConfig
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-5, atol=1e-5)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    r = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"]
    for name, adapter in ls.adapters_in(model):
        key = f"base_model.model.{name}.shira_"
        assert len(stored[f"{key}weight"]) == r * (adapter.in_features + adapter.out_features)
        places = stored[f"{key}indices"]
        assert len({tuple(place) for place in places.t().tolist()}) == places.shape[1]  # PEFT may train them all
        dense = torch.zeros(adapter.weight_shape).index_put(tuple(places.long()), stored[f"{key}weight"])
        torch.testing.assert_close(dense, adapter.delta_weight())


@by_model
def test_the_folder_is_read_back_with_its_places(kind, tmp_path):
    model, fresh = trained(kind), plain(kind)
    ls.export_peft(model, tmp_path / "out")
    adapters = ls.load_peft(fresh, tmp_path / "out")
    for name, adapter in ls.adapters_in(model):
        assert torch.equal(adapters[name].delta_weight(), adapter.delta_weight())
    assert torch.equal(logits(fresh), logits(model))
    assert ls.merge(fresh) is fresh


@by_model
def test_what_peft_trained_is_loaded(kind, tmp_path):
    task = {"task_type": "SEQ_CLS"} if kind is BertForSequenceClassification else {}
    config = peft.ShiraConfig(r=2, random_seed=1, target_modules=r".*(query|value|q_proj|down_proj)", **task)
    model = peft.get_peft_model(plain(kind), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "peft")
    fresh = plain(kind)
    adapters = ls.load_peft(fresh, tmp_path / "peft")
    assert len(adapters) == 4
    assert all(adapter.size == 2 * (adapter.in_features + adapter.out_features) for adapter in adapters.values())
    torch.testing.assert_close(logits(fresh), logits(model.eval()), rtol=1e-5, atol=1e-5)


def test_from_pretrained_loads_the_folder(tmp_path):
    plain(BertForSequenceClassification).save_pretrained(tmp_path / "bert")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "bert")
    ls.inject(model, ls.SHiRA(changed=0.1))
    for _, adapter in ls.adapters_in(model):
        torch.nn.init.normal_(adapter.values, std=0.1)
    model.eval()
    for form, export in (("peft", ls.export_peft), ("delta", ls.export_delta)):
        export(model, tmp_path / form)
        fresh = BertForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
        (ls.load_peft if form == "peft" else ls.load_adapter)(fresh, tmp_path / form)
        torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-5)
    ls.export_merged(model, tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(merged), logits(fresh), rtol=1e-5, atol=1e-5)


def test_a_patch_is_hardly_larger_than_its_values_and_places(tmp_path):
    model = plain(LlamaForCausalLM)
    ls.inject(model, ls.SHiRA(changed=0.3))
    for _, adapter in ls.adapters_in(model):
        torch.nn.init.normal_(adapter.values, std=0.1)
    report = ls.export_delta(model, tmp_path / "out")
    values = sum(adapter.size for _, adapter in ls.adapters_in(model))
    header = int.from_bytes((tmp_path / "out" / "adapter.safetensors").read_bytes()[:8], "little") + 8
    assert report.bytes - header <= 1.2 * values * (4 + 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ls.export_peft(trained(BertForSequenceClassification), "o", layout="ragged"), "layout is for A and B"),
        (lambda: ls.export_peft(trained(GPT2LMHeadModel), "o"), "is a Conv1D, which PEFT's SHiRA does not know"),
        (lambda: ls.export_peft(trained(LlamaForCausalLM, changed=0.99), "o"), r"\(inputs \+ outputs\) entries, and"),
    ],
)
def test_what_peft_cannot_hold_is_refused(make, message):
    with pytest.raises(ls.UsageError, match=message):
        make()


def damaged(folder, **changes):
    """The folder with another configuration or other tensors."""
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(key for key in sorted(tensors) if key.endswith("shira_indices"))
    if "places" in changes:
        tensors[name] = changes["places"](tensors[name])
    if changes.get("lacking"):
        del tensors[name]
    save_file(tensors, file)
    if "target_modules" in changes:
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lacking": True}, "holds no matching shira_weight and shira_indices"),
        ({"places": lambda places: places[:, :3].contiguous()}, "holds no matching shira_weight"),
        ({"places": lambda places: places + 1000}, "changes entries that .* does not have"),
        ({"places": lambda places: places - 1}, "changes entries that .* does not have"),
        ({"places": lambda places: places[:, :1].repeat(1, places.shape[1])}, "holds no matching shira_weight"),
        ({"places": lambda places: places.float()}, "holds no matching shira_weight"),
        ({"target_modules": ["query"]}, "holds entries of .* names .*: the folder is damaged"),
    ],
)
def test_damaged_folders_are_refused(changes, message, tmp_path):
    ls.export_peft(trained(BertForSequenceClassification), tmp_path / "out")
    damaged(tmp_path / "out", **changes)
    with pytest.raises(ls.UsageError, match=message):
        ls.load_peft(plain(BertForSequenceClassification), tmp_path / "out")


def test_no_other_method_starts_from_it(tmp_path):
    ls.export_peft(trained(BertForSequenceClassification), tmp_path / "out")
    model = plain(BertForSequenceClassification)
    ls.inject(model, ls.SoRA())
    with pytest.raises(ls.UsageError, match="holds a SHiRA, from which no other adapters can start"):
        ls.load_peft(model, tmp_path / "out")
    with pytest.raises(ls.UsageError, match=r"holds a SHiRA\. A bank reads one from its checkpoint alone"):
        ls.AdapterBank(plain(BertForSequenceClassification)).add("one", tmp_path / "out")
