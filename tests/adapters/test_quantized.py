"""Adapters on layers that torchao or bitsandbytes quantized, loaded as a configuration asks for it."""

import copy
import csv
import functools
import importlib.util
import sys

import pytest
import torch
import transformers
import yaml
from backbones import build_tiny, save_tiny_bert, save_tiny_deberta, save_tiny_gpt2, save_tiny_llama, save_tiny_roberta
from lightning.pytorch import Trainer
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
)
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls
from lit_sparse.adapters.quantized import dequantized, quantized_layers
from lit_sparse.adapters.replacing import replace_modules
from lit_sparse.cli.main import main
from lit_sparse.modules.backbone import load_backbone


def needs(package):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"the extra {package} is not installed")


def torchao_type(name, **arguments):
    return {"quant_method": "torchao", "quant_type": {"default": {"_type": name, "_version": 2, "_data": arguments}}}


INT8 = {"quant_method": "torchao", "quant_type": "Int8WeightOnlyConfig"}
INT8_GROUPS = torchao_type("Int8WeightOnlyConfig", granularity={"_type": "PerGroup", "_data": {"group_size": 32}})
INT4 = torchao_type(
    "IntxWeightOnlyConfig",
    weight_dtype={"_type": "torch.dtype", "_data": "int4"},
    granularity={"_type": "PerGroup", "_data": {"group_size": 32}},
)
DYNAMIC = {"quant_method": "torchao", "quant_type": "Int8DynamicActivationInt8WeightConfig"}
BNB8 = {"load_in_8bit": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NF4_DOUBLE = {**NF4, "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"}

torchao, bitsandbytes = needs("torchao"), needs("bitsandbytes")
EVERY = {
    "torchao int8": (INT8, torchao),
    "torchao int8 in groups": (INT8_GROUPS, torchao),
    "torchao int4": (INT4, torchao),
    "bitsandbytes 8 bit": (BNB8, bitsandbytes),
    "bitsandbytes nf4": (NF4, bitsandbytes),
    "bitsandbytes nf4, double": (NF4_DOUBLE, bitsandbytes),
}
every_kind = pytest.mark.parametrize(
    "quantization", [pytest.param(config, marks=mark, id=name) for name, (config, mark) in EVERY.items()]
)
one_of_each = pytest.mark.parametrize(
    "quantization",
    [pytest.param(*EVERY[name][:1], marks=EVERY[name][1], id=name) for name in ("torchao int8", "bitsandbytes nf4")],
)
WIDE = {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes packs blocks of 64 weights
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SORA = ls.SoRA(rank=4, sparsity_weight=0.5)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), **WIDE, **NO_DROPOUT)


def load(folder, quantization=None, auto_class=AutoModelForSequenceClassification, **arguments):
    if quantization is not None:
        arguments["quantization_config"] = quantization
    return load_backbone(folder, auto_class, **arguments)


def batch(rows=6, length=9):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (rows, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(rows) % 2}


def by_definition(layer):
    """The matrix of a linear map, row by row: what it makes of each unit vector."""
    with torch.no_grad():
        zero, units = torch.zeros(1, layer.in_features), torch.eye(layer.in_features)
        return (layer(units) - layer(zero)).t()


def fill(model):
    """Adapters that do something: B is zero at first."""
    generator = torch.Generator().manual_seed(2)
    for _, adapter in ls.adapters_in(model):
        with torch.no_grad():
            adapter.lora_B_t.copy_(0.1 * torch.randn(adapter.lora_B_t.shape, generator=generator))


# Loading.


@every_kind
@pytest.mark.parametrize(
    ("save", "head"),
    [
        (save_tiny_bert, ["classifier"]),
        (save_tiny_deberta, ["pooler.dense", "classifier"]),
        (save_tiny_roberta, ["classifier.dense", "classifier.out_proj"]),
    ],
)
def test_the_body_is_quantized_and_a_head_that_comes_with_the_weights_is_not(save, head, quantization, tmp_path):
    folder = save(tmp_path, **WIDE)
    model, plain = load(folder, quantization), load(folder)
    linear = [n for n, m in plain.named_modules() if isinstance(m, nn.Linear)]
    assert [n for n, _ in quantized_layers(model)] == [n for n in linear if n not in head]
    for name in head:
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, plain.get_submodule(name).weight)
    assert model.training


@one_of_each
def test_a_new_head_is_plain_too(quantization, bert):
    if Version(transformers.__version__) < Version("5.23"):  # keeps the old head
        with pytest.raises(
            ls.UsageError, match=r"classifier.weight has the shape \(2, 64\) .* Install transformers 5.23"
        ):
            load(bert, quantization, num_labels=5, ignore_mismatched_sizes=True)
        return
    model = load(bert, quantization, num_labels=5, ignore_mismatched_sizes=True)
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.shape == (5, 64)


@one_of_each
def test_output_embeddings_stay_as_they_are_and_so_does_what_is_named(quantization, tmp_path):
    folder = save_tiny_llama(tmp_path, hidden_size=64)
    assert type(load(folder, quantization, AutoModelForCausalLM).lm_head) is nn.Linear
    skip = "modules_to_not_convert" if quantization is INT8 else "llm_int8_skip_modules"
    model = load(folder, {**quantization, skip: ["lm_head", r".*\.down_proj"]}, AutoModelForCausalLM)
    tails = {name.rpartition(".")[2] for name, _ in quantized_layers(model)}
    assert tails == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}


@bitsandbytes
def test_a_configuration_object_is_taken_and_left_as_it_is(bert):
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    assert type(load(bert, config).classifier) is nn.Linear
    assert config.llm_int8_skip_modules is None


@pytest.mark.parametrize(
    ("quantization", "package", "missing"),
    [(INT8, "torchao", "torchao"), (BNB8, "bitsandbytes", "bitsandbytes"), (NF4, "bitsandbytes", "bitsandbytes")],
)
def test_a_missing_extra_is_named(quantization, package, missing, bert, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)  # as an import finds it that is not installed
    with pytest.raises(ls.UsageError, match=rf'{package}, which is not installed.*"lit-sparse\[{package}\]"'):
        load(bert, quantization)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bit": True}, r"stands inside of quantization_config: \{load_in_8bit: true\}"),
        ({"quantization_config": {"quant_method": "nope"}}, "Unknown quantization type, got nope"),
        ({"quantization_config": {"bits": 4}}, "no `quant_method`"),
        pytest.param(
            {"quantization_config": {**NF4, "bnb_4bit_quanttype": "nf4"}},
            r"no \['bnb_4bit_quanttype'\] for bitsandbytes; it knows .*'bnb_4bit_quant_type'",
            marks=bitsandbytes,
        ),
        pytest.param(
            {"quantization_config": {"quant_method": "torchao", "quant_type": "int8_weight_only"}},
            r"such as .*'Int8WeightOnlyConfig'.*got 'int8_weight_only'",
            marks=torchao,
        ),
        pytest.param({"quantization_config": {"quant_method": "torchao"}}, "got None", marks=torchao),
    ],
)
def test_what_cannot_be_asked_for(arguments, message, bert):
    with pytest.raises(ls.UsageError, match=message):
        load(bert, **arguments)


@torchao
def test_a_quantization_that_quantizes_nothing_is_refused(tmp_path):
    with pytest.raises(ls.UsageError, match=r"quantized no layer of GPT2LMHeadModel.*Conv1D"):
        load(save_tiny_gpt2(tmp_path), INT8, AutoModelForCausalLM)


# Adapters on it.


@every_kind
def test_injection_changes_no_output(quantization, bert):
    model, rows = load(bert, quantization), batch()
    with torch.no_grad():
        before = model(**rows).logits
        ls.inject(model, SORA)
        assert torch.equal(model(**rows).logits, before)
        model.eval()
        with ls.disable_adapters(model):
            before = model(**rows).logits
        assert torch.equal(model(**rows).logits, before)
        fill(model)
        assert not torch.allclose(model(**rows).logits, before, atol=1e-3)


@every_kind
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_model_with_the_same_weights(quantization, checkpointing, bert):
    """Both compute in float32 with the same weights, and differ in the order of sums: 1e-6 of a typical gradient."""
    model = load(bert, quantization)
    plain = copy.deepcopy(model)
    replace_modules(plain, dequantized(plain))
    assert not list(quantized_layers(plain))
    gradients = {}
    for kind, each in (("quantized", model), ("plain", plain)):
        torch.manual_seed(0)
        ls.inject(each, SORA)
        fill(each)
        if checkpointing:
            each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with torch.no_grad():
            each.eval()(**batch())  # what evaluation does to a layer must not be seen in training
        each.train()(**batch()).loss.backward()
        gradients[kind] = {n: p.grad for n, p in each.named_parameters() if p.requires_grad}
    assert gradients["quantized"].keys() == gradients["plain"].keys()
    for name, expected in gradients["plain"].items():
        torch.testing.assert_close(gradients["quantized"][name], expected, rtol=1e-4, atol=1e-6)


@every_kind
def test_adapters_are_float32_on_a_bfloat16_model(quantization, bert):
    model = load(bert, quantization, dtype="bfloat16")
    adapters = ls.inject(model, SORA)
    fill(model)
    assert {p.dtype for a in adapters.values() for p in (a.lora_A, a.lora_B_t, a.gate)} == {torch.float32}
    model(**batch()).loss.backward()
    assert all(a.lora_A.grad.dtype == torch.float32 for a in adapters.values())
    expected = model(**batch()).logits
    ls.merge(model)
    assert {p.dtype for n, p in model.named_parameters() if "classifier" not in n} == {torch.bfloat16}
    # bfloat16 rounds to 2⁻⁸, in six products one after the other, before and after merging.
    torch.testing.assert_close(model(**batch()).logits, expected, rtol=0.05, atol=0.05)


@torchao
def test_activations_that_are_quantized_stop_the_gradient_and_are_refused(bert):
    model = load(bert, DYNAMIC)
    with pytest.raises(ls.UsageError, match=r"No gradient passes through the quantized layer 'bert\.encoder\.layer\.0"):
        ls.inject(model, SORA)


@bitsandbytes
def test_a_weight_that_was_repacked_for_evaluation_is_refused(bert):
    import bitsandbytes as bnb

    if not bnb.functional.has_avx512bf16():
        pytest.skip("this processor has no AVX512-BF16, and bitsandbytes repacks nothing on it")
    model = load(bert, NF4).eval()
    with torch.no_grad():
        model(**batch())
    with pytest.raises(ls.UsageError, match="inject before the model is run in evaluation"):
        ls.inject(model, SORA)


@one_of_each
def test_a_quantized_part_that_is_to_be_trained_is_refused(quantization, bert):
    method = ls.LoRA(target_modules=["query"], train_head=["bert.pooler", "classifier"])
    with pytest.raises(ls.UsageError, match=r"'bert\.pooler\.dense'.*quantized.*modules_to_not_convert"):
        ls.inject(load(bert, quantization), method)


@one_of_each
def test_they_are_truncated(quantization, bert):
    model = load(bert, quantization).eval()
    adapters = ls.inject(model, SORA)
    fill(model)
    with torch.no_grad():
        before = model(**batch()).logits
        ls.truncate(model, 1.0)
        torch.testing.assert_close(model(**batch()).logits, before, rtol=0, atol=1e-5)
    ranks = ls.truncate(model, 0.25)
    costs = {name: adapter.in_features + adapter.out_features for name, adapter in adapters.items()}
    assert 0 < sum(costs[name] * rank for name, rank in ranks.items()) <= 0.25 * 4 * sum(costs.values())


# Training.


class Rows(torch.utils.data.Dataset):
    def __init__(self, count=32):
        self.rows = batch(count)

    def __len__(self):
        return len(self.rows["labels"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.rows.items()}


def module(folder, method, quantization):
    arguments = {"quantization_config": quantization} if quantization is not None else {}
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    return ls.SequenceClassification(folder, method, num_labels=2, optimizer=optimizer, backbone_args=arguments)


def fit(module, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(accelerator="cpu", enable_checkpointing=False, **quiet, **{"max_epochs": 1, **options})
    trainer.fit(module, DataLoader(Rows(), 8), DataLoader(Rows(8), 8))
    return trainer


def everything_in(model):
    """The state, with quantized weights as they compute."""
    weights = {name: by_definition(layer) for name, layer in quantized_layers(model) if isinstance(layer, nn.Linear)}
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    plain = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in packed}
    return {**plain, **weights}


@every_kind
@pytest.mark.parametrize(
    "method",
    [ls.SoRA(rank=4, sparsity_weight=8.0), ls.RoseLoRA(rank=4, density=0.25, begin=0, end=1)],
    ids=lambda method: type(method).__name__,
)
def test_training_changes_adapters_and_head_only_and_the_method_acts(method, quantization, bert):
    run = module(bert, method, quantization)
    run.configure_model()
    before = everything_in(run.train())
    fit(run, max_epochs=3)
    after = everything_in(run.train())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, p in run.named_parameters() if p.requires_grad}
    assert changed <= trained
    assert {name for name in changed if "lora" not in name and "gate" not in name} == {
        "model.classifier.weight",
        "model.classifier.bias",
    }
    adapters = [adapter for _, adapter in ls.adapters_in(run)]
    assert len(adapters) == 13
    assert all(f"model.{name}.lora_B_t" in changed for name, _ in ls.adapters_in(run.model))
    if isinstance(method, ls.SoRA):
        assert any((adapter.gate == 0).any() for adapter in adapters)
    else:
        for adapter in adapters:
            kept = adapter.lora_A.ne(0).sum(1)
            assert torch.equal(kept, torch.full_like(kept, adapter.in_features // 4))


# Checkpoints.


@every_kind
def test_a_checkpoint_holds_what_is_trained_and_restores_it(quantization, bert, tmp_path):
    run = module(bert, SORA, quantization)
    fit(run).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == {n for n, p in run.named_parameters() if p.requires_grad}
    restored = ls.SequenceClassification.load_from_checkpoint(tmp_path / "run.ckpt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(restored.eval()(**batch()).logits, run.eval()(**batch()).logits)


@one_of_each
def test_a_checkpoint_fits_no_backbone_that_is_quantized_otherwise(quantization, bert, tmp_path):
    run = module(bert, SORA, quantization)
    trainer = fit(run)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ls.UsageError, match=r"another structure.*or is quantized otherwise"):
        trainer.validate(module(bert, SORA, None), DataLoader(Rows(8), 8), ckpt_path=tmp_path / "run.ckpt")


# Merging.


@every_kind
def test_a_plain_layer_has_the_weight_that_the_quantized_one_computes_with(quantization, bert):
    model = load(bert, quantization)
    expected = {name: by_definition(layer) for name, layer in quantized_layers(model)}
    names = {layer: name for name, layer in quantized_layers(model)}
    for layer, plain in dequantized(model).items():
        assert type(plain) is nn.Linear
        torch.testing.assert_close(plain.weight, expected[names[layer]], rtol=1e-6, atol=1e-8)
        assert torch.equal(plain.bias, layer.bias)
        assert not plain.weight.requires_grad
        assert "weight" not in repr(plain)


@every_kind
@pytest.mark.parametrize("targets", ["all-linear", ["query", "value"]])
def test_merging_unpacks_the_whole_model_and_keeps_its_outputs(targets, quantization, bert, tmp_path):
    """In float32, with sums in another order: 1e-6 of what the logits are made of."""
    model = load(bert, quantization)
    ls.inject(model, ls.SoRA(target_modules=targets, rank=4, sparsity_weight=0.5))
    fill(model)
    with torch.no_grad():
        expected = model.train()(**batch()).logits  # bitsandbytes' 8 bits round activations too in evaluation
        merged = ls.merge(model)
        torch.testing.assert_close(merged(**batch()).logits, expected, rtol=1e-5, atol=1e-5)
        assert {type(m) for m in merged.modules() if hasattr(m, "weight")} == {nn.Embedding, nn.LayerNorm, nn.Linear}
        merged.eval().save_pretrained(tmp_path)
        assert not hasattr(AutoConfig.from_pretrained(tmp_path), "quantization_config")
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
        assert torch.equal(again(**batch()).logits, merged(**batch()).logits)
        merged.to(torch.float64)(**batch())  # transformers lets no quantized model change its dtype


@every_kind
def test_entries_that_roselora_cannot_reach_merge_to_the_unpacked_weight(quantization, bert):
    model = load(bert, quantization)
    plain = {name: layer.weight.clone() for name, layer in _by_name(model, dequantized(model)).items()}
    adapters = ls.inject(model, ls.RoseLoRA(rank=2, density=0.1))
    fill(model)
    reached = {}
    for name, adapter in adapters.items():
        with torch.no_grad():
            adapter.lora_A[:, 5:] = 0
        reached[name] = adapter.delta_weight() != 0
    ls.merge(model)
    for name, support in reached.items():
        weight = model.get_submodule(name).weight
        assert 0 < support.sum() < support.numel()
        assert torch.equal(weight[~support], plain[name][~support])
        assert (weight[support] != plain[name][support]).float().mean() > 0.99


@every_kind
def test_a_merge_that_unpacks_cannot_be_undone_and_says_so(quantization, bert):
    model = load(bert, quantization)
    adapters = ls.inject(model, ls.LoRA(rank=2))
    with pytest.raises(ls.UsageError, match=r"layers are quantized: merging unpacks them, which unmerge cannot undo"):
        ls.merge(model, keep=True)
    assert len(dict(ls.adapters_in(model))) == len(adapters)
    ls.unload(model)
    assert not any(True for _ in ls.adapters_in(model))


def _by_name(model, plain):
    return {name: plain[layer] for name, layer in quantized_layers(model)}


@pytest.mark.parametrize("quantization", [BNB8, NF4])
@bitsandbytes
def test_a_merged_gpt2_has_its_conv1d_back(quantization, tmp_path):
    folder = save_tiny_gpt2(tmp_path / "gpt2", n_embd=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0)
    model, rows = load(folder, quantization, AutoModelForCausalLM), {"input_ids": torch.arange(12).view(2, 6)}
    ls.inject(model, ls.SoRA(rank=4, sparsity_weight=0.5))
    fill(model)
    with torch.no_grad():
        expected = model(**rows).logits
        ls.merge(model)
        assert type(model.transformer.h[0].attn.c_proj) is Conv1D
        torch.testing.assert_close(model(**rows).logits, expected, rtol=1e-5, atol=1e-5)
        model.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").train()
        assert torch.equal(again(**rows).logits, model(**rows).logits)


class Packed(torch.Tensor):
    """As of a library that we do not know."""


def test_merging_what_cannot_be_unpacked_is_refused_and_changes_nothing():
    model = build_tiny(BertForSequenceClassification, **NO_DROPOUT)
    query = model.bert.encoder.layer[1].attention.self.query
    query.weight = nn.Parameter(query.weight.detach().as_subclass(Packed), requires_grad=False)
    ls.inject(model, SORA)
    fill(model)
    expected = model(**batch()).logits
    with pytest.raises(
        ls.UsageError, match=r"layer\.1\.attention\.self\.query.*is quantized as Packed of torch.float32"
    ):
        ls.merge(model)
    assert torch.equal(model(**batch()).logits, expected)


# From the command line.


@pytest.mark.slow
@one_of_each
def test_a_configuration_quantizes(quantization, bert, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    for split, count in (("train", 16), ("validation", 8)):
        rows = [[("a good film", "a bad film")[i % 2], ("yes", "no")[i % 2]] for i in range(count)]
        with (tmp_path / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *rows])
    arguments = {
        "backbone": bert,
        "backbone_args": {"quantization_config": quantization},
        "method": {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 2, "sparsity_weight": 1.0}},
    }
    checkpoint = {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"dirpath": "kept"}}
    config = {
        "model": {"class_path": "lit_sparse.SequenceClassification", "init_args": arguments},
        "data": {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": str(tmp_path)}},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [checkpoint],
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", str(tmp_path / "config.yaml")])
    (file,) = (tmp_path / "kept").glob("*.ckpt")
    main(["validate", "--config", str(tmp_path / "config.yaml"), "--ckpt_path", str(file)])
    state = torch.load(file, weights_only=True)["state_dict"]
    assert len([name for name in state if name.endswith("lora_A")]) == 13
    assert not [name for name in state if ".base." in name]
