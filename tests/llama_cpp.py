"""A real llama.cpp: models as its GGUF files, LoRAs as its converter makes them, and a way to run both."""

import json
import os
import subprocess
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file

NODE = os.environ.get("LIT_SPARSE_NODE_LLAMA_CPP")
"""Folder in which npm installed node-llama-cpp."""
REASON = "needs llama.cpp: npm install --prefix DIR node-llama-cpp, and LIT_SPARSE_NODE_LLAMA_CPP=DIR"
PROMPT = [1, 5, 100, 37, 88, 200]
COUNT = 12  # tokens that are generated
VOCABULARY = 320  # at least three special tokens and 256 bytes

# Class in transformers -> (llama.cpp's architecture, whether rows of q and k are reordered, what is added to norms).
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True, 0),
    "MistralForCausalLM": ("llama", True, 0),
    "SmolLM3ForCausalLM": ("smollm3", True, 0),
    "GraniteForCausalLM": ("granite", True, 0),
    "OlmoForCausalLM": ("olmo", True, 0),
    "Olmo2ForCausalLM": ("olmo2", False, 0),
    "Qwen2ForCausalLM": ("qwen2", False, 0),
    "Qwen3ForCausalLM": ("qwen3", False, 0),
    "GemmaForCausalLM": ("gemma", False, 1),
    "Gemma2ForCausalLM": ("gemma2", False, 1),
    "Gemma3ForCausalLM": ("gemma3", False, 1),
    "Phi3ForCausalLM": ("phi3", False, 0),
    "Starcoder2ForCausalLM": ("starcoder2", False, 0),
    "GPT2LMHeadModel": ("gpt2", False, 0),
}


def write_base(model, file):
    """Write a model in float32 as a GGUF file, as llama.cpp's convert_hf_to_gguf.py does for its architecture."""
    architecture, _, shift = ARCHITECTURES[type(model).__name__]
    writer = gguf.GGUFWriter(file, architecture)
    _write_settings(writer, model.config)
    _write_vocabulary(writer)
    for key, tensor in model.state_dict().items():
        name, _, kind = key.rpartition(".")
        if name == "lm_head" and model.config.tie_word_embeddings:
            continue
        if name.endswith(("c_attn", "c_proj", "c_fc")) and kind == "weight" and architecture == "gpt2":
            tensor = tensor.t()  # Conv1D
        if "norm" in name and kind == "weight":
            tensor = tensor + shift
        writer.add_tensor(f"{tensor_name(model, name)}.{kind}", as_llama_cpp(model, name, tensor).numpy())
    _finish(writer)


def convert_lora(folder, model, file):
    """Write a PEFT folder as llama.cpp's convert_lora_to_gguf.py does: lora_alpha as it is, no pattern is read."""
    alpha = json.loads((Path(folder) / "adapter_config.json").read_text())["lora_alpha"]
    writer = gguf.GGUFWriter(file, ARCHITECTURES[type(model).__name__][0])
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(alpha))
    for key, tensor in load_file(Path(folder) / "adapter_model.safetensors").items():
        name, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".lora_")
        assert factor in ("A", "B"), f"the converter stops at {key}"
        tensor = as_llama_cpp(model, name, tensor) if factor == "B" else tensor
        writer.add_tensor(f"{tensor_name(model, name)}.weight.lora_{factor.lower()}", tensor.float().numpy())
    _finish(writer)


def run(folder, runs):
    """llama.cpp's version, and for each run its greedy tokens and the log probabilities of the first of them.

    Args:
        folder: For files.
        runs: Name to the files of the model and of the LoRA, if any.
    """
    jobs = [
        {"name": name, "model": str(files[0]), "lora": str(files[1]) if files[1:] else None}
        for name, files in runs.items()
    ]
    (folder / "jobs.json").write_text(json.dumps({"prompt": PROMPT, "count": COUNT, "runs": jobs}))
    script = Path(__file__).with_suffix(".mjs")
    command = ["node", script, NODE, folder / "jobs.json", folder / "out.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    read = json.loads((folder / "out.json").read_text())
    return read["version"], {name: (f["tokens"], _log(f["probabilities"])) for name, f in read["found"].items()}


@torch.no_grad()
def in_transformers(model):
    """The same from transformers, in float32."""
    model = model.float().eval()
    ids = torch.tensor([PROMPT])
    log = torch.log_softmax(model(ids).logits[0, -1].double(), -1)
    for _ in range(COUNT):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return ids[0, len(PROMPT) :].tolist(), log


def tensor_name(model, name):
    """llama.cpp's name of a module, by gguf's own map."""
    architecture = {v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[ARCHITECTURES[type(model).__name__][0]]
    found = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers).get_name(name)
    assert found is not None, name
    return found


def as_llama_cpp(model, name, tensor):
    """Rows in llama.cpp's order: conversion/llama.py, LlamaModel.permute."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.rpartition(".")[2])
    if heads is not None and ARCHITECTURES[type(model).__name__][1]:
        count, rest = getattr(model.config, heads), tensor.shape[1:]
        tensor = tensor.reshape(count, 2, tensor.shape[0] // count // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)
    return tensor.contiguous()


def _log(probabilities):
    values = torch.zeros(VOCABULARY, dtype=torch.float64)
    for token, probability in probabilities:
        values[token] = probability
    return values.log()


def _write_settings(writer, config):
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_context_length(64)
    writer.add_vocab_size(VOCABULARY)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    rope = getattr(config, "rope_parameters", None) or {}
    theta = rope.get("full_attention", rope).get("rope_theta")
    if theta is not None:
        writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(getattr(config, "layer_norm_epsilon", None) or getattr(config, "norm_epsilon", 1e-5))
    for setting, add in {
        "attention_multiplier": writer.add_attention_scale,
        "embedding_multiplier": writer.add_embedding_scale,
        "residual_multiplier": writer.add_residual_scale,
        "logits_scaling": writer.add_logit_scale,
        "attn_logit_softcapping": writer.add_attn_logit_softcapping,
        "final_logit_softcapping": writer.add_final_logit_softcapping,
    }.items():
        if getattr(config, setting, None) is not None:
            add(getattr(config, setting))
    if config.model_type in ("gemma2", "gemma3_text", "phi3"):
        writer.add_sliding_window(getattr(config, "sliding_window", None) or 0)
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(64)


def _write_vocabulary(writer):
    """A SentencePiece vocabulary of special tokens, bytes and some words: the tests give token ids."""
    words = VOCABULARY - 259
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *(f"word{i}" for i in range(words))]
    )
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * words])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
