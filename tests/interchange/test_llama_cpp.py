"""What is exported, in a real llama.cpp and in PEFT and transformers, against the live model."""

import sys
from pathlib import Path

import pytest
import torch
import transformers
from trained import as_trained

import lit_sparse as ls
from lit_sparse.interchange.gguf_export import _ARCHITECTURES

pytest.importorskip("gguf", reason="writes GGUF files, and gguf is not installed")
import llama_cpp

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
pytestmark = pytest.mark.skipif(llama_cpp.NODE is None, reason=llama_cpp.REASON)

SIZES = {"vocab_size": llama_cpp.VOCABULARY, "max_position_embeddings": 64, "initializer_range": 0.3}
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
TOKENS = {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2}
OTHER = {
    "GPT2LMHeadModel": {"n_inner": 64},
    "GemmaForCausalLM": {"head_dim": 8},
    "Gemma2ForCausalLM": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32},
    "Gemma3ForCausalLM": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32},
}
# On CPUs llama.cpp looks GELU up in a table of float16.
GELU = ("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Starcoder2ForCausalLM", "GPT2LMHeadModel")


def build(kind):
    """A model with random weights, biases and norms, with half as many heads for keys as for queries if it may."""
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    grouped = {} if kind == "GPT2LMHeadModel" else {"num_key_value_heads": 2}
    model = model_class(model_class.config_class(**SIZES, **SHAPE, **TOKENS, **grouped, **OTHER.get(kind, {})))
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter.data, std=0.1, mean=float(name.endswith("weight") and "Gemma" not in kind))
    return model.eval()


@pytest.mark.slow
def test_the_gguf_of_every_architecture_is_what_the_live_model_computes(tmp_path):
    assert list(llama_cpp.ARCHITECTURES) == list(_ARCHITECTURES)
    expected, effects, runs = {}, {}, {}
    for kind in _ARCHITECTURES:
        model = build(kind)
        llama_cpp.write_base(model, tmp_path / f"{kind}.gguf")
        before = llama_cpp.in_transformers(model)
        ls.export_gguf(as_trained(model), tmp_path / kind)
        expected[kind] = llama_cpp.in_transformers(model)
        effects[kind] = float((expected[kind][1] - before[1]).abs().max())
        runs[kind] = (tmp_path / f"{kind}.gguf", tmp_path / kind / "adapter.gguf")
    _, found = llama_cpp.run(tmp_path, runs)
    for kind, (tokens, log) in found.items():
        assert effects[kind] > 1, kind
        assert tokens == expected[kind][0], kind
        difference = float((log - expected[kind][1]).abs().max())
        assert difference < (5e-3 if kind in GELU else 1e-3), (kind, difference)


def test_an_adapted_embedding_and_output_layer(tmp_path):
    model = build("LlamaForCausalLM")
    llama_cpp.write_base(model, tmp_path / "base.gguf")
    as_trained(model, ls.LoRA(["embed_tokens", "lm_head"], rank=2, train_head=False))
    ls.export_gguf(model, tmp_path / "lora")
    tokens, log = llama_cpp.in_transformers(model)
    runs = {"lora": (tmp_path / "base.gguf", tmp_path / "lora" / "adapter.gguf")}
    _, found = llama_cpp.run(tmp_path, runs)
    assert found["lora"][0] == tokens
    torch.testing.assert_close(found["lora"][1], log, rtol=0, atol=1e-3)


@pytest.mark.slow
def test_all_engines_agree_on_one_trained_model_but_those_for_which_ragged_is_not(tmp_path):
    engines = pytest.importorskip("engines", reason="needs PEFT")
    content = engines.compare(tmp_path)
    assert (content["ranks"][0], content["ranks"][-1]) == (0, engines.RANK)
    assert content["effect"] > 1
    wrong = {("TGI, its rule", "peft, ragged"), ("llama.cpp", "peft, ragged")}
    rows = {(row["engine"], row["layout"]): row for row in content["results"]}
    assert {engine for engine, _ in rows} == {"PEFT", "transformers", "vLLM, its rule", "TGI, its rule", "llama.cpp"}
    assert wrong < set(rows)
    for key, row in rows.items():
        assert (row["difference"] < 1e-3) == (key not in wrong), row
        assert row["tokens_equal"] or key in wrong, row
