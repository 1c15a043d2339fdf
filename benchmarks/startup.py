"""How long it takes until training starts: imports, the command line, adapters for a model of seven billion parameters.

Run:  python benchmarks/startup.py [--rounds 5] [--json FILE]

Wall-clock medians. Imports and the command line in processes of their own, interleaved with the import of torch,
Lightning and transformers' model classes alone, which any module of this kind needs. Adapters are put into a
Llama-2-7B (32 blocks, 224 linear layers) on the meta device, where nothing but our own work takes time.
"""

import argparse
import statistics
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from variants import provenance, write_json

import lit_sparse as ls

COMMANDS = {
    "import torch, lightning, transformers": [
        "-c",
        "import torch, lightning, transformers; from transformers import BertModel, PreTrainedModel",
    ],
    "import lit_sparse": ["-c", "import lit_sparse; lit_sparse.SequenceClassification, lit_sparse.SoRA"],
    "lit-sparse fit --config configs/quickstart.yaml --print_config": [
        *("-m", "lit_sparse", "fit", "--config", "configs/quickstart.yaml", "--print_config"),
    ],
}


def processes(rounds: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(rounds):
        for name, command in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def injection(rounds: int) -> dict[str, float]:
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
    methods = {"SoRA": ls.SoRA(rank=32, threshold=1e-3), "RoseLoRA": ls.RoseLoRA(rank=32)}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, method in methods.items():
            with torch.device("meta"):
                model = LlamaForCausalLM(config)
            start = time.perf_counter()
            ls.inject(model, method)
            times[name].append(time.perf_counter() - start)
    return {f"inject {name} into a Llama of 7 B, meta device": statistics.median(s) for name, s in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    results = {**processes(options.rounds), **injection(options.rounds)}
    for name, seconds in results.items():
        print(f"{name}: {seconds:.2f} s")
    write_json(options.json, {**provenance(), **vars(options), "results": results})


if __name__ == "__main__":
    main()
