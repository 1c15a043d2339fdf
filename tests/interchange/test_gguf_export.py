"""lit_sparse.interchange.gguf_export: what is in the file, and what is refused."""

import importlib.util
import json

import pytest
import torch
from backbones import build_tiny
from trained import SORA, as_trained
from transformers import BertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM, Qwen2ForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity

gguf = pytest.importorskip("gguf", reason="writes GGUF files, and gguf is not installed")


def read(folder):
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    return fields, {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}


def slow_order(heads, rows):
    """llama.cpp's conversion/llama.py, LlamaModel.permute, row by row: the halves of each head take turns."""
    half = rows // heads // 2
    return [head * 2 * half + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)]


@pytest.mark.parametrize(("model_class", "permuted"), [(LlamaForCausalLM, True), (Qwen2ForCausalLM, False)])
def test_the_file_holds_live_layers_with_one_rank_and_the_scale_1(model_class, permuted, tmp_path):
    model = as_trained(build_tiny(model_class, num_key_value_heads=2))
    report = ls.export_gguf(model, tmp_path / "lora")
    fields, tensors = read(tmp_path / "lora")
    layers = {layer.name: layer.rank for layer in layer_sparsity(model) if layer.rank}
    rank = max(layers.values())
    assert 0 < len(layers) < len(layer_sparsity(model))
    assert fields == {
        "general.architecture": "llama" if permuted else "qwen2",
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": rank,
    }
    assert len(tensors) == 2 * len(layers)
    assert {t.shape[1 if name.endswith("b") else 0] for name, t in tensors.items()} == {rank}
    for leaf, heads in (("q", model.config.num_attention_heads), ("k", model.config.num_key_value_heads)):
        block = next(name.split(".")[2] for name in layers if name.endswith(f"{leaf}_proj"))
        name = f"model.layers.{block}.self_attn.{leaf}_proj"
        product = tensors[f"blk.{block}.attn_{leaf}.weight.lora_b"] @ tensors[f"blk.{block}.attn_{leaf}.weight.lora_a"]
        delta = dict(ls.adapters_in(model))[name].delta_weight()
        order = slow_order(heads, len(delta)) if permuted else list(range(len(delta)))
        torch.testing.assert_close(product, delta[order])
    assert report.bytes == (tmp_path / "lora" / "adapter.gguf").stat().st_size
    assert json.loads((tmp_path / "lora" / "lit_sparse.json").read_text())["format"] == "gguf"
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "library_name: gguf" in card
    assert f"\nllama-cli -m base.gguf --lora {tmp_path}/lora/adapter.gguf\n" in card


def test_when_everything_is_pruned_one_layer_of_zeros_is_left(tmp_path):
    model = as_trained(build_tiny(LlamaForCausalLM))
    for _, adapter in ls.adapters_in(model):
        torch.nn.init.zeros_(adapter.gate)
    assert ls.export_gguf(model, tmp_path / "lora").difference == 0
    assert len(read(tmp_path / "lora")[1]) == 2


def test_a_file_that_reads_back_as_another_function_is_not_kept(tmp_path, monkeypatch):
    model = as_trained(build_tiny(LlamaForCausalLM))
    monkeypatch.setattr(gguf.GGUFWriter, "add_float32", lambda self, key, value: self.add_key_value(key, 1.0, 6))
    with pytest.raises(ls.UsageError, match="the export as gguf gives outputs that differ"):
        ls.export_gguf(model, tmp_path / "lora")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: as_trained(build_tiny(BertForSequenceClassification)),
            "for BertForSequenceClassification, only for",
        ),
        (
            lambda: as_trained(build_tiny(LlamaForCausalLM), ls.LoRA(["q_proj"], rank=2, train_head=["model.norm"])),
            r"\['model.norm.weight'\] were trained whole, and llama.cpp's LoRA file has no place for them",
        ),
        (
            lambda: as_trained(build_tiny(GPT2LMHeadModel), ls.LoRA(["wpe"], rank=2)),
            "llama.cpp's gpt2 has no LoRA for",
        ),
    ],
)
def test_what_has_no_place_in_the_file_is_refused(make, message, tmp_path):
    with pytest.raises(ls.UsageError, match=message):
        ls.export_gguf(make(), tmp_path / "lora")
    assert not list(tmp_path.iterdir())


def test_without_the_package_the_line_to_install_it_is_given(tmp_path, monkeypatch):
    model = as_trained(build_tiny(LlamaForCausalLM), SORA)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name))
    with pytest.raises(ls.UsageError, match=r"pip install 'lit-sparse\[gguf\]'"):
        ls.export_gguf(model, tmp_path / "lora")
