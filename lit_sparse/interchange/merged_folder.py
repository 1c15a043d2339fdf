"""Write the whole model, with its adapters added to the weights, as a folder that transformers loads."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from lit_sparse.adapters.merging import merge
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.errors import UsageError
from lit_sparse.interchange.card import ExportReport
from lit_sparse.interchange.export import ExportOptions, exporting
from lit_sparse.interchange.remains import require_trained

if TYPE_CHECKING:
    from typing_extensions import Unpack

Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    dtype: Dtype | None = None,
    processor: str | os.PathLike[str] | None = None,
    **options: Unpack[ExportOptions],
) -> ExportReport:
    """Merge the adapters into the weights, and write the plain model with its tokenizer or processor.

    Args:
        model: The Hugging Face model with its adapters. It is consumed, even if the export fails: its adapters are
            merged, in float32 or better, and its parameters cast to ``dtype``.
        folder: To write; must not exist, or be empty.
        dtype: Dtype of the written weights; None: that of the frozen weights.
        processor: Name or folder of the tokenizer or processor to write beside the model; None: the one of the
            run, or in the folder that the model was loaded from, if there is one.
        **options: See :class:`~lit_sparse.ExportOptions`.

    Returns:
        Sizes, and the difference of outputs between the live model and the one loaded from the folder.

    Raises:
        UsageError: If the model is no Hugging Face model or holds no adapter, the folder is not empty, or outputs
            differ by more than the tolerance. Nothing is then left behind.
    """
    if dtype is not None and dtype not in get_args(Dtype):
        raise UsageError(f"dtype must be one of {get_args(Dtype)}; got {dtype!r}.")
    require_trained(model)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is no Hugging Face model, and has no save_pretrained. Call merge, which returns "
            "the plain model, and save that yourself."
        )
    frozen = _frozen_dtype(model)
    wanted: torch.dtype = frozen if dtype is None else getattr(torch, dtype)
    with exporting("merged", model, folder, options, dtypes=(wanted,), processor=processor) as draft:
        if not any(quantized_layers(model)):
            _cast(model, torch.promote_types(wanted, frozen))  # so that the sum is rounded once
        merge(model)
        _cast(model, wanted)
        model.save_pretrained(draft.folder)
        draft.record({"dtype": str(wanted).removeprefix("torch.")})
        loaded: nn.Module = type(model).from_pretrained(draft.folder, dtype=wanted)
        draft.compare(loaded.to(model.device))
    return draft.report


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)


def _frozen_dtype(model: nn.Module) -> torch.dtype:
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    frozen = (p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and id(p) not in packed)
    return next((p.dtype for p in frozen), torch.float32)
