"""Bytes that each GPU sends per step, and what is left of its speed at 8, 64 and 512 GPUs: a model, not a measurement.

Run:  python benchmarks/scaling.py [--rank 8] [--tokens 8192]

Llama-2-7B (its shapes, counted from a model without weights), adapters on all linear layers of its blocks, weights and
dense gradients in bfloat16, gradients of adapters in float32.

Assumptions: ring collectives; an all-reduce of S bytes over n GPUs sends 2 (n-1)/n S from each, an all-gather or
reduce-scatter (n-1)/n S. 400 TFLOP/s of useful arithmetic per GPU (H100, bfloat16, 40 % of its peak). 8 GPUs per node
at 400 GB/s each; between nodes 40 GB/s per GPU (a 400 Gbit/s adapter per GPU at 80 %), which is then the pace of the
ring; 20 µs per collective and step of its tree, log2(n). Arithmetic per token: 4 × parameters with a frozen backbone
(no gradients of weights), 6 × when all are trained. Weights are gathered in the forward and in the backward pass, and
that overlaps with the arithmetic, as do dense gradients with the backward pass (two thirds of the arithmetic, half of
it with a frozen backbone): what does not fit beside it is waited for. The adapters' collective overlaps with nothing
under FSDP, and with the backward pass under DDP. No stragglers, no input, no checkpoints.
"""

import argparse
import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_sparse as ls

FLOPS = 400e12
WITHIN, BETWEEN = 400e9, 40e9
LATENCY = 20e-6
GPUS = (8, 64, 512)


def sizes(rank: int) -> tuple[int, int, int]:
    """Parameters of the backbone and of its adapters, and its blocks."""
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32)
        model = LlamaForCausalLM(config)
        backbone = sum(p.numel() for p in model.parameters())
        adapters = ls.inject(model, ls.SoRA(rank=rank, threshold=1e-3))
    trained = sum(p.numel() for a in adapters.values() for p in a.parameters(recurse=False))
    return backbone, trained, config.num_hidden_layers


def seconds(sent: float, gpus: int, collectives: int) -> float:
    pace = WITHIN if gpus <= 8 else BETWEEN
    return sent / pace + collectives * LATENCY * math.log2(gpus)


def step(kind: str, gpus: int, tokens: int, rank: int, left: float = 1.0) -> tuple[float, float]:
    """Bytes sent per GPU, and the share of the time in which it calculates."""
    backbone, trained, blocks = sizes(rank)
    share = (gpus - 1) / gpus
    adapters = 4 * trained * left
    dense = kind.startswith("dense")
    forward = 2 * backbone * tokens / FLOPS
    backward = (2 if dense else 1) * forward
    gathered = 2 * share * 2 * backbone if kind.endswith("FSDP") else 0.0
    if dense:
        reduced = share * 2 * backbone * (1 if kind.endswith("FSDP") else 2)
        sent = gathered + reduced
        waiting = max(0.0, seconds(gathered / 2, gpus, blocks if gathered else 0) - forward)
        waiting += max(0.0, seconds(gathered / 2 + reduced, gpus, 2 * blocks) - backward)
    else:
        reduced = 2 * share * adapters
        sent = gathered + reduced
        each = seconds(gathered / 2, gpus, blocks) if gathered else 0.0
        waiting = max(0.0, each - forward) + max(0.0, each - backward)
        own = seconds(reduced, gpus, 1)
        waiting += own if gathered else max(0.0, own - backward)
    return sent, (forward + backward) / (forward + backward + waiting)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=8192, help="per GPU and step")
    options = parser.parse_args()
    backbone, trained, _ = sizes(options.rank)
    print(f"{backbone:,} parameters, {trained:,} in adapters of rank {options.rank}, {options.tokens} tokens per GPU")
    for name, kind, left in (
        ("all trained, DDP", "dense DDP", 1.0),
        ("all trained, FSDP", "dense FSDP", 1.0),
        ("adapters, ddp", "adapters DDP", 1.0),
        ("adapters, fsdp2", "adapters FSDP", 1.0),
        ("adapters, fsdp2, 30 % of the ranks left", "adapters FSDP", 0.3),
    ):
        found = [step(kind, gpus, options.tokens, options.rank, left) for gpus in GPUS]
        sent = " / ".join(f"{bytes_sent / 1e9:.2f}" for bytes_sent, _ in found)
        speed = " / ".join(f"{100 * share:.1f} %" for _, share in found)
        print(f"{name:40} GB per GPU and step: {sent}   share of the time it calculates: {speed}   ({GPUS} GPUs)")


if __name__ == "__main__":
    main()
