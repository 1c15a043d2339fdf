"""Sparse, delta and merged folders, their report and card, and what every export refuses alike."""

import json
import math
import re

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import build_tiny, save_tiny_bert, save_tiny_t5, save_tiny_tokenizer, save_tiny_vit
from huggingface_hub import HfApi, ModelCard
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn
from trained import METHODS, SORA, as_trained, logits
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForSequenceClassification,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
    TorchAoConfig,
    ViTImageProcessorPil,
)

import lit_sparse as ls
from lit_sparse.adapters import fused
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.interchange import sparse_folder, stored_folder
from lit_sparse.interchange.probe import difference_of, outputs_of, probe_batch
from lit_sparse.modules.backbone import load_backbone

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
WRITERS = {"peft": ls.export_peft, "sparse": ls.save_adapter, "delta": ls.export_delta, "merged": ls.export_merged}
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def fresh(model_class=BertForSequenceClassification, **config):
    return build_tiny(model_class, **config).double()


def mixtral():
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    return model.double().eval() if model.set_experts_implementation("eager") is None else model


def metadata(folder):
    return json.loads((folder / "lit_sparse.json").read_text())


# Sparse adapters and patches.


@by_method
@pytest.mark.parametrize("write", [ls.save_adapter, ls.export_delta])
def test_a_plain_model_computes_what_the_live_one_does(write, method, tmp_path):
    model = as_trained(fresh(), method)
    expected = logits(model, IDS)
    report = write(model, tmp_path / "adapter")
    assert report.difference < 1e-10
    assert torch.equal(logits(model, IDS), expected)
    plain = fresh()
    adapters = ls.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, IDS), expected, rtol=0, atol=1e-10)
    assert adapters == dict(ls.adapters_in(plain))
    assert report.remaining_parameters == sum(layer.remaining_parameters for layer in layer_sparsity(model))


@by_method
@pytest.mark.parametrize("write", [ls.save_adapter, ls.export_delta])
def test_experts_keep_ranks_of_their_own(write, method, tmp_path):
    model = as_trained(mixtral(), method)
    write(model, tmp_path / "adapter")
    plain = mixtral()
    ls.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-10)


class Images(nn.Module):
    """A convolution with groups, and a norm in the head that keeps running means."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, groups=2)
        self.head = nn.Sequential(nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 9, 2))

    def forward(self, x):
        return self.head(self.conv(x))


@pytest.mark.parametrize("write", [ls.save_adapter, ls.export_delta])
def test_convolutions_and_what_a_head_keeps_beside_parameters(write, tmp_path):
    plain = Images()
    model = Images()
    model.load_state_dict(plain.state_dict())
    as_trained(model, ls.RoseLoRA(["conv"], rank=2, density=0.2, train_head=["head"]))
    model.head[0].running_mean.fill_(0.5)
    x = {"x": torch.randn(2, 4, 5, 5)}
    write(model, tmp_path / "adapter", batch=x)
    ls.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(plain.eval()(**x), model(**x), rtol=0, atol=1e-5)


def test_embeddings_in_a_sparse_folder(tmp_path):
    model = as_trained(fresh(LlamaForCausalLM), ls.RoseLoRA(["embed_tokens", "q_proj"], rank=3, density=0.1))
    ls.save_adapter(model, tmp_path / "adapter")
    plain = fresh(LlamaForCausalLM)
    ls.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-10)


def test_a_quantized_base_takes_sparse_adapters_and_no_patch(tmp_path):
    pytest.importorskip("torchao", reason="quantizes")
    folder = save_tiny_bert(tmp_path / "bert")

    def quantized():
        how = TorchAoConfig(__import__("torchao").quantization.Int8WeightOnlyConfig())
        return load_backbone(folder, AutoModelForSequenceClassification, quantization_config=how)

    model = as_trained(quantized(), ls.SoRA(["query", "dense"], rank=4, threshold=0.1))
    ls.save_adapter(model, tmp_path / "adapter")
    plain = quantized()
    ls.load_adapter(plain, tmp_path / "adapter")
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-5)
    with pytest.raises(ls.UsageError, match=r"are quantized: there are no entries to add to. Use save_adapter"):
        ls.export_delta(model, tmp_path / "patch")
    ls.export_merged(model, tmp_path / "merged")
    merged = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(merged, IDS), logits(plain, IDS), rtol=0, atol=1e-3)


def test_a_head_in_half_precision_keeps_its_float32(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification).bfloat16())
    assert model.classifier.weight.dtype == torch.float32
    ls.save_adapter(model, tmp_path / "adapter")
    plain = build_tiny(BertForSequenceClassification).bfloat16()
    ls.load_adapter(plain, tmp_path / "adapter")
    assert torch.equal(plain.classifier.weight, model.classifier.weight)
    torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=0.02)


def test_a_model_from_which_everything_was_pruned_keeps_its_head(tmp_path):
    model = as_trained(fresh())
    for _, adapter in ls.adapters_in(model):
        nn.init.zeros_(adapter.gate)
    for write, name in ((ls.save_adapter, "sparse"), (ls.export_delta, "delta")):
        assert write(model, tmp_path / name).remaining_parameters == 0
        plain = fresh()
        assert ls.load_adapter(plain, tmp_path / name) == {}
        torch.testing.assert_close(logits(plain, IDS), logits(model, IDS), rtol=0, atol=1e-12)


def test_a_patch_leaves_every_other_entry_bit_for_bit(tmp_path):
    before = build_tiny(BertForSequenceClassification)
    model = as_trained(build_tiny(BertForSequenceClassification), ls.RoseLoRA(["query"], rank=2, density=0.05))
    ls.export_delta(model, tmp_path / "patch")
    patched = build_tiny(BertForSequenceClassification)
    ls.load_adapter(patched, tmp_path / "patch")
    changed = 0
    support = {f"{n}.weight": a.delta_weight() != 0 for n, a in ls.adapters_in(model)}
    for (name, old), new in zip(before.named_parameters(), patched.parameters(), strict=True):
        if not name.startswith("classifier."):
            assert torch.equal(old != new, support.get(name, torch.zeros_like(old, dtype=torch.bool)))
            changed += int((old != new).sum())
    assert changed == metadata(tmp_path / "patch")["changed_entries"] > 0
    ls.merge(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), patched.parameters(), strict=True))


def test_a_patch_of_many_entries_is_warned_of(tmp_path):
    with pytest.warns(UserWarning, match=r"The patch changes \d+% of the entries.*no local edit"):
        ls.export_delta(as_trained(fresh()), tmp_path / "patch")


@pytest.mark.parametrize(("width", "dtype"), [(256, torch.uint8), (512, torch.uint16)])
def test_sparse_factors_take_what_their_entries_and_places_take(width, dtype, tmp_path):
    wide = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1}
    method = ls.RoseLoRA(rank=128, density=0.1)
    model = as_trained(build_tiny(BertForSequenceClassification, **wide), method)
    report = ls.save_adapter(model, tmp_path / "adapter")
    expected = (4 + dtype.itemsize) * report.remaining_parameters + 4 * report.head_parameters
    assert math.isclose(report.bytes, expected, rel_tol=0.02)
    indices = [t for n, t in load_file(tmp_path / "adapter" / "adapter.safetensors").items() if "indices" in n]
    assert {t.dtype for t in indices} == {dtype}
    dense = ls.export_peft(model, tmp_path / "lora").bytes
    assert report.bytes < 0.2 * dense


def test_dense_factors_are_stored_as_they_are(tmp_path):
    wide = {"hidden_size": 256, "intermediate_size": 256}
    model = as_trained(build_tiny(BertForSequenceClassification, **wide), ls.SoRA(rank=16, threshold=0.1))
    report = ls.save_adapter(model, tmp_path / "adapter")
    assert math.isclose(report.bytes, 4 * (report.remaining_parameters + report.head_parameters), rel_tol=0.02)


def test_rows_with_fewer_entries_are_filled_with_zeros_from_where_they_stand():
    matrix = torch.zeros(2, 300)
    matrix[0, [3, 299]] = torch.tensor([1.0, 2.0])
    matrix[1, 7] = 5.0
    packed = sparse_folder._packed("m", matrix)
    assert packed["m.indices"].shape == (2, 2)
    assert torch.equal(stored_folder._unpacked(packed, "m", 300), matrix)


@pytest.mark.parametrize(
    ("count", "dtype"), [(256, torch.uint8), (257, torch.uint16), (2**16 + 1, torch.int32), (2**31 + 1, torch.int64)]
)
def test_places_are_numbered_by_the_smallest_integers(count, dtype):
    assert sparse_folder._index_dtype(count) == dtype


# The merged folder.


@by_method
@pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_t5, save_tiny_vit])
def test_transformers_loads_the_merged_folder(save, method, tmp_path):
    auto = {
        save_tiny_bert: AutoModelForSequenceClassification,
        save_tiny_t5: AutoModelForSeq2SeqLM,
        save_tiny_vit: AutoModelForImageClassification,
    }[save]
    model = as_trained(load_backbone(save(tmp_path / "base"), auto), method)
    batch = probe_batch(model)
    expected = logits(model, batch)
    report = ls.export_merged(model, tmp_path / "merged")
    assert report.difference < 1e-5
    assert not dict(ls.adapters_in(model))  # consumed
    loaded = auto.from_pretrained(tmp_path / "merged")
    assert type(loaded) is type(model)
    torch.testing.assert_close(logits(loaded, batch), expected, rtol=0, atol=1e-5)
    if save is save_tiny_vit:
        assert ViTImageProcessorPil.from_pretrained(tmp_path / "merged").size["height"] == 16
    else:
        own, base = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("merged", "base"))
        assert own("a good film").input_ids == base("a good film").input_ids


def test_a_merged_folder_differs_from_the_base_in_the_support_alone(tmp_path):
    folder = save_tiny_bert(tmp_path / "base")
    model = load_backbone(folder, AutoModelForSequenceClassification)
    as_trained(model, ls.RoseLoRA("all-linear", rank=2, density=0.05, train_head=False))
    support = {f"{n}.weight": int((a.delta_weight() != 0).sum()) for n, a in ls.adapters_in(model)}
    ls.export_merged(model, tmp_path / "merged")
    base, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "merged"))
    assert base.keys() == merged.keys()
    changed = {name: int((base[name] != merged[name]).sum()) for name in base}
    assert {name: count for name, count in changed.items() if count} == support
    assert 0 < sum(support.values()) < 0.1 * sum(base[name].numel() for name in support)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
@pytest.mark.parametrize("live", [torch.float32, torch.bfloat16])
def test_the_sum_is_rounded_once(dtype, live, tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification).to(live))
    name, adapter = next((n, a) for n, a in ls.adapters_in(model) if a.gate.any())
    exact = adapter.weight.double() + adapter.delta_weight().double()
    report = ls.export_merged(model, tmp_path / "merged", dtype=dtype)
    assert report.difference <= report.tolerance
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged", dtype="auto")
    weight = loaded.get_submodule(name).weight
    assert weight.dtype == getattr(torch, dtype)
    precise = torch.float32 if dtype == "float64" else weight.dtype  # of the adapters, in which the sum is formed
    torch.testing.assert_close(weight.double(), exact.to(precise).double(), rtol=0, atol=2 * torch.finfo(precise).eps)


def test_a_tokenizer_is_written_where_there_is_one(tmp_path):
    build_tiny(BertForSequenceClassification).save_pretrained(tmp_path / "base")

    def written(name, processor=None):
        model = as_trained(BertForSequenceClassification.from_pretrained(tmp_path / "base"))
        ls.export_merged(model, tmp_path / name, processor=processor)
        return {path.name for path in (tmp_path / name).iterdir()} - {"lit_sparse.json", "README.md"}

    assert written("without") == {"config.json", "model.safetensors"}
    save_tiny_tokenizer(tmp_path / "tokenizer")
    assert "tokenizer.json" in written("with", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.warns(UserWarning, match=r"tokenizer or processor of .* cannot be written"):
        assert "model.safetensors" in written("damaged", tmp_path / "tokenizer")


def test_a_pissa_run_merges(tmp_path):
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.LoRA(rank=2, init_weights="pissa"))
    expected = logits(model, IDS)
    ls.export_merged(model, tmp_path / "merged")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=0, atol=1e-5)


# Report, card, hub.


def test_the_card_is_in_the_hubs_form(tmp_path):
    folder = save_tiny_bert(tmp_path / "somewhere" / "my-bert", num_labels=3)
    model = as_trained(load_backbone(folder, AutoModelForSequenceClassification))
    about = ls.Provenance(
        method="SoRA", arguments=SORA.init_args(), metrics={"val_accuracy": 0.8125}, license="apache-2.0"
    )
    for form, write in WRITERS.items():
        report = write(model, tmp_path / form, provenance=about, tolerance=1e-3)
        card = ModelCard.load(tmp_path / form / "README.md")
        assert card.data.base_model is None  # the hub has no such model
        assert card.data.license == "apache-2.0"
        assert card.data.library_name == ("peft" if form == "peft" else "transformers")
        assert card.data.tags == ["lit-sparse", "lora", "sora"]
        for line in (
            "| threshold | `0.1` |",
            "| val_accuracy | 0.8125 |",
            f"{report.remaining_parameters:,} parameters",
        ):
            assert line in card.text
        assert re.search(r"\| bert.encoder.layer.0.attention.self.query \| 0 \| 4 \| 0 \|", card.text)
        assert f"({form}): {report.bytes:,} bytes" in str(report)
        entries = metadata(tmp_path / form)
        assert (entries["format"], entries["method"], entries["bytes"]) == (form, "SoRA", report.bytes)
        assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


def test_a_hub_id_is_named_as_it_is(tmp_path):
    about = ls.Provenance(base_model="microsoft/deberta-v3-base")
    ls.save_adapter(as_trained(fresh()), tmp_path / "adapter", provenance=about)
    assert ModelCard.load(tmp_path / "adapter" / "README.md").data.base_model == "microsoft/deberta-v3-base"


def test_the_folder_goes_to_the_hub(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo, exist_ok: calls.append((repo, exist_ok)))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **arguments: calls.append(arguments))
    ls.save_adapter(as_trained(fresh()), tmp_path / "adapter", push_to_hub="me/adapter")
    assert calls == [("me/adapter", True), {"repo_id": "me/adapter", "folder_path": tmp_path / "adapter"}]


def test_what_cannot_be_uploaded_stays_on_disk(tmp_path):
    with pytest.raises(ls.UsageError, match=r"is written, but cannot be uploaded to 'me/adapter': .*hf auth login"):
        ls.save_adapter(as_trained(fresh()), tmp_path / "adapter", push_to_hub="me/adapter")  # the tests are offline
    ls.load_adapter(fresh(), tmp_path / "adapter")


# What every export refuses.

by_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@by_writer
def test_a_difference_beyond_the_tolerance_leaves_nothing(write, tmp_path, monkeypatch):
    # Of many rows the live model adds BA to the weight, as a patch does: not one bit would differ.
    monkeypatch.setattr(fused, "_MANY_ROWS", math.inf)
    model = as_trained(build_tiny(BertForSequenceClassification))
    for _, adapter in ls.adapters_in(model):
        adapter.scale = 17.3  # large, and no power of two: folded it rounds otherwise than in the live model
    with pytest.raises(ls.UsageError, match=r"differ from the live model's by .*, more than the tolerance of 0"):
        write(model, tmp_path / "out", tolerance=0.0)
    assert list(tmp_path.iterdir()) == []


@by_writer
def test_an_output_that_is_not_empty_is_refused(write, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(ls.UsageError, match=r"'.*out' is not empty: name a new folder, or remove what is there"):
        write(as_trained(fresh()), tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ls.UsageError, match="is a file: name a new folder"):
        write(as_trained(fresh()), tmp_path / "out" / "thesis.txt")


def test_an_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    for number, write in enumerate(WRITERS.values()):
        write(as_trained(fresh()), tmp_path / "new" / str(number) / "out")
    ls.save_adapter(as_trained(fresh()), tmp_path / "empty")
    assert (tmp_path / "empty" / "README.md").is_file()
    with pytest.raises(ls.UsageError, match="cannot be made"):
        ls.save_adapter(as_trained(fresh()), tmp_path / "empty" / "README.md" / "out")


@by_writer
def test_models_that_are_no_trained_ones_are_refused(write, tmp_path):
    def refused(model, message, **options):
        with pytest.raises(ls.UsageError, match=message):
            write(model, tmp_path / "out", **options)
        assert not list(tmp_path.iterdir())

    refused(fresh(), "BertForSequenceClassification holds no adapter to export")
    module = LightningModule()
    module.model = as_trained(fresh())
    refused(module, "is a LightningModule.*give the Hugging Face model in it, usually module.model")
    refused(as_trained(fresh()).requires_grad_(False), "All of BertForSequenceClassification is frozen")
    refused(as_trained(fresh()), "tolerance must be at least 0; got -1", tolerance=-1)
    refused(as_trained(fresh()), "does not run on {'pixels'", batch={"pixels": IDS})
    off = as_trained(fresh())
    next(ls.adapters_in(off))[1].enabled = False
    refused(off, "1 adapters are switched off, the first at 'bert")
    broken = as_trained(fresh())
    nn.init.constant_(broken.classifier.bias, float("nan"))
    refused(broken, "hold values that are not finite, so nothing is written")


def test_no_batch_can_be_made_for_a_module_of_ones_own(tmp_path):
    model = as_trained(Images(), ls.LoRA(["conv"], rank=2, train_head=["head"]))
    with pytest.raises(ls.UsageError, match="No input can be made from the configuration of Images"):
        ls.save_adapter(model, tmp_path / "out")
    with pytest.raises(ls.UsageError, match=r"Images is no Hugging Face model, and has no save_pretrained"):
        ls.export_merged(model, tmp_path / "out", batch={"x": torch.ones(1, 4, 5, 5)})
    with pytest.raises(ls.UsageError, match=r"dtype must be one of .*'float32'.*got 'int8'"):
        ls.export_merged(as_trained(fresh()), tmp_path / "out", dtype="int8")


# What cannot be loaded.


def folder_with(tmp_path, **changes):
    ls.save_adapter(as_trained(fresh()), tmp_path / "adapter")
    file = tmp_path / "adapter" / "lit_sparse.json"
    entries = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: entry for name, entry in entries.items() if entry is not ...}))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "peft"}, "is of the format 'peft': load it with load_peft"),
        ({"format": "merged"}, "load it with the model class's from_pretrained"),
        ({"format": "new"}, "load it with the version that wrote it"),
        ({"version": 2}, "is of version 2 of its format, and 1 is known here"),
        ({"version": "1"}, "adapter' is damaged: its version is '1', not a number from 1 on"),
        ({"version": 0}, "adapter' is damaged: its version is 0, not a number from 1 on"),
        ({"version": ...}, "adapter' is damaged: it has no version"),
        (
            {"layers": {"a.b": {"ranks": [1], "shape": [1, 1]}}},
            r"is damaged: lit_sparse.json and .* do not fit together \(missing are \['a.b.lora_A.indices', ",
        ),
    ],
)
def test_folders_of_another_kind_are_refused(changes, message, tmp_path):
    with pytest.raises(ls.UsageError, match=message):
        ls.load_adapter(fresh(), folder_with(tmp_path, **changes))


def test_what_is_damaged_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(
        ls.UsageError, match=r"was not written by save_adapter or export_delta: it has no lit_sparse.json"
    ):
        ls.load_adapter(fresh(), tmp_path)
    folder = folder_with(tmp_path)
    with pytest.raises(ls.UsageError, match=r"holds adapters already. Load into a freshly loaded model"):
        ls.load_adapter(as_trained(fresh()), folder)
    with pytest.raises(ls.UsageError, match=r"holds \['bert.encoder.*which RobertaForSequenceClassification lacks"):
        ls.load_adapter(fresh(RobertaForSequenceClassification), folder)
    with pytest.raises(ls.UsageError, match=r"'classifier.bias' of shape \(2,\).* has \(3,\): .*number of labels"):
        ls.load_adapter(fresh(num_labels=3), folder)
    with pytest.raises(ls.UsageError, match=r"maps 32 features to 64 at .*, the layer 32 features to 48"):
        ls.load_adapter(fresh(intermediate_size=48), folder)
    model = fresh()
    model.name_or_path = "another/model"
    file = folder / "lit_sparse.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": "one/model"}))
    with pytest.warns(UserWarning, match="was trained on 'one/model', and this model is 'another/model'"):
        ls.load_adapter(model, folder)
    (folder / "adapter.safetensors").write_bytes(b"nothing")
    with pytest.raises(ls.UsageError, match=r"adapter.safetensors cannot be read"):
        ls.load_adapter(fresh(), folder)
    (folder / "adapter.safetensors").unlink()
    with pytest.raises(ls.UsageError, match=r"adapter.safetensors cannot be read"):
        ls.load_adapter(fresh(), folder)
    file.write_text("{")
    with pytest.raises(ls.UsageError, match=r"lit_sparse.json cannot be read"):
        ls.load_adapter(fresh(), folder)


def test_a_patch_for_a_weight_of_another_shape_changes_nothing(tmp_path):
    ls.export_delta(as_trained(fresh(), ls.RoseLoRA(["intermediate.dense"], rank=2, density=0.05)), tmp_path / "patch")
    model = fresh(intermediate_size=48)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ls.UsageError, match=r"of shape \(64, 32\), BertForSequenceClassification has \(48, 32\)"):
        ls.load_adapter(model, tmp_path / "patch")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# The batch that is tried.

PROBED = ["BERT", "GPT-2", "XLNet", "T5", "BART", "ViT", "CLIP", "LLaVA", "Whisper", "Wav2Vec2", "Mamba"]


@pytest.mark.parametrize("name", PROBED)
def test_a_batch_can_be_made_and_is_always_the_same(name):
    model = next(a for a in ARCHITECTURES if a.name == name).build()
    first, second = outputs_of(model, probe_batch(model)), outputs_of(model, probe_batch(model))
    assert difference_of(first, second) == 0
    assert model.training  # as it was
    assert all(not t.isnan().any() for t in first)


def test_differences_are_seen():
    one, other = [torch.tensor([1.0, float("-inf")])], [torch.tensor([1.5, float("-inf")])]
    assert difference_of(one, other) == 0.5
    assert difference_of(one, [*other, *other]) == float("inf")
    assert math.isnan(difference_of(one, [torch.tensor([float("nan"), 0.0])]))
