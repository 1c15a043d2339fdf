"""What a training step costs after compaction, against all ranks held, PEFT's LoRA, and no adapters at all.

Run:  python benchmarks/compaction.py [--rank 8 32] [--left 0.3] [--rounds 30] [--threads 1] [--checkpoint FILE]

MiniLM-L6 with its real weights (extra quickstart), SoRA on every linear layer, batch 32 × 64 tokens, float32, fused
AdamW; PEFT's LoRA (extra peft) on the same layers, and the floor: the frozen backbone with gradients flowing through it
to its embeddings. Ranks die unevenly over the layers, as they do in training; given a checkpoint of the quickstart that
CompactRanks cut, they are those that it has left. Each round takes one step of every variant, in a shuffled order;
times are CPU times of the process, medians over the rounds, and ratios are medians of those within a round, with their
quartiles.
"""

import argparse
import copy
import platform
import random
import statistics
import time
from typing import Any

import peft
import torch
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse import quickstart


def backbone() -> torch.nn.Module:
    folder = quickstart.resolve("quickstart://all-MiniLM-L6-v2")
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).train()


@torch.no_grad()
def kill_gates(model: torch.nn.Module, left: float | dict[str, int]) -> None:
    """Zero all but a share of the gates, of some layers more than of others; or all but so many of each layer."""
    if isinstance(left, dict):
        for name, adapter in ls.adapters_in(model):
            adapter.gate[left[name] :] = 0
        return
    generator = torch.Generator().manual_seed(0)
    gates = [adapter.gate for _, adapter in ls.adapters_in(model)]
    strength = [torch.rand(g.shape, generator=generator) + 0.6 * torch.rand(1, generator=generator) for g in gates]
    limit = torch.cat(strength).quantile(1 - left)
    for gate, values in zip(gates, strength, strict=True):
        gate[values < limit] = 0


class Variant:
    """A model with its optimizer, and a step of it."""

    def __init__(self, model: torch.nn.Module, groups: list[dict[str, Any]], ranks: int = 0) -> None:
        self.model, self.ranks = model, ranks
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)

    def step(self, batch: dict[str, torch.Tensor]) -> float:
        """CPU seconds of one training step."""
        start = time.process_time()
        self.model(**batch).loss.backward()
        self.update()
        self.optimizer.zero_grad()
        return time.process_time() - start

    def update(self) -> None:
        """What follows the backward pass."""
        self.optimizer.step()


class Sparse(Variant):
    """Adapters of ours, a share of whose ranks is left."""

    def __init__(self, model: torch.nn.Module, method: ls.SparseMethod, left: Any = None) -> None:
        ls.inject(model, method)
        super().__init__(model, ls.parameter_groups(model, method))
        self.steps = ls.SparseSteps(method, model, self.optimizer, total_steps=None)
        if left is not None:
            kill_gates(model, left)
            ls.compact(model, self.optimizer)
        self.ranks = sum(adapter.rank for _, adapter in ls.adapters_in(model))

    def update(self) -> None:
        """What follows the backward pass."""
        self.steps.observe()
        self.optimizer.step()


def trained_ranks(checkpoint: str) -> tuple[int, dict[str, int]]:
    """Rank at the start, and ranks left by layer."""
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["lit_sparse"]
    left = {name.removeprefix("model."): rank for name, rank in saved["ranks_left"].items()}
    return max(saved["ranks"].values()), left


def trainable(model: torch.nn.Module) -> list[dict[str, Any]]:
    return [{"params": [parameter for parameter in model.parameters() if parameter.requires_grad]}]


def floor(model: torch.nn.Module) -> Variant:
    """The head trained, nothing else, and gradients made down to the embeddings."""
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    model.get_input_embeddings().register_forward_hook(lambda _, __, output: output.requires_grad_())
    return Variant(model, trainable(model))


def peft_lora(model: torch.nn.Module, rank: int) -> Variant:
    config = peft.LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear", task_type="SEQ_CLS")
    adapted = peft.get_peft_model(model, config)
    layers = [m for m in adapted.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return Variant(adapted, trainable(adapted), rank * len(layers))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--left", type=float, default=0.3, help="share of the ranks that is left")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint", help="take rank and ranks left from it")
    options = parser.parse_args()
    left = options.left
    if options.checkpoint:
        rank, left = trained_ranks(options.checkpoint)
        options.rank = [rank]
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    ids = torch.randint(1000, 30000, (32, 64))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(32) % 2}
    plain = backbone()
    print(f"torch {torch.__version__}, {platform.machine()}, {options.threads} thread(s), {options.rounds} rounds")
    for rank in options.rank:
        # A threshold of zero: gates are stepped, and none dies in the meantime.
        method = ls.SoRA(rank=rank, alpha=16, threshold=0.0)
        variants = {
            "floor": floor(copy.deepcopy(plain)),
            "PEFT LoRA": peft_lora(copy.deepcopy(plain), rank),
            "all ranks": Sparse(copy.deepcopy(plain), method),
            "compacted": Sparse(copy.deepcopy(plain), method, left),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for number in range(options.rounds + 3):
            for name in random.sample(list(variants), len(variants)):
                seconds = variants[name].step(batch)
                if number >= 3:  # the first ones warm up
                    times[name].append(seconds)
        for name, variant in variants.items():
            print(f"r = {rank:3}  {name:10}  {variant.ranks:5} ranks  {1000 * statistics.median(times[name]):8.1f} ms")
        for name, peer in (("compacted", "all ranks"), ("all ranks", "PEFT LoRA"), ("compacted", "PEFT LoRA")):
            ratios = [ours / theirs for ours, theirs in zip(times[name], times[peer], strict=True)]
            quarter, half, three = statistics.quantiles(ratios, n=4)
            print(f"r = {rank:3}  {name} / {peer}: {half:.3f} ({quarter:.3f} to {three:.3f})")


if __name__ == "__main__":
    main()
