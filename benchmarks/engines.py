"""Whether engines compute what the live model does: one trained Llama, in every folder that is written for them.

Run:  LIT_SPARSE_NODE_LLAMA_CPP=DIR python benchmarks/engines.py --json benchmarks/results/engines.json

DIR is where npm installed node-llama-cpp, which carries llama.cpp: npm install --prefix DIR node-llama-cpp
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from tables import of_engines
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from variants import provenance, write_json

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import engine_rules
import llama_cpp

RANK = 4
STEPS = 30
Answer = tuple[list[int], torch.Tensor]
"""Greedy tokens, and the log probabilities of the first of them."""


def base() -> LlamaForCausalLM:
    """A Llama with random weights, the same at every call."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "initializer_range": 0.3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=llama_cpp.VOCABULARY, pad_token_id=None, **sizes, **heads)).eval()


def trained() -> LlamaForCausalLM:
    """The Llama after some steps of SoRA, with layers that keep from none to all of their ranks."""
    model = base().train()
    method = ls.SoRA("all-linear", rank=RANK, alpha=2 * RANK, sparsity_weight=1.0, gate_lr=0.07)
    ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.02)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=STEPS)
    rows = torch.randint(3, llama_cpp.VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(1))
    for _ in range(STEPS):
        model(rows, labels=rows).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    steps.finish()
    return model.eval()


def loaded_by_transformers(folder: Path) -> PreTrainedModel:
    """The base with the adapter that transformers loads by itself."""
    model = base()
    model.load_adapter(str(folder))
    return model


def compare(folder: Path) -> dict[str, Any]:
    """Write every folder of one trained model, load each where it belongs, and compare with the live model."""
    model = trained()
    live, before = llama_cpp.in_transformers(model), llama_cpp.in_transformers(base())
    ranks = [layer.rank for layer in layer_sparsity(model)]
    for layout in ("padded", "ragged"):
        ls.export_peft(model, folder / layout, layout)
    ls.export_gguf(model, folder / "gguf")
    ls.export_merged(model, folder / "merged")
    found: dict[tuple[str, str], Answer] = {}
    with torch.no_grad():
        for layout in ("padded", "ragged"):
            lora = PeftModel.from_pretrained(base(), folder / layout)
            found["PEFT", f"peft, {layout}"] = llama_cpp.in_transformers(lora)
            found["transformers", f"peft, {layout}"] = llama_cpp.in_transformers(
                loaded_by_transformers(folder / layout)
            )
        merged = LlamaForCausalLM.from_pretrained(folder / "merged")
        found["transformers", "merged"] = llama_cpp.in_transformers(merged)
        for engine, rule in (("vLLM, its rule", engine_rules.vllm), ("TGI, its rule", engine_rules.tgi)):
            for layout in ("padded", "ragged"):
                ruled = engine_rules.apply(rule, folder / layout, base())
                found[engine, f"peft, {layout}"] = llama_cpp.in_transformers(ruled)
    version, answers = in_llama_cpp(folder, merged)
    found |= {("llama.cpp", layout): answer for layout, answer in answers.items()}
    return {
        **provenance(),
        "transformers": transformers.__version__,
        "llama.cpp": version,
        "rank": RANK,
        "ranks": sorted(ranks),
        "tokens": llama_cpp.COUNT,
        "effect": difference(before, live),
        "results": [row(engine, layout, answer, live) for (engine, layout), answer in found.items()],
    }


def in_llama_cpp(folder: Path, merged: LlamaForCausalLM) -> tuple[str, dict[str, Answer]]:
    """llama.cpp's version, and its answers by what was loaded."""
    plain = base()
    for name, model in (("base", plain), ("merged", merged)):
        llama_cpp.write_base(model, folder / f"{name}.gguf")
    for layout in ("padded", "ragged"):
        llama_cpp.convert_lora(folder / layout, plain, folder / f"{layout}.gguf")
    runs = {
        "peft, padded": (folder / "base.gguf", folder / "padded.gguf"),
        "peft, ragged": (folder / "base.gguf", folder / "ragged.gguf"),
        "gguf": (folder / "base.gguf", folder / "gguf" / "adapter.gguf"),
        "merged": (folder / "merged.gguf",),
    }
    return llama_cpp.run(folder, runs)


def row(engine: str, layout: str, answer: Answer, live: Answer) -> dict[str, Any]:
    """One row of the table."""
    equal = answer[0] == live[0]
    return {"engine": engine, "layout": layout, "difference": difference(answer, live), "tokens_equal": equal}


def difference(one: Answer, other: Answer) -> float:
    """The largest difference of log probabilities, over the whole vocabulary."""
    return float((one[1] - other[1]).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="file to write")
    args = parser.parse_args()
    if llama_cpp.NODE is None:
        parser.error(llama_cpp.REASON)
    with tempfile.TemporaryDirectory() as folder:
        content = compare(Path(folder))
    print(of_engines(content))
    write_json(args.json, content)


if __name__ == "__main__":
    main()
