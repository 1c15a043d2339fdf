"""Compare the outputs of two models on a batch that is made from their configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES,
)

from lit_sparse.adapters.modes import in_mode
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.errors import UsageError, reason_of

_LENGTH = 16  # tokens
_SAMPLES = 16000  # of a sound: a second
_PIXELS = 224  # where the configuration names no size
_SMALL = 0.1  # smaller outputs, which cancel out, do not measure rounding
# Effect of another order of the same operations, relative to the largest output.
_TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def probe_batch(model: nn.Module, tokens: Sequence[int] = ()) -> dict[str, Tensor]:
    """One row of input, the same for all models of one configuration.

    Args:
        model: A Hugging Face model, or a module that holds one and passes its arguments on.
        tokens: Ids to put into the first half of the input, as far as there is room.

    Returns:
        ``input_ids``, ``pixel_values``, ``input_values`` or ``input_features``, whichever the model reads, with the
        masks and other inputs it needs, on the model's device.

    Raises:
        UsageError: If no input can be made for this kind of model.
    """
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    make = None if inner is None else _INPUTS.get(inner.main_input_name)
    batch = None if make is None else make(inner)
    if inner is None or batch is None:
        raise UsageError(
            f"No input can be made from the configuration of {type(model).__name__} to compare outputs on: give one as "
            "batch, a dictionary of the model's arguments."
        )
    if tokens and "input_ids" in batch:
        chosen = list(tokens)[-_LENGTH // 2 :]
        batch["input_ids"][..., : len(chosen)] = torch.tensor(chosen)
    dtype = next((p.dtype for p in inner.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(inner.device, dtype if v.is_floating_point() else v.dtype) for k, v in batch.items()}


@torch.no_grad()
def outputs_of(model: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """All floating-point outputs of the model for a batch, in evaluation mode, on the CPU.

    Raises:
        UsageError: If the model does not run on the batch, or has no such output.
    """
    with in_mode(model, training=False):
        try:
            output = model(**batch)
        except Exception as error:
            shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
            raise UsageError(
                f"{type(model).__name__} does not run on {shapes} ({reason_of(error)}), so outputs cannot "
                "be compared: give fitting arguments as batch."
            ) from error
    found = [tensor.detach().cpu() for tensor in _tensors(output)]
    if not found:
        raise UsageError(
            f"{type(model).__name__} returns {type(output).__name__}, without a tensor of numbers to compare."
        )
    return found


def difference_of(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The largest absolute difference; infinite where shapes differ, NaN where only one side has a NaN."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    pairs = [(a.double(), b.double()) for a, b in zip(expected, found, strict=True)]
    # Masked scores are -inf on both sides.
    gaps = [torch.where(a == b, 0.0, (a - b).abs()).flatten() for a, b in pairs]
    return float(torch.cat(gaps).max())


def default_tolerance(model: nn.Module, outputs: Sequence[Tensor], *dtypes: torch.dtype) -> float:
    """Largest effect of rounding on the outputs of a model.

    Args:
        model: The coarsest dtype of its parameters counts; quantized layers count as bfloat16.
        outputs: The tolerance is a share of their largest value.
        dtypes: Further dtypes that weights pass through.
    """
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if any(quantized_layers(model)):
        own.add(torch.bfloat16)
    finite = [t.double()[t.isfinite()].abs() for t in outputs]
    largest = max((float(t.max()) for t in finite if t.numel()), default=0.0)
    return max(_TOLERANCES.get(dtype, 1e-1) for dtype in (*own, *dtypes)) * max(_SMALL, largest)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, tuple | list):
        for value in output:
            yield from _tensors(value)


def _tokens(model: PreTrainedModel) -> dict[str, Tensor] | None:
    config: Any = model.config.get_text_config()
    count = getattr(config, "vocab_size", None)
    if count is None:
        return None
    # Distinct and far apart. A pad token would end the row; BART needs exactly one eos.
    ids = [i * max(1, count // (_LENGTH + 2)) % count for i in range(1, _LENGTH + 1)]
    eos = getattr(config, "eos_token_id", None)
    special = {t for t in (getattr(config, "pad_token_id", None), eos) if isinstance(t, int)}
    usable = next((i for i in range(count) if i not in special), 0)
    ids = [usable if i in special else i for i in ids]
    if isinstance(eos, int) and eos < count:
        ids[-1] = eos
    input_ids = torch.tensor([ids])
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        input_ids = torch.stack([input_ids, input_ids.flip(1)], 1)
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = input_ids
    if type(model).__name__ in MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES.values():
        batch |= _pixels(model)  # CLIP and its like compare texts with images
    return batch


def _pixels(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None) or _PIXELS
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return {"pixel_values": _wave(1, getattr(vision, "num_channels", 3), height, width)}


def _samples(model: PreTrainedModel) -> dict[str, Tensor]:
    config = model.config
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):  # a spectrogram, as the AST reads it
        return {"input_values": _wave(1, config.max_length, config.num_mel_bins)}
    return {"input_values": _wave(1, _SAMPLES)}


def _features(model: PreTrainedModel) -> dict[str, Tensor] | None:
    config: Any = model.config
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):  # Whisper's
        batch = {"input_features": _wave(1, config.num_mel_bins, 2 * config.max_source_positions)}
        start = getattr(config, "decoder_start_token_id", None)
        if start is not None and model.get_output_embeddings() is not None:
            batch["decoder_input_ids"] = torch.tensor([[start, start]])
        return batch
    width = getattr(config, "feature_projection_input_dim", None)
    return None if width is None else {"input_features": _wave(1, _LENGTH, width)}


def _wave(*shape: int) -> Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.1).sin().view(shape)


_INPUTS: dict[str, Any] = {
    "input_ids": _tokens,
    "pixel_values": _pixels,
    "input_values": _samples,
    "input_features": _features,
}
