"""A stored adapter against its own configuration, tensor by tensor: nothing missing, nothing doubled, nothing more."""

import json
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from backbones import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from trained import SORA, as_trained
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lit_sparse as ls

TARGETS = ["query", "value"]
LAYER = "bert.encoder.layer.0.attention"
FORMS = {
    "peft": (ls.export_peft, ls.load_peft, "adapter_model.safetensors"),
    "sparse": (ls.save_adapter, ls.load_adapter, "adapter.safetensors"),
    "delta": (ls.export_delta, ls.load_adapter, "adapter.safetensors"),
}


def bert():
    return build_tiny(BertForSequenceClassification)


def injected():
    model = bert()
    ls.inject(model, ls.RoseLoRA(TARGETS, rank=4))
    return model


@pytest.fixture(scope="module", params=FORMS)
def stored(request, tmp_path_factory):
    """Format, folder of it, its loader and its tensors."""
    export, load, file = FORMS[request.param]
    folder = tmp_path_factory.mktemp("stored") / "adapter"
    export(as_trained(bert(), ls.RoseLoRA(TARGETS, rank=2, density=0.1)), folder)
    return request.param, folder, load, load_file(folder / file)


def changed(stored, tensors):
    """A copy of the folder with other tensors."""
    form, folder, _, _ = stored
    copy = Path(tempfile.mkdtemp())
    for file in folder.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    save_file(tensors, copy / FORMS[form][2])
    return copy


def refused(stored, tensors):
    copy = changed(stored, tensors)
    for model in (bert(), injected()) if stored[0] == "peft" else (bert(),):
        with pytest.raises(ls.UsageError, match=r"\w"):
            stored[2](model, copy)


def names_of_another(name):
    """Other names for a tensor: of another layer, another part, another file format, misspelt."""
    return [
        name.removeprefix("base_model.model."),
        f"base_model.model.{name}",
        name.replace("query", "key"),
        name.replace("layer.0", "layer.1").replace("query", "output.dense"),
        name.replace("lora_A.weight", "lora_embedding_A").replace("lora_B.weight", "lora_embedding_B"),
        name.replace("lora_A", "lora_B"),
        name.replace(".values", "").replace(".indices", "").replace(".places", ""),
        name.replace(".places", ".indices"),
        name.replace("classifier", "bert.pooler.dense"),
        name.replace("weight", "bias"),
        f"{name}x",
    ]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_dropped_doubled_or_renamed_tensor_is_noticed(stored, data):
    tensors = dict(stored[3])
    name = data.draw(st.sampled_from(sorted(tensors)))
    other = data.draw(st.sampled_from(["", *(n for n in names_of_another(name) if n not in tensors)]))
    keep = data.draw(st.booleans()) if other else False
    if other:
        tensors[other] = tensors[name].clone()
    if not keep:
        del tensors[name]
    refused(stored, tensors)


def test_both_tensors_of_a_layer_are_missed(stored):
    tensors = {name: tensor for name, tensor in stored[3].items() if f"{LAYER}.self.query" not in name}
    assert len(tensors) < len(stored[3])
    refused(stored, tensors)


def test_a_head_is_missed(stored):
    refused(stored, {name: tensor for name, tensor in stored[3].items() if "classifier" not in name})


def test_the_whole_folder_loads(stored):
    stored[2](bert(), changed(stored, stored[3]))


def test_an_entry_that_is_stored_twice_is_noticed(stored):
    tensors = {name: tensor.clone() for name, tensor in stored[3].items()}
    places = [tensor for name, tensor in tensors.items() if name.endswith(".indices")]
    if stored[0] != "sparse":  # PEFT's have no places, and a code has each place once
        assert not places
        return
    places[0].flatten()[1] = places[0].flatten()[0]
    refused(stored, tensors)


# What PEFT's configuration means.


def folder_of(folder, **changes):
    """PEFT's folder of a LoRA on query and value, with another configuration."""
    ls.export_peft(as_trained(bert(), ls.LoRA(TARGETS, rank=2)), folder, layout="ragged")
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"target_modules": r".*\.self\.(query|value)"},
        {"target_modules": ["self.query", "value"]},
        {"target_modules": ["query", "value", "key"], "exclude_modules": ["key"]},
        {"target_modules": TARGETS, "layers_to_transform": [0, 1]},
        {"target_modules": TARGETS, "layers_to_transform": [0, 1], "layers_pattern": "layer"},
        {"target_modules": [*TARGETS, "classifier"]},  # which is saved whole
    ],
)
def test_every_way_to_say_the_same_layers_is_understood(changes, tmp_path):
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    folder = folder_of(tmp_path / "lora", **changes)
    ids = torch.tensor([[5, 6, 7, 8]])
    model = bert()
    ls.load_peft(model, folder)
    found = peft.PeftModel.from_pretrained(bert(), folder).eval()
    torch.testing.assert_close(model.eval()(ids).logits, found(ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["query"]}, r"not targeted: \['.*layer.0.*value', '.*layer.1.*value'\]"),
        ({"target_modules": [*TARGETS, "key"]}, r"without matrices: \['.*layer.0.*key', '.*layer.1.*key'\]"),
        ({"target_modules": "all-linear"}, r"without matrices: \['.*dense'"),
        ({"target_modules": TARGETS, "layers_to_transform": 1}, r"not targeted: \['.*layer.0.*query'"),
        ({"target_modules": TARGETS, "exclude_modules": ".*1.*"}, r"not targeted: \['.*layer.1.*query'"),
        ({"target_modules": None}, "names no target_modules"),
        ({"target_modules": 3}, "holds 3 as target_modules, not names"),
        ({"modules_to_save": None}, r"holds \['classifier.bias', 'classifier.weight'\], for which"),
        ({"modules_to_save": ["classifier", "pooler"]}, r"lacks \['bert.pooler.dense.bias', .* in modules_to_save"),
    ],
)
def test_a_configuration_of_other_layers_is_refused(changes, message, tmp_path):
    folder = folder_of(tmp_path / "lora", **{"target_modules": TARGETS, **changes})
    for model in (bert(), injected()):
        with pytest.raises(ls.UsageError, match=message):
            ls.load_peft(model, folder)


# Two tensors for one.


@pytest.fixture
def two_copies(tmp_path):
    """A LoRA beside which PEFT trained input and output embeddings that the backbone ties."""
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of the same
        adapted = peft.get_peft_model(tied(), config)
        with torch.no_grad():
            adapted.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
        adapted.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def tied():
    return build_tiny(LlamaForCausalLM, tie_word_embeddings=True)


SHARED = r"holds two values for what LlamaForCausalLM shares: .*'lm_head.weight'.*Untie them"


def test_two_values_for_one_shared_tensor_are_refused(two_copies):
    trained = tied()
    ls.inject(trained, ls.LoRA(["q_proj"], train_head=["model.embed_tokens", "lm_head"]))
    for model in (tied(), trained):
        with pytest.raises(ls.UsageError, match=SHARED):
            ls.load_peft(model, two_copies)
    module = ls.CausalLM(tied(), ls.LoRA(["q_proj"]), start_from=str(two_copies))
    with pytest.raises(ls.UsageError, match=SHARED):
        module.configure_model()
    bank = ls.AdapterBank(tied())
    with pytest.raises(ls.UsageError, match=SHARED):
        bank.add("one", two_copies)


def test_two_values_load_where_the_backbone_has_two_tensors(two_copies):
    model = build_tiny(LlamaForCausalLM, tie_word_embeddings=False)
    ls.load_peft(model, two_copies)
    stored = load_file(two_copies / "adapter_model.safetensors")
    assert torch.equal(model.lm_head.weight, stored["base_model.model.lm_head.weight"])


def test_equal_values_for_one_shared_tensor_load(two_copies):
    file = two_copies / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.lm_head.weight"] = tensors["base_model.model.model.embed_tokens.weight"].clone()
    save_file(tensors, file)
    model = tied()
    ls.load_peft(model, two_copies)
    assert torch.equal(model.lm_head.weight, tensors["base_model.model.lm_head.weight"])


def test_a_sparse_folder_with_two_values_for_one_tensor_is_refused(tmp_path):
    untied = build_tiny(LlamaForCausalLM, tie_word_embeddings=False)
    method = ls.SoRA(["q_proj"], rank=2, threshold=0.1, train_head=["model.embed_tokens", "lm_head"])
    ls.save_adapter(as_trained(untied, method), tmp_path / "sparse")
    with pytest.raises(ls.UsageError, match=r"holds two values for what LlamaForCausalLM shares: \['lm_head.weight', "):
        ls.load_adapter(tied(), tmp_path / "sparse")


def test_a_method_of_gates_is_stored_as_the_configuration_says(tmp_path):
    ls.export_peft(as_trained(bert(), SORA), tmp_path / "lora", layout="ragged")
    ls.load_peft(bert(), tmp_path / "lora")
