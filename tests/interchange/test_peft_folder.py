"""lit_sparse.interchange.peft_folder and peft_import: against PEFT itself, and as a user starts from a dense LoRA."""

import csv
import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from lightning.pytorch import Trainer
from projects import write_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
    RobertaForSequenceClassification,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.cli.main import main

peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
IMAGES = torch.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=torch.float64).view(2, 3, 16, 16)


def logits(model, inputs=IDS):
    with torch.no_grad():
        return model.eval()(inputs).logits


def fresh(model_class=BertForSequenceClassification, **config):
    """The same model at every call, in float64, so that differences of rounding are far below those of formulas."""
    return build_tiny(model_class, **config).double()


def save_lora(folder, model, **settings):
    """PEFT's LoRA with random A, B and head on ``model``, saved; PEFT's model."""
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings)).double()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def edit_config(folder, **changes):
    file = Path(folder) / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    file = Path(folder) / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


CLASSIFIER = {"modules_to_save": ["classifier"]}
CASES = {
    "bert": (BertForSequenceClassification, {"target_modules": ["query", "value"], **CLASSIFIER}),
    "patterns": (
        BertForSequenceClassification,
        {
            "target_modules": ["query", "dense"],
            "rank_pattern": {"layer.1.attention.self.query": 7, "output.dense": 2},
            "alpha_pattern": {".*query": 3},
            **CLASSIFIER,
        },
    ),
    "rslora": (
        BertForSequenceClassification,
        {"target_modules": ["value"], "use_rslora": True, "rank_pattern": {"layer.0.attention.self.value": 9}},
    ),
    "two-layer head": (RobertaForSequenceClassification, {"target_modules": ["query", "dense"], **CLASSIFIER}),
    "shared layers": (AlbertForSequenceClassification, {"target_modules": ["query", "ffn"]}),
    "Conv1D": (GPT2LMHeadModel, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "all-linear": (LlamaForCausalLM, {"target_modules": "all-linear"}),
    "embedding": (LlamaForCausalLM, {"target_modules": ["embed_tokens", "q_proj"]}),
    "convolution": (ViTForImageClassification, {"target_modules": ["projection", "query"], **CLASSIFIER}),
}


@pytest.mark.parametrize(("model_class", "settings"), CASES.values(), ids=CASES)
def test_a_folder_in_a_plain_model_is_the_same_function(model_class, settings, tmp_path):
    inputs = IMAGES if model_class is ViTForImageClassification else IDS
    expected = logits(save_lora(tmp_path, fresh(model_class), **settings), inputs)
    model = fresh(model_class)
    assert not torch.allclose(logits(model, inputs), expected, rtol=0, atol=1e-3)
    adapters = ls.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=1e-12)
    assert dict(ls.adapters_in(model)) == adapters
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    head = {n for n, _ in model.named_parameters() if n.startswith("classifier.") and "modules_to_save" in settings}
    assert trained == {f"{n}.{p}" for n in adapters for p in ("lora_A", "lora_B_t")} | head


METHODS = [
    ls.LoRA(["query", "value"], rank=4, alpha=3),
    ls.LoRA(["query", "value"], rank=6, alpha=5, use_rslora=True),
    ls.SoRA(["query", "value"], rank=7, threshold=0.1),
    ls.RoseLoRA(["query", "value"], rank=6),
    ls.GatedRoseLoRA(["query", "value"], rank=4, threshold=0.1),
]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_adapters_of_any_method_start_as_the_dense_lora(method, tmp_path):
    settings = {"target_modules": ["query", "value"], "rank_pattern": {"layer.0.attention.self.query": 3}, **CLASSIFIER}
    expected = logits(save_lora(tmp_path, fresh(), **settings))
    model = fresh()
    ls.inject(model, method)
    random = {name: adapter.lora_A.clone() for name, adapter in ls.adapters_in(model)}
    adapters = ls.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-12)
    for name, adapter in adapters.items():
        rank = 3 if name == "bert.encoder.layer.0.attention.self.query" else 4
        assert torch.equal(adapter.lora_A[rank:], random[name][rank:])
        assert not adapter.lora_B_t[rank:].any()
        assert adapter.scale == method.scale
        assert method.mismatch(adapter) is None
        if adapter.gate is not None:
            assert torch.equal(adapter.gate, torch.ones_like(adapter.gate))


def test_adapters_stay_float32_beside_a_half_precision_backbone(tmp_path):
    save_lora(tmp_path, fresh(), target_modules=["query"], **CLASSIFIER)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    model = build_tiny(BertForSequenceClassification).bfloat16()
    adapters = ls.load_peft(model, tmp_path)
    name = "bert.encoder.layer.0.attention.self.query"
    A, B = (saved[f"base_model.model.{name}.lora_{part}.weight"].float() for part in "AB")
    assert torch.equal(adapters[name].lora_A, A)
    assert torch.equal(adapters[name].lora_B, B)
    assert torch.equal(model.classifier.weight, saved["base_model.model.classifier.weight"].float())
    assert logits(model).isfinite().all()


class Twice(nn.Module):
    """Two layers, the name of one of which is the end of the other's."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.block = nn.ModuleDict({"fc": nn.Linear(3, 3)})

    def forward(self, x):
        return self.block["fc"](self.fc(x))


def test_a_name_that_ends_another_means_one_layer(tmp_path):
    torch.manual_seed(1)
    model = Twice()
    adapted = save_lora(tmp_path, Twice(), target_modules="fc", rank_pattern={"^fc": 2})
    assert isinstance(adapted.base_model.model.block["fc"], nn.Linear)
    assert list(ls.load_peft(model, tmp_path)) == ["fc"]

    both = tmp_path / "both"
    save_lora(both, Twice(), target_modules=["fc"], rank_pattern={"^fc": 2})
    adapters = ls.load_peft(Twice(), both)
    assert {name: adapter.rank for name, adapter in adapters.items()} == {"fc": 2, "block.fc": 4}


# What cannot be loaded.


def bert_folder(folder, **settings):
    save_lora(folder, fresh(), **{"target_modules": ["query", "value"], **CLASSIFIER, **settings})
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, "describes 'ADALORA'; only LORA can be loaded"),
        ({"bias": "lora_only"}, r"trains biases \(bias: 'lora_only'\)"),
        ({"use_dora": True}, r"is no plain LoRA: it sets \{'use_dora': True\}"),
        ({"layer_replication": [[0, 2], [1, 2]]}, r"sets \{'layer_replication'"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "which are no three-dimensional weights of experts in Bert"),
        (
            {"target_parameters": "mlp.experts.down_proj"},
            "holds 'mlp.experts.down_proj' as target_parameters",
        ),
        ({"trainable_token_indices": [3]}, "lacks the rows of tokens that adapter_config.json names"),
        ({"a_setting_of_tomorrow": 1}, r"sets \{'a_setting_of_tomorrow': 1\}"),
        ({"init_lora_weights": "pissa"}, "started from 'pissa', which changes the frozen weights"),
        ({"r": 5}, "rank of '.*query' is 4 by lora_A, 4 by lora_B, and 5 by adapter_config.json"),
    ],
)
def test_what_is_no_plain_lora_is_refused(changes, message, tmp_path):
    edit_config(bert_folder(tmp_path), **changes)
    with pytest.raises(ls.UsageError, match=message):
        ls.load_peft(fresh(), tmp_path)


def test_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ls.UsageError, match=r"'nowhere' is no folder of a PEFT adapter: it has no adapter_config.json"):
        ls.load_peft(fresh(), "nowhere")
    bert_folder(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    kept = weights.read_bytes()
    weights.write_bytes(kept[:100])
    with pytest.raises(ls.UsageError, match=r"adapter_model.safetensors cannot be read"):
        ls.load_peft(fresh(), tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ls.UsageError, match="only a pickle, which may run code"):
        ls.load_peft(fresh(), tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ls.UsageError, match=r"has no adapter_model.safetensors\."):
        ls.load_peft(fresh(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ls.UsageError, match=r"adapter_config.json cannot be read"):
        ls.load_peft(fresh(), tmp_path)


QUERY = "base_model.model.bert.encoder.layer.0.attention.self.query"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{QUERY}.lora_B.weight"), r"\['lora_A.weight'\] of '.*0.*query', where two"),
        (lambda t: t.update({f"{QUERY}.lora_magnitude_vector": torch.ones(32)}), "holds .*lora_magnitude_vector'"),
        (lambda t: t.update({f"{QUERY}.lora_B.bias": torch.ones(32)}), r"holds .*lora_B\.bias'\], for which"),
        (lambda t: t.update({"base_model.model.pooler.x": torch.ones(2)}), r"holds \['pooler.x'\], for which Bert"),
        (lambda t: [t.pop(n) for n in list(t) if "lora_" in n], r"holds no lora_A and lora_B; .*\['classifier.bias'"),
    ],
)
def test_no_tensor_is_left_over_or_missing(change, message, tmp_path):
    edit_tensors(bert_folder(tmp_path), change)
    with pytest.raises(ls.UsageError, match=message):
        ls.load_peft(fresh(), tmp_path)


def test_a_forged_pattern_cannot_hang(tmp_path):
    """Both would keep ``re`` busy for minutes; the first matches no layer, so the folder is what it was."""
    bert_folder(tmp_path)
    whole = ls.load_peft(fresh(), tmp_path)
    edit_config(tmp_path, rank_pattern={r"([a-z0-9._]+)+\d!": 3}, alpha_pattern={r"([a-z0-9._]+)+query": 3})
    forged = ls.load_peft(fresh(), tmp_path)
    assert {name: a.scale for name, a in forged.items()} == {
        name: a.scale / 2 if name.endswith("query") else a.scale for name, a in whole.items()
    }
    edit_config(tmp_path, rank_pattern={r"(\w)\1": 3})
    with pytest.raises(ls.UsageError, match=r"adapter_config.json: the pattern .* uses groupref, which patterns of"):
        ls.load_peft(fresh(), tmp_path)


def test_a_smaller_adapter_is_refused_with_the_rank_to_set(tmp_path):
    bert_folder(tmp_path, rank_pattern={"layer.1.attention.self.value": 9})
    model = fresh()
    ls.inject(model, ls.SoRA(["query", "value"], rank=8, threshold=0.1))
    with pytest.raises(ls.UsageError, match=r"rank 9 at '.*1.*value', the adapter there 8. Set rank to 9, the largest"):
        ls.load_peft(model, tmp_path)


def test_other_layers_are_refused_with_the_targets_that_fit(tmp_path):
    bert_folder(tmp_path, target_modules=["query", "attention.output.dense"], layers_to_transform=[1])
    model = fresh()
    ls.inject(model, ls.RoseLoRA(["query", "value"], rank=4))
    with pytest.raises(ls.UsageError) as caught:
        ls.load_peft(model, tmp_path)
    layer = "bert.encoder.layer"
    assert str(caught.value).endswith(
        f"In the folder only: ['{layer}.1.attention.output.dense']. Here only: ['{layer}.0.attention.self.query', "
        f"'{layer}.0.attention.self.value', '{layer}.1.attention.self.value']. Set target_modules to "
        "['1.attention.output.dense', '1.attention.self.query']."
    )
    fitting = json.loads(re.search(r"target_modules to (\[.*\])", str(caught.value))[1].replace("'", '"'))
    model = fresh()
    ls.inject(model, ls.RoseLoRA(fitting, rank=4))
    ls.load_peft(model, tmp_path)


def test_another_model_is_refused(tmp_path):
    bert_folder(tmp_path)
    with pytest.raises(ls.UsageError, match=r"AlbertForSequenceClassification has no such layers: its own are \['albe"):
        ls.load_peft(fresh(AlbertForSequenceClassification), tmp_path)
    with pytest.raises(ls.UsageError, match=r"maps 32 features to 32 at '.*query', the layer 16 features to 16"):
        ls.load_peft(fresh(hidden_size=16), tmp_path)


def test_the_head_must_be_trained_and_of_the_same_size(tmp_path):
    bert_folder(tmp_path)
    with pytest.raises(
        ls.UsageError, match=r"'classifier\.bias' of shape \(2,\), BertForSequenceClassification has \(3,\)"
    ):
        ls.load_peft(fresh(num_labels=3), tmp_path)
    model = fresh()
    ls.inject(model, ls.LoRA(["query", "value"], train_head=False))
    with pytest.raises(ls.UsageError, match=r"trained 'classifier\.\w+', which is frozen here and has other values"):
        ls.load_peft(model, tmp_path)


def test_a_head_without_weights_in_the_folder_is_pointed_out(tmp_path):
    bert_folder(tmp_path, modules_to_save=None)
    model = fresh()
    ls.inject(model, ls.LoRA(["query", "value"]))
    with pytest.warns(UserWarning, match=r"nothing for \['classifier.bias', 'classifier.weight'\]: these start"):
        ls.load_peft(model, tmp_path)


def test_saved_embeddings_must_be_the_models_own(tmp_path):
    adapted = save_lora(tmp_path, fresh(), target_modules=["query"])
    adapted.save_pretrained(tmp_path, save_embedding_layers=True)
    assert any("word_embeddings" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    model = fresh()
    ls.load_peft(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(adapted), rtol=0, atol=1e-12)
    other = fresh()
    other.bert.embeddings.word_embeddings.weight.data += 1
    with pytest.raises(ls.UsageError, match=r"trained 'bert.embeddings.word_embeddings.weight', which is frozen"):
        ls.load_peft(other, tmp_path)


def test_a_copy_of_tied_weights_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own, of the same
        save_lora(tmp_path, fresh(GPT2LMHeadModel), target_modules=["c_attn"], modules_to_save=["lm_head"])
    with pytest.raises(ls.UsageError, match=r"shares: \['lm_head.weight', 'transformer.wte.weight'\]"):
        ls.load_peft(fresh(GPT2LMHeadModel), tmp_path)


def test_experts_have_no_counterpart(tmp_path):
    save_lora(tmp_path, fresh(MixtralForCausalLM, num_local_experts=2), target_modules=["q_proj"])
    model = fresh(MixtralForCausalLM, num_local_experts=2)
    ls.inject(model, ls.LoRA(["q_proj", "gate_up_proj"]))
    with pytest.raises(ls.UsageError, match=r"Here only: \['model.layers.0.mlp.experts.gate_up_proj'"):
        ls.load_peft(model, tmp_path)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 2}, r"the rank of 'conv' is 4 by lora_A, 2 by lora_B, .*a convolution with groups"),
        ({"dilation": 2, "padding": "same"}, r"\['conv'\] are convolutions with dilation or padding modes"),
        ({"padding": 1, "padding_mode": "reflect"}, r"\['conv'\] are convolutions with dilation or padding modes"),
    ],
)
def test_convolutions_that_are_another_function_in_peft_are_refused(options, message, tmp_path):
    def build():
        return nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, **options)})

    save_lora(tmp_path, build(), target_modules=["conv"])
    with pytest.raises(ls.UsageError, match=message):
        ls.load_peft(build(), tmp_path)


def test_adapters_must_be_as_new(tmp_path):
    bert_folder(tmp_path)
    model = fresh()
    ls.load_peft(model, tmp_path)
    with pytest.raises(ls.UsageError, match="4 adapters of BertForSequenceClassification are not as new, the first at"):
        ls.load_peft(model, tmp_path)
    pissa = fresh()
    ls.inject(pissa, ls.LoRA(["query", "value"], init_weights="pissa"))
    with pytest.raises(ls.UsageError, match="without init_weights 'pissa'"):
        ls.load_peft(pissa, tmp_path)


def test_another_backbone_of_the_same_structure_is_pointed_out(tmp_path):
    edit_config(bert_folder(tmp_path), base_model_name_or_path="google/bert")
    model = fresh()
    model.name_or_path = "other/bert"
    with pytest.warns(UserWarning, match="was trained on 'google/bert', and this model is 'other/bert'"):
        ls.load_peft(model, tmp_path)
    same = fresh()
    same.name_or_path = "google/bert/"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ls.load_peft(same, tmp_path)


# As a user goes on with a LoRA that PEFT trained, from the command line.


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A backbone, rows, a LoRA that PEFT trained on them, and its loss."""
    folder = tmp_path_factory.mktemp("project")
    backbone = save_tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    rows = [[("a good film", "a bad film", "the best story", "the worst plot")[i % 4], i % 2] for i in range(16)]
    for split in ("train", "validation"):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *rows])
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    tokens = AutoTokenizer.from_pretrained(backbone)([text for text, _ in rows], padding=True, return_tensors="pt")
    batch = {**tokens, "labels": torch.tensor([label for _, label in rows])}
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "value"])
    adapted = peft.get_peft_model(model, lora)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=3e-2)
    for _ in range(30):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(folder / "lora")
    with torch.no_grad():
        loss = adapted.eval()(**batch).loss.item()
    assert loss < 0.4
    return folder, loss


def config_of(folder, method, **init_args):
    data = {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": str(folder), "batch_size": 16}}
    model = {
        "class_path": "lit_sparse.SequenceClassification",
        "init_args": {"backbone": str(folder / "bert"), "method": method, "warmup": 0.0, **init_args},
    }
    return write_config(Path("config.yaml"), model, data, lr=1e-2, max_epochs=30, log_every_n_steps=1)


def first_train_loss():
    (file,) = Path("runs").glob("*/*/metrics.csv")
    with file.open() as stream:
        return next(float(row["train_loss"]) for row in csv.DictReader(stream) if row.get("train_loss"))


SPARSE = {
    "SoRA": {"rank": 6, "alpha": 4, "sparsity_weight": 2.0, "gate_lr": 0.05},
    "RoseLoRA": {"rank": 6, "density": 0.1},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPARSE)
def test_fit_goes_on_sparsely_from_a_dense_lora(name, project):
    folder, loss = project
    init_args = {"target_modules": ["query", "value"], **SPARSE[name]}
    method = {"class_path": f"lit_sparse.{name}", "init_args": init_args}
    config = config_of(folder, method, start_from=str(folder / "lora"))
    main(["fit", "--config", config])
    assert first_train_loss() == pytest.approx(loss, abs=1e-6)

    # What a checkpoint holds is past its start: it needs no folder, and overrides one that is there.
    (folder / "lora").rename(folder / "moved")
    try:
        trained = ls.SequenceClassification.load_from_checkpoint("kept/last.ckpt")
    finally:
        (folder / "moved").rename(folder / "lora")
    assert trained.start_from is None
    adapters = dict(ls.adapters_in(trained.model))
    if name == "SoRA":
        zeros = sum(int((adapter.gate == 0).sum()) for adapter in adapters.values())
        assert 4 <= zeros < 24
    else:
        for adapter in adapters.values():
            assert ((adapter.lora_A != 0).sum(1) <= 3).all()  # 0.1 · 32
            assert ((adapter.lora_B_t != 0).sum(1) <= 3).all()
    main(["validate", "--config", config, "--ckpt_path", "kept/last.ckpt", "--trainer.logger", "false"])
    data = ls.TextClassificationData(str(folder), batch_size=16)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    again = ls.SequenceClassification(
        str(folder / "bert"), getattr(ls, name)(**init_args), start_from=str(folder / "lora")
    )
    (resumed,) = Trainer(**quiet).validate(again, data, ckpt_path="kept/last.ckpt", verbose=False)
    (plain,) = Trainer(**quiet).validate(trained, data, verbose=False)
    assert resumed == plain
    assert resumed["val_accuracy"] == 1  # what the dense LoRA had learned is not lost with its ranks and entries


def test_inspect_needs_no_weights(project, capsys):
    folder, _ = project
    method = {"class_path": "lit_sparse.SoRA", "init_args": {"target_modules": ["query"], "threshold": 0.1}}
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", "--config", config_of(folder, method, start_from=str(folder / "lora"))])
    assert "In the folder only: ['bert.encoder.layer.0.attention.self.value'" in capsys.readouterr().err
    method["init_args"]["target_modules"].append("value")
    main(["inspect", "--config", config_of(folder, method, start_from=str(folder / "lora"))])
    assert "Adapted: 4 layers" in capsys.readouterr().out


def test_a_causal_lm_starts_from_a_folder(tmp_path):
    expected = logits(save_lora(tmp_path, fresh(LlamaForCausalLM), target_modules=["q_proj", "v_proj"]))
    method = ls.SoRA(["q_proj", "v_proj"], threshold=0.1)
    module = ls.CausalLM(fresh(LlamaForCausalLM), method, start_from=str(tmp_path))
    module.configure_model()
    torch.testing.assert_close(logits(module.model), expected, rtol=0, atol=1e-12)
