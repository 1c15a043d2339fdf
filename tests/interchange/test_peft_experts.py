"""The weights of experts in PEFT's format, in both directions, against PEFT itself."""

import json

import pytest
import torch
from architectures import ARCHITECTURES
from safetensors.torch import load_file, save_file
from torch import nn
from trained import METHODS, as_trained, logits

import lit_sparse as ls
from lit_sparse.adapters.experts import LowRankExperts
from lit_sparse.interchange.peft_folder import read_peft
from lit_sparse.reporting.sources import read_adapters

peft = pytest.importorskip("peft", minversion="0.19", reason="compares with PEFT, which is not installed")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
FAMILIES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GPT-OSS"]
BOTH = ["gate_up_proj", "down_proj"]
by_family = pytest.mark.parametrize("family", FAMILIES)


def fresh(family):
    """The same model at every call, in float64, which the default implementation of experts does not know."""
    model = next(a for a in ARCHITECTURES if a.name == family).build()
    model.set_experts_implementation("eager")
    return model.double().eval()


def load(folder, family):
    return peft.PeftModel.from_pretrained(fresh(family), folder, autocast_adapter_dtype=False)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


# Ours, read by PEFT.


@by_family
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_peft_computes_what_the_live_model_does(family, method, layout, tmp_path):
    model = as_trained(fresh(family), method)
    experts = [name for name, adapter in ls.adapters_in(model) if isinstance(adapter, LowRankExperts)]
    expected = logits(model, IDS)
    report = ls.export_peft(model, tmp_path / "lora", layout)
    assert report.difference < 1e-10
    config = config_of(tmp_path / "lora")
    assert set(config["target_parameters"]) <= set(experts)
    assert not {*config["target_modules"]} & {*experts}
    loaded = load(tmp_path / "lora", family)
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), IDS), expected, rtol=0, atol=1e-10)
    ours = fresh(family)
    ls.load_peft(ours, tmp_path / "lora")
    torch.testing.assert_close(logits(ours, IDS), expected, rtol=0, atol=1e-10)
    assert (logits(fresh(family), IDS) - expected).abs().max() > 0.01


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:]], ids=["both", "gate_up_proj", "down_proj"])
def test_experts_alone_with_different_ranks_left_in_each(family, targets, tmp_path):
    model = fresh(family)
    adapters = ls.inject(model, ls.SoRA(targets, rank=4, threshold=0.1))
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B_t.normal_(std=0.3)
            gates = adapter.gate.view(4, 4)
            for expert, left in enumerate((3, 0, 2, 1)):
                gates[expert, torch.randperm(4)[left:]] = 0
    expected = logits(model, IDS)
    ls.compact(model)
    ls.export_peft(model, tmp_path / "lora")
    config = config_of(tmp_path / "lora")
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 3, [])
    assert config["target_parameters"] == sorted(adapters)
    torch.testing.assert_close(logits(load(tmp_path / "lora", family), IDS), expected, rtol=0, atol=1e-10)


def test_weights_that_lost_all_ranks_are_zero_in_padded_and_absent_in_ragged(tmp_path):
    for layout in ("padded", "ragged"):
        model = as_trained(fresh("Mixtral"), ls.SoRA(BOTH, rank=2, threshold=0.1))
        nn.init.zeros_(model.model.layers[0].mlp.experts.gate_up_proj.gate)
        nn.init.ones_(model.model.layers[0].mlp.experts.down_proj.gate)
        ls.export_peft(model, tmp_path / layout, layout)
        absent = "model.layers.0.mlp.experts.gate_up_proj"
        assert (absent in config_of(tmp_path / layout)["target_parameters"]) == (layout == "padded")
        loaded = load(tmp_path / layout, "Mixtral")
        torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_transformers_loads_the_folder_by_itself(family, tmp_path):
    model = as_trained(fresh(family))
    ls.export_peft(model, tmp_path / "lora")
    plain = fresh(family)
    plain.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(logits(plain.double(), IDS), logits(model, IDS), rtol=0, atol=1e-6)


def test_the_card_and_the_table_of_a_folder(tmp_path):
    model = as_trained(fresh("Mixtral"))
    ranks = {name: adapter.gate.view(adapter.copies, -1).count_nonzero(1) for name, adapter in ls.adapters_in(model)}
    ls.export_peft(model, tmp_path / "lora", "ragged")
    card = " ".join((tmp_path / "lora" / "README.md").read_text().split())
    assert "The weights of experts are in target_parameters, for PEFT (0.19 or later) and transformers" in card
    stored = read_adapters(tmp_path / "lora")
    assert {layer.name: layer.rank for layer in stored.table} == {n: int(r.sum()) for n, r in ranks.items() if r.any()}
    assert stored.arguments["target_parameters"] == config_of(tmp_path / "lora")["target_parameters"]


def test_layers_that_peft_takes_for_experts_are_refused(tmp_path):
    model = as_trained(fresh("DeepSeek-V3"), ls.LoRA(BOTH, rank=2))
    message = r"PEFT takes \['model.layers.0.mlp.down_proj', .*for weights of experts.*Use save_adapter"
    with pytest.raises(ls.UsageError, match=message):
        ls.export_peft(model, tmp_path / "lora")
    model = as_trained(fresh("DeepSeek-V3"), ls.LoRA(["experts.gate_up_proj", "experts.down_proj"], rank=2))
    ls.export_peft(model, tmp_path / "lora")
    torch.testing.assert_close(
        logits(load(tmp_path / "lora", "DeepSeek-V3"), IDS), logits(model, IDS), rtol=0, atol=1e-10
    )


# PEFT's, read by us.


def save_lora(folder, family, **settings):
    """PEFT's LoRA with random A and B, saved; its logits."""
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "init_lora_weights": False, **settings})
    adapted = peft.get_peft_model(fresh(family), config).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return logits(adapted, IDS)


SETTINGS = {
    "names": {"target_modules": ["q_proj"], "target_parameters": BOTH},
    "one": {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
    "ranks": {
        "target_modules": ["v_proj", "o_proj"],
        "target_parameters": [f"mlp.experts.{name}" for name in BOTH],
        "rank_pattern": {"experts.down_proj": 5, "0.mlp.experts.gate_up_proj": 1},
        "alpha_pattern": {"gate_up_proj": 9},
        "use_rslora": True,
    },
    "a layer of one block": {
        "target_modules": ["q_proj"],
        "layers_to_transform": [1],
        "target_parameters": ["model.layers.1.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"],
    },
}


@by_family
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_folder_in_a_plain_model_is_the_same_function(settings, family, tmp_path):
    expected = save_lora(tmp_path, family, **settings)
    model = fresh(family)
    adapters = ls.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-12)
    assert (logits(fresh(family), IDS) - expected).abs().max() > 0.05
    again = tmp_path / "again"
    ls.export_peft(model, again)
    torch.testing.assert_close(logits(load(again, family), IDS), expected, rtol=0, atol=1e-12)
    assert any(isinstance(adapter, LowRankExperts) for adapter in adapters.values())


@pytest.mark.parametrize("method", [ls.SoRA(BOTH, rank=4, threshold=0.1), ls.RoseLoRA(BOTH, rank=3)], ids=repr)
def test_training_starts_from_a_folder(method, tmp_path):
    expected = save_lora(tmp_path, "GPT-OSS", target_modules=[], target_parameters=BOTH)
    model = fresh("GPT-OSS")
    ls.inject(model, method)
    ls.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=1e-12)


def test_a_router_that_peft_adapts_is_refused(tmp_path):
    save_lora(tmp_path, "Mixtral", target_modules="all-linear")
    with pytest.raises(ls.UsageError, match=r"adapts the target_parameters \['gate.weight'\], which are no three-dim"):
        ls.load_peft(fresh("Mixtral"), tmp_path)


def without_outer(tensors):
    for part in "AB":
        del tensors[f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight"]


def short(tensors):
    for part, dim in (("A", 0), ("B", 1)):
        name = f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight"
        tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 1).contiguous()


def fewer(tensors):
    for part, dim in (("A", 0), ("B", 1)):
        name = f"base_model.model.model.layers.0.mlp.experts.lora_{part}.weight"
        tensors[name] = tensors[name].narrow(dim, 0, tensors[name].shape[dim] - 3).contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_outer, r"Layers without matrices: \['model.layers.0.mlp.experts.down_proj'\]"),
        (short, r"the rank of 'model.layers.0.mlp.experts.down_proj' is 11 by lora_A, 11 by lora_B, and 3 by"),
        (fewer, "12 features to 16 in 3 experts at '.*down_proj', the layer 12 features to 16 in 4 experts"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, message, tmp_path):
    save_lora(tmp_path, "Qwen3-MoE", target_modules=[], target_parameters=BOTH)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ls.UsageError, match=message):
        ls.load_peft(fresh("Qwen3-MoE"), tmp_path)


def test_a_folder_is_read_without_its_model(tmp_path):
    save_lora(tmp_path, "Mixtral", **SETTINGS["names"])
    layers = read_peft(tmp_path).layers
    assert layers["model.layers.1.mlp.experts.down_proj"].ranks == (3,) * 4
    assert layers["model.layers.1.self_attn.q_proj"].ranks == (3,)
    assert not any("base_layer" in name for name in layers)
