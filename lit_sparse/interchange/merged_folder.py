"""Write the whole model, with its adapters added to the weights, as a folder that transformers loads."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.adapters.merging import merge
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.errors import UsageError
from lit_sparse.interchange.card import Provenance
from lit_sparse.interchange.export import ExportReport, Form, Terms, export
from lit_sparse.interchange.remains import require_trained

Dtype = Literal["float32", "float16", "bfloat16", "float64"]


def export_merged(
    model: nn.Module,
    folder: str | os.PathLike[str],
    dtype: Dtype | None = None,
    processor: str | os.PathLike[str] | None = None,
    tolerance: float | None = None,
    batch: Mapping[str, Tensor] | None = None,
    provenance: Provenance | None = None,
    push_to_hub: str | None = None,
) -> ExportReport:
    """Merge the adapters into the weights, and write the plain model with its tokenizer or processor.

    Args:
        model: The Hugging Face model with its adapters. It is consumed, whether the export is kept or not: its
            adapters are merged, in float32 or better, and its parameters cast to ``dtype``.
        folder: To write; must not exist, or be empty.
        dtype: Of what is written; None: that of the frozen weights.
        processor: Name or folder of the tokenizer or processor to write beside the model; None: the one in the folder
            that the model was loaded from, if there is one.
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the coarser of the
            model's dtype and ``dtype``.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: What the card says of method, metrics and license.
        push_to_hub: Repository on the hub to upload the folder to.

    Returns:
        Sizes, and the difference of outputs between the model before it was merged and what is loaded from the folder.

    Raises:
        UsageError: If the model is no Hugging Face model or holds no adapter, the folder is not empty, or outputs
            differ by more than the tolerance. Nothing is then left behind.
    """
    if dtype not in (None, "float32", "float16", "bfloat16", "float64"):
        raise UsageError(f"dtype must be 'float32', 'float16', 'bfloat16' or 'float64'; got {dtype!r}.")
    require_trained(model)
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is no Hugging Face model, and has no save_pretrained. Use merge, which gives the "
            "plain model back, and save that as you do."
        )
    wanted = _frozen_dtype(model) if dtype is None else getattr(torch, dtype)
    write = functools.partial(_write, model, wanted)
    form = Form("merged", write, functools.partial(_read, model, wanted), (wanted,))
    return export(model, folder, form, Terms(tolerance, batch, provenance, push_to_hub, processor))


def _write(model: PreTrainedModel, dtype: torch.dtype, draft: Path) -> dict[str, Any]:
    if not any(quantized_layers(model)):
        _cast(model, torch.promote_types(dtype, _frozen_dtype(model)))  # so that the sum is rounded once
    merge(model)
    _cast(model, dtype)
    model.save_pretrained(draft)
    return {"dtype": str(dtype).removeprefix("torch.")}


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    model.to(dtype)


def _read(model: PreTrainedModel, dtype: torch.dtype, draft: Path) -> nn.Module:
    return type(model).from_pretrained(draft, dtype=dtype).to(model.device)  # type: ignore[arg-type, no-any-return]


def _frozen_dtype(model: nn.Module) -> torch.dtype:
    packed = {id(layer.weight) for _, layer in quantized_layers(model)}
    frozen = (p for p in model.parameters() if p.is_floating_point() and not p.requires_grad and id(p) not in packed)
    return next((p.dtype for p in frozen), torch.float32)
