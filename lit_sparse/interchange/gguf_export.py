"""Write what is left of adapters as the LoRA file that llama.cpp loads."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.embedding import LowRankEmbedding
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.card import Provenance
from lit_sparse.interchange.export import ExportReport, Form, Terms, export, require_finite
from lit_sparse.interchange.peft_import import exactly
from lit_sparse.interchange.remains import (
    folded,
    padded,
    plain_copy,
    require_original_weights,
    require_trained,
    trained_whole,
)
from lit_sparse.interchange.vocabulary import rows_of
from lit_sparse.methods.lora import LoRA

FILE = "adapter.gguf"

# Class in transformers -> (architecture in llama.cpp, whether its converter reorders the rows of q and k). Only those
# whose conversion (llama.cpp, conversion/*.py, modify_tensors) does nothing else to a linear layer; each of them is
# compared with llama.cpp itself in tests/interchange/test_llama_cpp.py.
_ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "SmolLM3ForCausalLM": ("smollm3", True),
    "GraniteForCausalLM": ("granite", True),
    "OlmoForCausalLM": ("olmo", True),
    "Olmo2ForCausalLM": ("olmo2", False),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GemmaForCausalLM": ("gemma", False),
    "Gemma2ForCausalLM": ("gemma2", False),
    "Gemma3ForCausalLM": ("gemma3", False),
    "Phi3ForCausalLM": ("phi3", False),
    "Starcoder2ForCausalLM": ("starcoder2", False),
    "GPT2LMHeadModel": ("gpt2", False),
}

# The weights to which llama.cpp adds a LoRA in its graphs (build_lora_mm, build_inp_embd); it ignores any other.
_APPLIED = {
    *("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    *("token_embd", "output"),
}


def export_gguf(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tolerance: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    push_to_hub: str | None = None,
) -> ExportReport:
    """Write the adapters as ``adapter.gguf``, a LoRA file for llama.cpp and the programs built on it.

    A and B are float32; gate and scale are folded into B. All layers in the file have one rank, filled up with zeros,
    and alpha is that rank, so that llama.cpp's scale (alpha by the rank of the tensor) is 1 for each. Layers without a
    rank are left out. The rows of B of query and key projections are reordered as llama.cpp's converter reorders those
    of the weights. Needs the package gguf (extra ``gguf``).

    Args:
        model: The Hugging Face language model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the model's dtype.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: What the card says of method, metrics and license.
        push_to_hub: Repository on the hub to upload the folder to.

    Returns:
        Sizes, and the difference that was found when the file was read back into a copy of the model.

    Raises:
        UsageError: If gguf is not installed, the architecture is not one of those whose LoRA only needs other names in
            llama.cpp, an adapter or a module that was trained whole has no place in the file, the frozen weights were
            changed by PiSSA, the folder is not empty, or outputs differ by more than the tolerance. Nothing is then
            left behind.
    """
    adapters = require_trained(model)
    require_original_weights(adapters, "a LoRA")
    if rows_of(model):
        raise UsageError(
            "New tokens have no place in a LoRA file of llama.cpp: use export_merged and llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    names = _tensor_names(model, adapters)
    write = functools.partial(_write, model, adapters, names)
    form = Form("gguf", write, functools.partial(_read, model, names), (torch.float32,))
    return export(model, folder, form, Terms(tolerance, batch, provenance, push_to_hub))


def _tensor_names(model: nn.Module, adapters: Mapping[str, LowRankAdapter]) -> dict[str, str]:
    """Full layer name to the name of its weight in llama.cpp."""
    kind = type(model).__name__
    if kind not in _ARCHITECTURES:
        raise UsageError(
            f"No LoRA file for llama.cpp can be written for {kind}, only for {', '.join(_ARCHITECTURES)}. Use "
            "export_peft and llama.cpp's convert_lora_to_gguf.py, or export_merged and its convert_hf_to_gguf.py."
        )
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("The format gguf needs the package gguf: pip install 'lit-sparse[gguf]'.")
    import gguf

    whole = trained_whole(model)
    if whole:
        raise UsageError(
            f"{listed(whole)} were trained whole, and llama.cpp's LoRA file has no place for them. Use export_merged "
            "and llama.cpp's convert_hf_to_gguf.py, or train with train_head false."
        )
    architecture = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[_ARCHITECTURES[kind][0]]
    blocks: int = model.config.num_hidden_layers  # type: ignore[union-attr, assignment]
    known = gguf.get_tensor_name_map(architecture, blocks)
    fitting = {n: known.get_name(n) for n, a in adapters.items() if isinstance(a, LowRankLinear | LowRankEmbedding)}
    names = {n: f"{found}.weight" for n, found in fitting.items() if found and found.split(".")[-1] in _APPLIED}
    unknown = [name for name in adapters if name not in names]
    if unknown:
        raise UsageError(
            f"llama.cpp's {_ARCHITECTURES[kind][0]} has no LoRA for {listed(unknown)}: leave them out with "
            "exclude_modules, or use export_merged and llama.cpp's convert_hf_to_gguf.py."
        )
    return names


def _write(
    model: nn.Module, adapters: Mapping[str, LowRankAdapter], names: Mapping[str, str], draft: Path
) -> dict[str, Any]:
    import gguf

    remains = {name: folded(name, adapter) for name, adapter in adapters.items()}
    used = {name: layer for name, layer in remains.items() if any(layer.ranks)} or dict([*remains.items()][:1])
    layers = padded(used)
    rank = next(iter(layers.values())).ranks[0]
    writer = gguf.GGUFWriter(draft / FILE, _ARCHITECTURES[type(model).__name__][0])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        lora_B = layer.lora_B_t.t()[_row_order(model, names[name], layer.lora_B_t.shape[1])]
        # llama.cpp looks up rows of an embedding's A, which therefore is stored with a row for each token.
        tensors[f"{names[name]}.lora_a"] = layer.lora_A.t() if _is_embedding(model, name) else layer.lora_A
        tensors[f"{names[name]}.lora_b"] = lora_B
    tensors = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    require_finite(tensors)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"notes": [f"For llama.cpp and programs built on it. Every layer in the file has rank {rank} and scale 1."]}


@torch.no_grad()
def _read(model: nn.Module, names: Mapping[str, str], draft: Path) -> nn.Module:
    import gguf

    reader = gguf.GGUFReader(draft / FILE)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    written = [name for name in names if f"{names[name]}.lora_b" in stored]
    rank = stored[f"{names[written[0]]}.lora_b"].shape[1]
    method = LoRA("|".join(exactly(name) for name in written), rank=rank, alpha=alpha, train_head=False)
    copied = plain_copy(model)
    for name, adapter in inject(copied, method).items():
        lora_A, lora_B = stored[f"{names[name]}.lora_a"], stored[f"{names[name]}.lora_b"]
        adapter.lora_A.copy_(lora_A.t() if _is_embedding(model, name) else lora_A)
        adapter.lora_B[_row_order(model, names[name], len(lora_B))] = lora_B.to(adapter.lora_B)
    return copied


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), LowRankEmbedding)


def _row_order(model: nn.Module, tensor_name: str, rows: int) -> Tensor:
    """Which row of the weight in transformers is at each place in llama.cpp, shape ``(rows,)``.

    Where the architecture rotates pairs of neighbours, llama.cpp's converter interleaves the two halves of each head.
    """
    config: Any = model.config
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
    }.get(tensor_name.split(".")[-2])
    order = torch.arange(rows)
    if heads is None or not _ARCHITECTURES[type(model).__name__][1]:
        return order
    return order.view(heads, 2, -1).transpose(1, 2).flatten()
