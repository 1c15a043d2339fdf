"""The same comparison on one GPU: times by CUDA events, kernels, waits of the host, peak memory.

Run:  python benchmarks/gpu.py [--backbone minilm bert-base llama-1b] [--rank 8 32] [--rows 16] [--tokens 256]
      [--rounds 30] [--precision bf16-mixed|bf16-true|32-true] [--json FILE] [--device cuda]

Random weights but for MiniLM. Each round has a step of every variant, in a shuffled order, timed by events on the
stream. "kernels" are launches in a step of one variant, by the profiler; "waits" are synchronisations of the host in
it, by torch's sync debug mode; both once, apart from the timing. With --device cpu it only shows that it runs.
"""

import argparse
import random
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from variants import Batch, Variant, build, make_batch, minilm, provenance, ratio, write_json


def bert_base() -> nn.Module:
    return BertForSequenceClassification(BertConfig()).train()


def llama_1b() -> nn.Module:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        num_labels=2,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config).train()


BACKBONES: dict[str, Callable[[], nn.Module]] = {"minilm": minilm, "bert-base": bert_base, "llama-1b": llama_1b}
NAMES = ["floor", "PEFT LoRA", "PEFT AdaLoRA", "LoRA", "SoRA", "RoseLoRA", "gated RoseLoRA"]


def precision(options: argparse.Namespace) -> AbstractContextManager[Any]:
    mixed = options.precision == "bf16-mixed"
    return torch.autocast(options.device, torch.bfloat16) if mixed else nullcontext()


def step(variant: Variant, batch: Batch, options: argparse.Namespace) -> None:
    with precision(options):
        loss = variant.model(**batch).loss
    loss.backward()
    if variant.before is not None:
        variant.before()
    variant.optimizer.step()
    if variant.after is not None:
        variant.after()
    variant.optimizer.zero_grad()


def timed(variant: Variant, batch: Batch, options: argparse.Namespace) -> float:
    """Milliseconds of a step."""
    if options.device == "cpu":
        start = time.perf_counter()
        step(variant, batch, options)
        return 1000 * (time.perf_counter() - start)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step(variant, batch, options)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def kernels(variant: Variant, batch: Batch, options: argparse.Namespace) -> int:
    activity = ProfilerActivity.CPU if options.device == "cpu" else ProfilerActivity.CUDA
    with profile(activities=[activity]) as found:
        step(variant, batch, options)
    return sum(event.count for event in found.key_averages() if "mem" not in event.key.lower())


def waits(variant: Variant, batch: Batch, options: argparse.Namespace) -> int | None:
    if options.device == "cpu":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step(variant, batch, options)
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def peak(variant: Variant, batch: Batch, options: argparse.Namespace) -> float | None:
    """MiB beyond what all variants hold at rest."""
    if options.device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(variant, batch, options)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(options: argparse.Namespace, plain: nn.Module, rank: int) -> dict[str, dict[str, Any]]:
    batch = {key: value.to(options.device) for key, value in make_batch(options.rows, options.tokens).items()}
    variants = build(plain, rank, 0.0, NAMES)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(options.rounds + 5):
        for name in random.sample(list(variants), len(variants)):
            milliseconds = timed(variants[name], batch, options)
            if number >= 5:
                times[name].append(milliseconds)
    found: dict[str, dict[str, Any]] = {}
    for name, variant in variants.items():
        found[name] = {
            "ms": statistics.median(times[name]),
            "/ PEFT LoRA": ratio(times[name], times["PEFT LoRA"]),
            "/ floor": ratio(times[name], times["floor"]),
            "kernels": kernels(variant, batch, options),
            "waits": waits(variant, batch, options),
            "peak_MiB": peak(variant, batch, options),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--precision", choices=["bf16-mixed", "bf16-true", "32-true"], default="bf16-mixed")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.manual_seed(0)
    machine = provenance()
    if options.device == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    results = []
    for backbone in options.backbone:
        dtype = torch.bfloat16 if options.precision == "bf16-true" else torch.float32
        plain = BACKBONES[backbone]().to(options.device, dtype)
        for rank in options.rank:
            found = measure(options, plain, rank)
            print(f"\n{backbone}, rank {rank}, {options.rows} × {options.tokens} tokens, {options.precision}\n")
            print("| | ms | / PEFT LoRA | / floor | kernels | waits | peak, MiB |\n|---|---|---|---|---|---|---|")
            for name, row in found.items():
                ratios = " | ".join(f"{row[f'/ {peer}'][0]:.3f}" for peer in ("PEFT LoRA", "floor"))
                memory = "" if row["peak_MiB"] is None else f"{row['peak_MiB']:.0f}"
                print(
                    f"| {name} | {row['ms']:.2f} | {ratios} | {row['kernels']} | {row['waits']} | {memory} |",
                    flush=True,
                )
            results.append({"backbone": backbone, "rank": rank, "variants": found})
            write_json(options.json, {**machine, **vars(options), "results": results})


if __name__ == "__main__":
    main()
