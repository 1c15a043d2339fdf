"""Write adapters as the LoRA file that llama.cpp loads."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.embedding import LowRankEmbedding
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.card import ExportReport
from lit_sparse.interchange.export import ExportOptions, exporting, require_finite
from lit_sparse.interchange.loading import inject_layers
from lit_sparse.interchange.remains import folded, padded, plain_copy, require_trained, trained_whole, without_empty
from lit_sparse.interchange.vocabulary import rows_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

FILE = "adapter.gguf"

# Class in transformers -> (architecture in llama.cpp, whether its converter reorders the rows of q and k). Otherwise
# the converter (llama.cpp, conversion/*.py, modify_tensors) leaves linear layers of these architectures as they are;
# tests/interchange/test_llama_cpp.py compares each with llama.cpp itself.
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


def export_gguf(model: nn.Module, folder: str | os.PathLike[str], **options: Unpack[ExportOptions]) -> ExportReport:
    """Write the adapters as ``adapter.gguf``, a LoRA file for llama.cpp and the programs built on it.

    A and B are float32; gate and scale are folded into B. All layers in the file have the same rank, padded with zeros,
    and alpha is that rank, so that llama.cpp's scale (alpha divided by the tensor's rank) is 1 for each. Layers without
    a live rank are left out. The rows of B of query and key projections are reordered as llama.cpp's converter reorders
    those of the weights. Needs the package gguf (extra ``gguf``).

    Args:
        model: The Hugging Face language model with its adapters; left as it is.
        folder: To write; must not exist, or be empty.
        **options: See :class:`~lit_sparse.ExportOptions`.

    Returns:
        Sizes, and the difference that was found when the file was read back into a copy of the model.

    Raises:
        UsageError: If gguf is not installed, the architecture is not one of those whose LoRA only needs other names in
            llama.cpp, an adapter or a module that was trained whole has no place in the file, the frozen weights were
            changed by PiSSA, the folder is not empty, or outputs differ by more than the tolerance. Nothing is then
            left behind.
    """
    require_trained(model, original="a LoRA")
    adapters = low_rank_in(
        model, "llama.cpp's LoRA holds A and B", "Use export_merged and llama.cpp's convert_hf_to_gguf.py."
    )
    if rows_of(model):
        raise UsageError(
            "New tokens have no place in a LoRA file of llama.cpp: use export_merged and llama.cpp's "
            "convert_hf_to_gguf.py."
        )
    names = _tensor_names(model, adapters)
    with exporting("gguf", model, folder, options, dtypes=(torch.float32,)) as draft:
        rank = _write(model, adapters, names, draft.folder)
        note = f"For llama.cpp and programs built on it. Every layer in the file has rank {rank} and scale 1."
        draft.record({"notes": [note]})
        draft.compare(_read(model, names, draft.folder))
    return draft.report


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


def _write(model: nn.Module, adapters: Mapping[str, LowRankAdapter], names: Mapping[str, str], draft: Path) -> int:
    """Write the file; the rank of its layers."""
    import gguf

    layers = padded(without_empty({name: folded(name, adapter) for name, adapter in adapters.items()}))
    rank = next(iter(layers.values())).ranks[0]
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        # llama.cpp looks up rows of an embedding's A, which therefore is stored with a row for each token.
        tensors[f"{names[name]}.lora_a"] = layer.lora_A.t() if _is_embedding(model, name) else layer.lora_A
        tensors[f"{names[name]}.lora_b"] = layer.lora_B_t.t()[_row_order(model, names[name], layer.out_features)]
    tensors = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    require_finite(tensors)
    writer = gguf.GGUFWriter(draft / FILE, _ARCHITECTURES[type(model).__name__][0])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return rank


def _read(model: nn.Module, names: Mapping[str, str], draft: Path) -> nn.Module:
    import gguf

    reader = gguf.GGUFReader(draft / FILE)
    alpha = float(reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents())
    stored = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = {}
    for name in (name for name in names if f"{names[name]}.lora_b" in stored):
        lora_A, lora_B = stored[f"{names[name]}.lora_a"], stored[f"{names[name]}.lora_b"]
        lora_B_t, rank = torch.empty_like(lora_B).t(), lora_B.shape[1]
        lora_B_t[:, _row_order(model, names[name], len(lora_B))] = lora_B.t()
        layers[name] = LayerFactors(
            name=name,
            lora_A=lora_A.t() if _is_embedding(model, name) else lora_A,
            lora_B_t=lora_B_t,
            ranks=(rank,),
            max_rank=rank,
            scale=alpha / rank,
            alpha=alpha,
        )
    copied = plain_copy(model)
    inject_layers(copied, layers, str(draft), train_head=False)
    return copied


def _is_embedding(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name), LowRankEmbedding)


def _row_order(model: nn.Module, tensor_name: str, rows: int) -> Tensor:
    """For each row of the weight in llama.cpp its row in transformers, shape ``(rows,)``.

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
