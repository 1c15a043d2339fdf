"""Quantize the blocks of a model in place, for the part "quantized" of gpu.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lit_sparse.adapters.blocks import blocks_of


def nf4(model: Any) -> None:
    import bitsandbytes

    model.is_loaded_in_4bit = True  # where PEFT looks
    for block in blocks_of(model):
        for parent in list(block.modules()):
            for name, layer in list(parent.named_children()):
                if isinstance(layer, nn.Linear):
                    own = bitsandbytes.nn.Linear4bit(
                        layer.in_features, layer.out_features, False, compute_dtype=torch.bfloat16, quant_type="nf4"
                    )
                    own.weight = bitsandbytes.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                    own.weight.module = own
                    setattr(parent, name, own.to(layer.weight.device))


def torchao(config: str, model: nn.Module) -> None:
    from torchao import quantization

    options: dict[str, Any] = {}
    if config == "IntxWeightOnlyConfig":
        options = {"weight_dtype": torch.int4, "granularity": quantization.PerGroup(32)}
    for block in blocks_of(model):
        quantization.quantize_(block, getattr(quantization, config)(**options))


QUANTIZED: dict[str, tuple[str, Callable[[Any], None]]] = {
    "bf16": ("", lambda _: None),
    "nf4": ("bitsandbytes", nf4),
    "int8": ("torchao", functools.partial(torchao, "Int8WeightOnlyConfig")),
    "int4": ("torchao", functools.partial(torchao, "IntxWeightOnlyConfig")),
    "fp8": ("torchao", functools.partial(torchao, "Float8WeightOnlyConfig")),
}
"""By name, the package that it needs and what it does."""
