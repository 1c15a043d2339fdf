"""Find, check and dequantize frozen layers that torchao or bitsandbytes quantized."""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from lit_sparse.errors import UsageError


def is_quantized(layer: nn.Module) -> bool:
    """Whether the weight of ``layer`` is packed: a tensor sub-class or a tensor of integers."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    # transformers may make a bitsandbytes layer of a new head, which has a plain weight and cannot run.
    packed = type(weight.data) not in (Tensor, DTensor) or not weight.is_floating_point()
    return packed or _is_bitsandbytes(layer)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Iterate over ``(name, layer)`` of the quantized linear layers and embeddings of ``model``, under every name."""
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, nn.Linear | nn.Embedding) and is_quantized(layer):
            yield name, layer


def require_trainable_around(model: nn.Module, head: Collection[str]) -> None:
    """Check that adapters and head can be trained on a model with quantized layers.

    On processors with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation. This cannot be undone,
    and no gradient passes afterwards, so that it is switched off in every layer.

    Args:
        model: The frozen backbone.
        head: Names of the modules to train whole.

    Raises:
        UsageError: If a part of the head is quantized, or no gradient passes through a quantized layer.
    """
    dtype = _unpacked_dtype(model)
    for name, layer in quantized_layers(model):
        if any(name == part or name.startswith(f"{part}.") for part in head):
            raise UsageError(
                f"{name!r} of {type(model).__name__} is to be trained, but it is quantized. Name it in the "
                "quantization_config's modules_to_not_convert (for bitsandbytes llm_int8_skip_modules), or set "
                "train_head to what can be trained."
            )
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
        if _is_repacked(layer) or (isinstance(layer, nn.Linear) and not _passes_gradient(layer, dtype)):
            raise UsageError(
                f"No gradient passes through the quantized layer {name!r} of {type(model).__name__}, so that nothing "
                "below it would learn. Quantize weights only (torchao's Int8WeightOnlyConfig, not "
                "Int8DynamicActivation…), and inject before the model is run in evaluation."
            )


@torch.no_grad()
def dequantized(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Plain layers with the weights that the quantized ones of ``model`` compute with.

    A quantized layer computes with exactly this weight in training, and rounds differently. In evaluation,
    bitsandbytes' 8-bit layers also round their input to 8 bits.

    Args:
        model: Not changed.

    Returns:
        Quantized layer to plain one, frozen, in the dtype of the parameters of ``model`` that are not quantized.

    Raises:
        UsageError: If a layer is quantized by another library than torchao or bitsandbytes.
    """
    dtype = _unpacked_dtype(model)
    return {layer: _plain(name, layer, dtype) for name, layer in quantized_layers(model)}


def is_four_bit(layer: nn.Module) -> bool:
    """Whether ``layer`` is a linear layer that bitsandbytes packed to 4 bits."""
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit)


def make_shardable(layer: Any, device: torch.device) -> None:
    """Make the weight of a 4-bit layer a plain tensor of bytes, which FSDP2 can shard.

    The layer keeps what is needed to unpack it, whole and on ``device``; bitsandbytes finds it there once the bytes are
    gathered.
    """
    layer.quant_state = layer.weight.quant_state
    layer.quant_state.to(device)
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Tensor), requires_grad=False)


def forget_quantization(model: nn.Module) -> None:
    """Clear the quantization config of every Hugging Face model in ``model``, after its weights were dequantized."""
    for module in list(model.modules()):
        quantizer: Any = getattr(module, "hf_quantizer", None)
        if quantizer is not None:
            quantizer.remove_quantization_config(module)


def _is_repacked(layer: Any) -> bool:
    return bool(getattr(getattr(layer.weight, "quant_state", None), "packing_format_for_cpu", False))


def _passes_gradient(layer: nn.Linear, dtype: torch.dtype) -> bool:
    x = torch.ones(1, layer.in_features, dtype=dtype, device=layer.weight.device, requires_grad=True)
    with torch.enable_grad():
        y = layer(x)
        (gradient,) = torch.autograd.grad(y.sum(), x, allow_unused=True) if y.requires_grad else (None,)
    return gradient is not None and bool(gradient.any())


def _plain(name: str, layer: Any, dtype: torch.dtype) -> nn.Module:
    weight = nn.Parameter(_unpacked(name, layer).to(dtype), requires_grad=False)
    if _is_bitsandbytes(layer):
        with torch.device("meta"):
            if getattr(layer, "source_cls", None) is Conv1D:  # transformers packs its transpose
                linear: nn.Linear | Conv1D = Conv1D(layer.out_features, layer.in_features)
                weight = nn.Parameter(weight.t().contiguous(), requires_grad=False)
            else:
                linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
        linear.weight = weight
        if layer.bias is not None:  # in the input's dtype, to which bitsandbytes rounds it in place
            linear.bias = nn.Parameter(layer.bias.to(dtype), requires_grad=False)
        return linear.train(layer.training)
    plain: nn.Module = copy.copy(layer)  # of the layer's own class, with its own bias
    plain._parameters = {**layer._parameters, "weight": weight}
    vars(plain).pop("extra_repr", None)  # torchao's, which shows the packed weight
    return plain


def _unpacked(name: str, layer: Any) -> Tensor:
    weight = layer.weight
    if _is_torchao(weight):
        return weight.dequantize()  # type: ignore[no-any-return]
    if _is_bitsandbytes(layer):
        functional = sys.modules["bitsandbytes"].functional
        if weight.is_floating_point():  # llm_int8_has_fp16_weight: packed anew at every step
            return weight.data  # type: ignore[no-any-return]
        if getattr(weight, "quant_state", None) is not None:
            return functional.dequantize_4bit(weight.data, weight.quant_state)  # type: ignore[no-any-return]
        # The first forward moves the scales from the weight to the layer.
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return functional.int8_vectorwise_dequant(weight.data, scales)  # type: ignore[no-any-return]
    raise UsageError(
        f"{name!r} is quantized as {type(weight).__name__} of {weight.dtype}, which lit_sparse cannot unpack: it can "
        "those of torchao and bitsandbytes. Keep the adapters beside the quantized model."
    )


def _unpacked_dtype(model: nn.Module) -> torch.dtype:
    """Dtype of the first frozen parameter that is not packed, of the embeddings as a rule."""
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    frozen = (p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and id(p) not in packed)
    return next((p.dtype for p in frozen), torch.float32)


def _is_torchao(weight: object) -> bool:
    torchao: Any = sys.modules.get("torchao.utils")  # not imported: without it nothing can be of its classes
    return torchao is not None and isinstance(weight, torchao.TorchAOBaseTensor)


def _is_bitsandbytes(layer: nn.Module) -> bool:
    bitsandbytes: Any = sys.modules.get("bitsandbytes")
    return bitsandbytes is not None and isinstance(layer, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt)
