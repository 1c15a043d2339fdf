"""What a checkpoint of a frozen backbone with adapters holds, and whether it fits a model."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.utilities.cloud_io import _load as load_remote
from torch import Tensor, nn

from lit_sparse._version import __version__
from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import shrink
from lit_sparse.adapters.frozen import frozen_sample
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.token_rows import same_tokens, token_record, train_rows
from lit_sparse.errors import UsageError
from lit_sparse.foreign_errors import refused_global
from lit_sparse.methods.progress import Progress
from lit_sparse.methods.start import start_record

KEY = "lit_sparse"
"""The checkpoint entry that says which backbone and adapters it belongs to."""
PREFIX = "model."
"""The start of all names in the backbone: modules and their checkpoints hold it as ``model``."""

# Half-precision copies of one backbone differ by rounding, 2⁻⁸ at most for bfloat16; other weights by far more.
_ROUNDING = 2.0**-6


def describe(
    model: nn.Module, backbone: str, method: dict[str, Any], sample: Tensor | None, progress: Progress | None
) -> dict[str, Any]:
    """The entry ``checkpoint[KEY]``: plain values and tensors, so that ``weights_only`` loading works.

    Args:
        model: The model with its adapters.
        backbone: Name of its backbone.
        method: Class path and arguments of its method.
        sample: The :func:`~lit_sparse.adapters.frozen.frozen_sample` of the model, taken when it was whole.
        progress: How far the run is that trains it; None if it is not known.
    """
    return {
        "version": __version__,
        "backbone": backbone,
        "method": method,
        "ranks": {name: adapter.size for name, adapter in adapters_in(model)},
        "ranks_left": {n: adapter.rank for n, adapter in adapters_in(model) if isinstance(adapter, LowRankAdapter)},
        "backbone_sample": sample,
        "progress": None if progress is None else progress.record([a for _, a in adapters_in(model)]),
        "token_rows": token_record(model),
        "starts": start_record(model),
    }


def load(
    path: str | os.PathLike[str] | IO[bytes], mmap: bool = False, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read the checkpoint file of any module.

    Args:
        path: A file that ``torch.save`` wrote, its URL, or an open stream of it.
        mmap: Map the tensors into memory, so that only those that are used are read.
        map_location: Where the tensors go, as in ``torch.load``.
        weights_only: False runs any code that the file's pickle holds.

    Raises:
        UsageError: If it cannot be read, holds more than tensors and plain values, or no ``state_dict``.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        raise UsageError(f"{str(path)!r} is a folder: give a checkpoint file in it, such as last.ckpt.")
    try:
        reader: Any = load_remote if "://" in str(path) else functools.partial(torch.load, mmap=mmap)
        checkpoint: Any = reader(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # a file that is no checkpoint may raise anything
        reason = refused_global(error) or (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UsageError(f"{str(path)!r} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UsageError(f"{str(path)!r} is no checkpoint: it has no state_dict.")
    return checkpoint


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file of a module of this library, on the CPU.

    Raises:
        UsageError: If it cannot be read, or a module of another library wrote it.
    """
    checkpoint = load(path)
    if KEY not in checkpoint:
        raise UsageError(f"{str(path)!r} was not written by a lit_sparse module: it names no method and backbone.")
    return checkpoint


def outside_backbone(checkpoint: Mapping[str, Any]) -> list[str]:
    """Names of what a module trained outside of its backbone."""
    return [name for name in checkpoint["state_dict"] if not name.startswith(PREFIX)]


def require_resumable(checkpoint: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> None:
    """Raise a UsageError if training cannot go on from a checkpoint: it was saved without the optimizer's state."""
    if "optimizer_states" not in checkpoint:
        raise UsageError(
            f"{'The checkpoint' if path is None else repr(str(path))} holds weights only (save_weights_only): training "
            "cannot go on from it. To start a new run from them, export them for PEFT and give start_from that folder."
        )


def require_fit(
    model: nn.Module,
    backbone: str,
    method: dict[str, Any],
    checkpoint: dict[str, Any],
    new_tokens: bool = True,
) -> None:
    """Check that a checkpoint belongs to these adapters and to this backbone.

    The adapters are then cut to the ranks of a compacted checkpoint, and the model gets the rows of tokens that the
    checkpoint trained.

    Args:
        model: The model that is to be restored, with its adapters.
        backbone: Name of its backbone, for the message.
        method: Class path and arguments of its method.
        checkpoint: The checkpoint as loaded.
        new_tokens: False: refuse a checkpoint of new tokens if the model has no rows of tokens.

    Raises:
        UsageError: If this library did not write the checkpoint, or its adapters, tokens or frozen weights differ from
            those of the model.
    """
    if KEY not in checkpoint:
        raise UsageError(
            "The checkpoint was not written by a lit_sparse module: it has no record of backbone and adapters. Give "
            "the checkpoint of a lit_sparse run, or load plain weights as the backbone."
        )
    saved = checkpoint[KEY]
    # Class names alone: a class of a script has another module name when the script is imported.
    trained_with, own = (m["class_path"].rpartition(".")[2] for m in (saved["method"], method))
    if trained_with != own:
        raise UsageError(
            f"The checkpoint was trained with {trained_with}, but the method here is {own}. Use the same method."
        )
    adapters = dict(adapters_in(model))
    ranks = {name: adapter.size for name, adapter in adapters.items()}
    if saved["ranks"] != ranks:
        what = "rank" if all(isinstance(a, LowRankAdapter) for a in adapters.values()) else "the number of entries"
        cause = f"It was trained with {saved['method']['init_args']}; use the same arguments."
        if saved["method"]["init_args"].items() <= method["init_args"].items():
            cause = (
                f"The arguments are the same, so the backbone must be another: it was trained on {saved['backbone']!r}"
                f", this is {backbone!r}. Give the backbone that it was trained on."
            )
        raise UsageError(
            f"The checkpoint's adapters differ from the model's: {_difference(saved['ranks'], ranks, what)}. {cause}"
        )
    _require_token_rows(model, saved.get("token_rows", {}), new_tokens)
    if not start_record(model):  # else the weights of this model are no longer the pretrained ones
        _require_backbone(frozen_sample(model), backbone, saved)
    for name, left in saved.get("ranks_left", {}).items():
        adapter = adapters[name]
        if isinstance(adapter, LowRankAdapter) and left < adapter.rank:
            shrink(adapter, left)


def same_weights(sample: Tensor, other: Tensor) -> bool:
    """Whether two samples of the same frozen weights are equal to rounding, in half precision too."""
    return torch.allclose(sample, other, rtol=_ROUNDING, atol=1e-6)


def _require_backbone(sample: Tensor | None, name: str, saved: Mapping[str, Any]) -> None:
    if sample is None or saved["backbone_sample"] is None:
        return
    if sample.shape != saved["backbone_sample"].shape:
        raise UsageError(
            f"The checkpoint belongs to the backbone {saved['backbone']!r}, which has another structure than {name!r} "
            "or is quantized otherwise. Adapters only work on the weights they were trained on."
        )
    if not same_weights(sample, saved["backbone_sample"]):
        raise UsageError(
            f"The checkpoint belongs to the backbone {saved['backbone']!r}; the frozen weights of {name!r} differ. "
            "Adapters only work on the weights they were trained on."
        )


def _require_token_rows(model: nn.Module, saved: Mapping[str, Mapping[str, Any]], new_tokens: bool) -> None:
    own = token_record(model)
    same = own.keys() == saved.keys() and all(
        same_tokens(entry["ids"], entry["texts"], saved[name]["ids"], saved[name]["texts"])
        for name, entry in own.items()
    )
    if own and not same:
        raise UsageError(
            f"The checkpoint trains rows of the tokens {_tokens(saved)}, the model those of {_tokens(own)}. Set "
            "new_tokens to the tokens of the run."
        )
    if not own and not new_tokens and any(text for entry in saved.values() for text in entry["texts"]):
        raise UsageError(
            f"The checkpoint trains rows of the tokens {_tokens(saved)}, and the module has no new_tokens, so the "
            f"data's tokenizer would not know them: give new_tokens: {_tokens(saved)}."
        )
    for name, entry in saved.items() if not own else ():
        train_rows(model, entry["ids"], entry["texts"], only=name)


def _tokens(record: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    return next((entry["texts"] or entry["ids"] for entry in record.values()), [])


def _difference(saved: dict[str, int], own: dict[str, int], what: str) -> str:
    for name in own:
        if name not in saved:
            return f"it has none at {name!r}"
        if saved[name] != own[name]:
            return f"{name!r} has {what} {saved[name]} there and {own[name]} here"
    extra = next(name for name in saved if name not in own)
    return f"it has one at {extra!r}, the model has not"
