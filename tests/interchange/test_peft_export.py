"""lit_sparse.interchange.peft_export: what it writes, read by the installed PEFT and by transformers."""

import importlib.util
import json
import math
import re
import sys

import pytest
import torch
from backbones import build_tiny
from safetensors.torch import load_file
from torch import nn
from trained import ROSELORA, SORA, as_trained, logits
from transformers import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DebertaV2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    RobertaForSequenceClassification,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.interchange.peft_folder import read_peft

peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)}
BOTH = {"input_ids": IDS, "decoder_input_ids": IDS[:, :2]}
MODELS = {
    "BERT": (BertForSequenceClassification, IDS, "SEQ_CLS"),
    "GPT-2": (GPT2LMHeadModel, IDS, "CAUSAL_LM"),
    "Llama": (LlamaForCausalLM, IDS, "CAUSAL_LM"),
    "T5": (T5ForConditionalGeneration, BOTH, "SEQ_2_SEQ_LM"),
    "ViT": (ViTForImageClassification, IMAGES, None),
    "two-layer head": (RobertaForSequenceClassification, IDS, "SEQ_CLS"),
    "shared layers": (AlbertForSequenceClassification, IDS, "SEQ_CLS"),
    "two heads": (DebertaV2ForSequenceClassification, IDS, "SEQ_CLS"),
}
by_model = pytest.mark.parametrize(("model_class", "inputs", "task"), MODELS.values(), ids=MODELS)


def fresh(model_class=BertForSequenceClassification, **config):
    """In float64, so that differences of rounding are far below those of formulas."""
    return build_tiny(model_class, **config).double()


def load(model, folder):
    """PEFT's model, in the precision of ``model``."""
    return peft.PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False)


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def live_ranks_of(model):
    """Ranks that change the output, by layer name: counted on the rows of A and of gate · Bᵀ."""
    live = {n: a.lora_A.any(1) & a.scaled_lora_B_t().any(1) for n, a in ls.adapters_in(model)}
    return {name: int(rows.sum()) for name, rows in live.items()}


def lora_layers(model):
    return {name for name, module in model.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}


@by_model
@pytest.mark.parametrize("layout", ["ragged", "padded"])
def test_peft_computes_what_the_live_model_does(model_class, inputs, task, layout, tmp_path):
    model = as_trained(fresh(model_class))
    expected = logits(model, inputs)
    report = ls.export_peft(model, tmp_path / "lora", layout=layout)
    assert report.difference < 1e-10
    assert config_of(tmp_path / "lora")["task_type"] == task
    loaded = load(fresh(model_class), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), expected, rtol=0, atol=1e-10)
    assert torch.equal(logits(model, inputs), expected)  # left as it was


@pytest.mark.parametrize(("model_class", "inputs"), [MODELS[n][:2] for n in ("BERT", "GPT-2", "Llama", "T5")])
def test_peft_agrees_in_float32(model_class, inputs, tmp_path):
    model = as_trained(build_tiny(model_class))
    expected = logits(model, inputs)
    assert ls.export_peft(model, tmp_path / "lora").difference < 1e-5
    loaded = peft.PeftModel.from_pretrained(build_tiny(model_class), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("model_class", [BertForSequenceClassification, GPT2LMHeadModel])
def test_transformers_loads_the_folder_by_itself(model_class, layout, tmp_path):
    model = as_trained(build_tiny(model_class))
    ls.export_peft(model, tmp_path / "lora", layout)
    plain = build_tiny(model_class)
    plain.load_adapter(str(tmp_path / "lora"))
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", [SORA, ROSELORA], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_the_configuration_scales_nothing_and_names_what_is_adapted(layout, method, tmp_path):
    model = as_trained(fresh(), method)
    ls.export_peft(model, tmp_path / "lora", layout)
    config = config_of(tmp_path / "lora")
    ranks = live_ranks_of(model)
    largest = max(ranks.values())
    assert (config["r"], config["lora_alpha"]) == (largest, largest)
    assert (min(ranks.values()) == 0) == (method is SORA)
    if layout == "padded":
        ranks = dict.fromkeys(ranks, largest)
    assert config["target_modules"] == [name for name, rank in ranks.items() if rank]
    assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank not in (0, largest)}
    assert config["alpha_pattern"] == config["rank_pattern"]
    lora = read_peft(tmp_path / "lora")
    assert {name: layer.lora_A.shape[0] for name, layer in lora.layers.items()} == {n: r for n, r in ranks.items() if r}
    assert all(layer.scale == 1 for layer in lora.layers.values())
    loaded = load(fresh(), tmp_path / "lora")
    assert lora_layers(loaded) == {f"base_model.model.{name}" for name, rank in ranks.items() if rank}
    assert "lit_sparse" not in json.dumps(config)
    assert json.loads((tmp_path / "lora" / "lit_sparse.json").read_text())["format"] == "peft"


def test_layers_1_and_11_are_not_taken_for_each_other(tmp_path):
    settings = {"num_hidden_layers": 12}
    model = as_trained(fresh(**settings))
    ls.export_peft(model, tmp_path / "lora")
    loaded = load(fresh(**settings), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-10)
    names = config_of(tmp_path / "lora")["target_modules"]
    assert len(names) > 20  # from where on PEFT shortens the list
    assert lora_layers(loaded) == {f"base_model.model.{name}" for name in names}


@pytest.mark.parametrize("method", [SORA, ls.SoRA(rank=4, threshold=0.1, train_head=False)], ids=["trained", "frozen"])
def test_without_a_head_the_base_models_own_stays(method, tmp_path):
    model = as_trained(fresh(), method)
    assert ls.export_peft(model, tmp_path / "lora", with_head=False).difference < 1e-10
    assert config_of(tmp_path / "lora")["modules_to_save"] is None
    base = fresh()
    base.classifier.load_state_dict(model.classifier.state_dict())
    loaded = load(base, tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-10)


def test_a_head_has_the_names_that_peft_gives(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification))
    report = ls.export_peft(model, tmp_path / "lora")
    saved = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert torch.equal(saved["base_model.model.classifier.weight"], model.classifier.weight)
    assert {n for n in saved if "lora_" not in n} == {f"base_model.model.classifier.{p}" for p in ("weight", "bias")}
    assert report.head_parameters == 66


@pytest.mark.parametrize(("layout", "count"), [("padded", 13), ("ragged", 1)])
def test_when_everything_is_pruned_one_rank_of_zeros_is_left(layout, count, tmp_path):
    model = as_trained(fresh())
    for _, adapter in ls.adapters_in(model):
        nn.init.zeros_(adapter.gate)
    report = ls.export_peft(model, tmp_path / "lora", layout)
    assert (report.remaining_parameters, report.difference) == (0, 0)
    assert config_of(tmp_path / "lora")["r"] == 1
    loaded = load(fresh(), tmp_path / "lora")
    assert len(lora_layers(loaded)) == count
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-12)


def test_a_rank_with_a_zero_row_of_a_or_b_is_dropped(tmp_path):
    model = fresh()
    adapters = ls.inject(model, ls.LoRA(["query"], rank=4))
    with torch.no_grad():
        for adapter in adapters.values():
            nn.init.ones_(adapter.lora_B_t)
            adapter.lora_A[0] = 0
            adapter.lora_B_t[2] = 0
    ls.export_peft(model, tmp_path / "lora")
    assert config_of(tmp_path / "lora")["r"] == 2
    A = load_file(tmp_path / "lora" / "adapter_model.safetensors")[
        "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    ]
    assert torch.equal(A, next(iter(adapters.values())).lora_A[[1, 3]])  # bit for bit: gate and scale are in B


@pytest.mark.parametrize("pruned", [False, True])
def test_embeddings_and_convolutions(pruned, tmp_path):
    model = as_trained(fresh(LlamaForCausalLM), ls.SoRA(["embed_tokens", "q_proj"], rank=4, threshold=0.1))
    for _, adapter in ls.adapters_in(model):
        nn.init.ones_(adapter.gate)
    if pruned:
        nn.init.zeros_(model.model.embed_tokens.gate)
    ls.export_peft(model, tmp_path / "embedding")
    loaded = load(fresh(LlamaForCausalLM), tmp_path / "embedding")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-10)
    assert any("lora_embedding_A" in name for name in load_file(tmp_path / "embedding" / "adapter_model.safetensors"))

    model = as_trained(fresh(ViTForImageClassification), ls.LoRA(["projection", "q_proj"], rank=3))
    if pruned:
        nn.init.zeros_(model.vit.embeddings.patch_embeddings.projection.lora_B_t)
    ls.export_peft(model, tmp_path / "convolution")
    loaded = load(fresh(ViTForImageClassification), tmp_path / "convolution")
    torch.testing.assert_close(logits(loaded, IMAGES), logits(model, IMAGES), rtol=0, atol=1e-10)
    torch.testing.assert_close(logits(loaded.merge_and_unload(), IMAGES), logits(model, IMAGES), rtol=0, atol=1e-10)


class Twice(nn.Module):
    """Two layers, the name of one of which is the end of the other's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.block = nn.ModuleDict({"fc": nn.Linear(3, 3)})

    def forward(self, x):
        return self.block["fc"](self.fc(x))


@pytest.mark.parametrize("targets", ["fc", "fc|block.fc"])
def test_a_name_that_ends_another_means_one_layer(targets, tmp_path):
    torch.manual_seed(3)
    plain = Twice()
    model = Twice()
    model.load_state_dict(plain.state_dict())
    as_trained(model, ls.SoRA(targets, rank=4, threshold=0.1))
    for number, (_, adapter) in enumerate(ls.adapters_in(model)):
        nn.init.ones_(adapter.gate[: 2 + number])
    x = {"x": torch.randn(5, 3)}
    ls.export_peft(model, tmp_path / "lora", "ragged", batch=x)
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "lora")
    torch.testing.assert_close(loaded(**x), model(**x), rtol=0, atol=1e-6)
    assert len(lora_layers(loaded)) == len(dict(ls.adapters_in(model)))
    config = config_of(tmp_path / "lora")
    assert config["target_modules"] == ("fc" if targets == "fc" else ["fc", "block.fc"])
    assert config["rank_pattern"] == ({} if targets == "fc" else {"^fc": 2})


@pytest.mark.parametrize(
    ("model_class", "task"),
    [
        (BertForTokenClassification, "TOKEN_CLS"),
        (LlamaForQuestionAnswering, "QUESTION_ANS"),
        (BertModel, "FEATURE_EXTRACTION"),
    ],
)
def test_the_task_is_told_from_the_model(model_class, task, tmp_path):
    model = as_trained(build_tiny(model_class), ls.LoRA(rank=2))
    ls.export_peft(model, tmp_path / "lora")
    assert config_of(tmp_path / "lora")["task_type"] == task
    loaded = peft.PeftModel.from_pretrained(build_tiny(model_class), tmp_path / "lora").eval()
    with torch.no_grad():
        # In float64: one of these backbones makes 1e-4 of what float32 rounds, whoever computes.
        found, expected = loaded.double()(input_ids=IDS)[0], model.double()(input_ids=IDS)[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_conv1d_is_said_to_be_stored_transposed(tmp_path):
    ls.export_peft(as_trained(build_tiny(GPT2LMHeadModel)), tmp_path / "lora")
    assert config_of(tmp_path / "lora")["fan_in_fan_out"] is True


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_training_goes_on_from_an_export(layout, tmp_path):
    model = as_trained(fresh())
    ls.export_peft(model, tmp_path / "lora", layout)
    again = fresh()
    adapters = ls.load_peft(again, tmp_path / "lora")
    torch.testing.assert_close(logits(again, IDS), logits(model, IDS), rtol=0, atol=1e-10)
    ranks = {layer.name: layer.rank for layer in layer_sparsity(again)}
    assert ranks == {name: rank for name, rank in live_ranks_of(model).items() if name in ranks}
    # A rank with A and B at zero would have no gradient: it could not be trained again.
    assert all(adapter.lora_A.any(1).all() for adapter in adapters.values())


def test_a_ragged_file_has_the_size_of_what_remains(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4}
    model = as_trained(build_tiny(BertForSequenceClassification, **wide), ls.SoRA(rank=16, threshold=0.1))
    report = ls.export_peft(model, tmp_path / "lora", "ragged")
    remaining = sum(
        int((adapter.gate != 0).sum()) * (adapter.in_features + adapter.out_features)
        for _, adapter in ls.adapters_in(model)
    )
    assert report.remaining_parameters == remaining
    assert math.isclose(report.bytes, 4 * (remaining + report.head_parameters), rel_tol=0.02)
    assert report.bytes == (tmp_path / "lora" / "adapter_model.safetensors").stat().st_size


# What is refused.


class Grouped(nn.Module):
    """Convolutions that PEFT has no LoRA for."""

    def __init__(self, **settings):
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, padding=1, **settings)
        self.second = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 2}, r"\['first'\] is a convolution with groups"),
        ({"dilation": 2}, "with dilation or other padding than zeros"),
        ({"padding_mode": "reflect"}, "with dilation or other padding than zeros"),
    ],
)
def test_convolutions_that_peft_has_not_are_refused(settings, message, tmp_path):
    model = as_trained(Grouped(**settings), ls.LoRA(["first", "second"], rank=2))
    with pytest.raises(ls.UsageError, match=rf"PEFT cannot express.*{message}.*Use save_adapter"):
        ls.export_peft(model, tmp_path / "lora", batch={"x": torch.ones(1, 4, 5, 5)})


def test_a_layer_under_two_names_is_refused(tmp_path):
    model = Twice()
    model.block["fc"] = model.fc
    as_trained(model, ls.LoRA(["fc"], rank=2))
    with pytest.raises(ls.UsageError, match="has several names, of which PEFT would adapt one"):
        ls.export_peft(model, tmp_path / "lora", batch={"x": torch.ones(1, 3)})


def test_weights_that_pissa_changed_are_refused(tmp_path):
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.LoRA(["query"], rank=2, init_weights="pissa"))
    for write in (ls.export_peft, ls.save_adapter, ls.export_delta):
        with pytest.raises(
            ls.UsageError, match=r"2 adapters started as a part of the frozen weights.*Export the whole model"
        ):
            write(model, tmp_path / "lora")


def test_a_tied_head_is_saved_under_both_names(tmp_path):
    model = as_trained(fresh(GPT2LMHeadModel), ls.LoRA(["c_attn"], rank=2, train_head=["lm_head"]))
    ls.export_peft(model, tmp_path / "lora")
    assert config_of(tmp_path / "lora")["modules_to_save"] == ["transformer.wte", "lm_head"]
    loaded = load(fresh(GPT2LMHeadModel), tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-10)


def test_a_parameter_beside_an_adapter_is_refused(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification), ls.LoRA(["query"], rank=2))
    model.bert.encoder.layer[0].attention.self.query.base.bias.requires_grad_(True)
    with pytest.raises(ls.UsageError, match=r"self.query.bias' is trained beside adapters in one module"):
        ls.export_peft(model, tmp_path / "lora")


def test_a_head_that_peft_would_not_tell_from_another_module_is_refused(tmp_path):
    class Named(Twice):
        def __init__(self):
            super().__init__()
            self.c = nn.Linear(3, 3)

        def forward(self, x):
            return self.c(super().forward(x))

    model = as_trained(Named(), ls.LoRA("block.fc", rank=2, train_head=["c"]))
    with pytest.raises(
        ls.UsageError,
        match=r"The head \['c'\] cannot be written for PEFT, which would take \['block.fc', 'fc'\] for it",
    ):
        ls.export_peft(model, tmp_path / "lora", batch={"x": torch.ones(1, 3)})


def test_an_unknown_layout_is_refused(tmp_path):
    with pytest.raises(ls.UsageError, match=re.escape("layout must be 'ragged' or 'padded'; got 'square'.")):
        ls.export_peft(as_trained(fresh()), tmp_path / "lora", layout="square")


# Read back.


def test_without_peft_our_own_reader_checks_and_the_card_says_so(tmp_path, monkeypatch):
    model = as_trained(fresh())
    assert "lit_sparse's own reader" not in str(ls.export_peft(model, tmp_path / "with"))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    monkeypatch.setitem(sys.modules, "peft", None)
    report = ls.export_peft(model, tmp_path / "without")
    assert report.difference < 1e-10
    for text in (str(report), (tmp_path / "without" / "README.md").read_text()):
        assert "PEFT was not installed when this folder was written: lit_sparse's own reader checked it" in text
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_folder_that_peft_cannot_read_is_not_kept(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no such thing")

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", fail)
    with pytest.raises(ls.UsageError, match="PEFT cannot load the LoRA that was written: no such thing"):
        ls.export_peft(as_trained(fresh()), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []


def test_what_peft_computes_otherwise_is_not_kept(tmp_path, monkeypatch):
    load = peft.PeftModel.from_pretrained

    def scaled(*args, **kwargs):
        loaded = load(*args, **kwargs)
        for layer in loaded.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.scale_layer(2.0)
        return loaded

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", scaled)
    with pytest.raises(ls.UsageError, match="the export as peft gives outputs that differ"):
        ls.export_peft(as_trained(fresh()), tmp_path / "lora")
    assert list(tmp_path.iterdir()) == []
