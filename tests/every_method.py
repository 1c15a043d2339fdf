"""Every method on every kind of layer, in a training loop."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls

STEPS, CHOSEN = 10, 4
"""Steps of a run, and the one after which budgets and masks are final."""

RUN: dict[str, Any] = {"begin": 2, "end": CHOSEN}
METHODS: dict[str, Callable[..., ls.SparseMethod]] = {
    "LoRA": ls.LoRA,
    "LoRA, PiSSA": functools.partial(ls.LoRA, init_weights="pissa"),
    "LoRA, GoRA": functools.partial(ls.LoRA, init_weights="gora"),
    # Twice the rank is at most the rows of "out".
    "LoRA, LoRA-GA": lambda names="all-linear", **o: ls.LoRA(names, **{**o, "rank": 2}, init_weights="lora_ga"),
    "LoRA+": functools.partial(ls.LoRA, loraplus_lr_ratio=4.0, use_rslora=True, dropout=0.1),
    "SoRA, threshold": functools.partial(ls.SoRA, threshold=0.02, l1_weight=0.1, freeze_zero_after=2, refit=4),
    "SoRA, weight": functools.partial(ls.SoRA, sparsity_weight=0.5, gate_lr=0.05, operator="released"),
    "SoRA, metric": functools.partial(ls.SoRA, sparsity_weight=0.1, metric="optimizer"),
    "SoRA, budget": functools.partial(ls.SoRA, budget=0.5, **RUN),
    "SoRA, budget, gates trained": functools.partial(ls.SoRA, budget=0.5, gate_lr=0.01, **RUN),
    "SoRA, budget, norm": functools.partial(ls.SoRA, budget=0.5, score="norm", **RUN),
    "SoRA, budget, sensitivity": functools.partial(ls.SoRA, budget=0.5, score="sensitivity", **RUN),
    "HardConcreteLoRA, penalty": functools.partial(ls.HardConcreteLoRA, penalty_weight=0.5),
    "HardConcreteLoRA, budget": functools.partial(ls.HardConcreteLoRA, budget=0.5, **RUN),
    "RoseLoRA, density": functools.partial(ls.RoseLoRA, density=0.3, clamp=0.5, **RUN),
    "RoseLoRA, masks held": functools.partial(ls.RoseLoRA, density=0.3, update_every=2, **RUN),
    "RoseLoRA, changed": functools.partial(ls.RoseLoRA, changed=0.3, **RUN),
    "GatedRoseLoRA, threshold": functools.partial(ls.GatedRoseLoRA, threshold=0.02, density=0.3, refit=4, **RUN),
    "GatedRoseLoRA, budget": functools.partial(ls.GatedRoseLoRA, budget=0.5, changed=0.3, **RUN),
}


class Tokens(nn.Module):
    """An embedding, and what follows it in the mean over the tokens."""

    def __init__(self, **embedding: Any) -> None:
        super().__init__()
        self.layer, self.out = nn.Embedding(11, 16, **embedding), nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.layer(ids).mean(1))


class Features(nn.Module):
    """A layer on embedded tokens."""

    def __init__(self, layer: nn.Module, images: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer, self.out, self.images = nn.Embedding(11, 16), layer, nn.Linear(16, 4), images

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.layer(x.mT.unflatten(2, (2, 4))).flatten(2).mean(2) if self.images else self.layer(x).mean(1)
        return self.out(x.tanh().to(self.out.weight.dtype))


class Routed(nn.Module):
    """Experts as Mixtral's, and a router."""

    def __init__(self) -> None:
        super().__init__()
        config = MixtralConfig(hidden_size=16, intermediate_size=16, num_local_experts=4, num_experts_per_tok=2)
        self.experts, self.router = MixtralExperts(config), nn.Linear(16, 4)
        for parameter in self.experts.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.router(x.flatten(0, 1)).softmax(-1).topk(2)
        return self.experts(x.flatten(0, 1), index, weights.to(x.dtype)).view_as(x)


def quantized(layer: nn.Linear) -> nn.Module:
    torchao = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(layer)
    torchao.quantize_(holder, torchao.Int8WeightOnlyConfig())
    return holder[0]


def four_bits() -> nn.Module:
    """Packed when it is moved to a device."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    return bitsandbytes.nn.Linear4bit(16, 16, compute_dtype=torch.float32, quant_type="nf4")


KINDS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "linear": (lambda: Features(nn.Linear(16, 16)), ["layer", "out"]),
    "Conv1D": (lambda: Features(Conv1D(16, 16)), ["layer"]),
    "convolution": (lambda: Features(nn.Conv2d(16, 16, 3, padding=1), images=True), ["layer"]),
    "grouped convolution": (lambda: Features(nn.Conv2d(16, 16, 3, padding=1, groups=4), images=True), ["layer"]),
    "embedding": (Tokens, ["layer"]),
    "padded embedding": (lambda: Tokens(padding_idx=0), ["layer"]),
    "linear in bfloat16": (lambda: Features(nn.Linear(16, 16)).bfloat16(), ["layer"]),
    "experts in bfloat16": (lambda: Features(Routed()).bfloat16(), ["gate_up_proj", "down_proj"]),
    "int8 of torchao": (lambda: Features(quantized(nn.Linear(16, 16))), ["layer"]),
    "nf4 of bitsandbytes": (lambda: Features(four_bits()), ["layer"]),
}
"""Model and the names to adapt."""

QUANTIZED = {"int8 of torchao", "nf4 of bitsandbytes"}
"""Those from whose weights no method starts."""


def model_of(kind: str, method: ls.SparseMethod, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    model = KINDS[kind][0]().to(device)
    with torch.random.fork_rng(devices=[]):
        ls.inject(model, method)
    return model


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(ids), ids.sum(1) % 4)


class Loop:
    """A training loop, and what it leaves."""

    def __init__(self, kind: str, method: Any, device: torch.device, **optimizer: Any) -> None:
        make, names = METHODS[method] if isinstance(method, str) else method, KINDS[kind][1]
        self.method = make(names, rank=4, train_head=False if "out" in names else ["out"])
        self.model = model_of(kind, self.method, device)
        self.ids = torch.randint(11, (6, 8), generator=torch.Generator().manual_seed(1)).to(device, non_blocking=True)
        if self.method.batch_start:
            ls.start_from_batches(self.model, self.method, [self.ids], functools.partial(loss_of, self.model))
        groups = ls.parameter_groups(self.model, self.method, lr=0.02)
        self.optimizer = torch.optim.AdamW(groups, lr=0.02, **optimizer)
        self.steps = ls.SparseSteps(self.method, self.model, self.optimizer, STEPS)
        self.adapters = [adapter for _, adapter in ls.adapters_in(self.model)]

    def step(self) -> None:
        loss_of(self.model, self.ids).backward()
        self.steps.observe()
        torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
