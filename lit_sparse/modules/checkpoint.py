"""What a checkpoint of a frozen backbone with adapters holds, and whether it fits a model."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_sparse._version import __version__
from lit_sparse.adapters.compaction import shrink
from lit_sparse.adapters.frozen import frozen_sample
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod

Kind = TypeVar("Kind")

KEY = "lit_sparse"
"""The checkpoint entry that says which backbone and adapters it belongs to."""

# Half-precision copies of one backbone differ by rounding, 2⁻⁸ at most for bfloat16; other weights by far more.
_ROUNDING = 2.0**-6


def describe(model: nn.Module, backbone: str, method: dict[str, Any], sample: Tensor | None) -> dict[str, Any]:
    """The entry ``checkpoint[KEY]``: plain values and tensors, so that ``weights_only`` loading works.

    Args:
        model: The model with its adapters.
        backbone: Name of its backbone.
        method: Class path and arguments of its method.
        sample: The :func:`~lit_sparse.adapters.frozen.frozen_sample` of the model, taken when it was whole.
    """
    return {
        "version": __version__,
        "backbone": backbone,
        "method": method,
        "ranks": {name: adapter.max_rank for name, adapter in adapters_in(model)},
        "ranks_left": {name: adapter.rank for name, adapter in adapters_in(model)},
        "backbone_sample": sample,
    }


def load(path: str | os.PathLike[str], mmap: bool = False) -> dict[str, Any]:
    """Read a checkpoint file, of whatever module, on the CPU.

    Args:
        path: A file that ``torch.save`` wrote.
        mmap: Map the tensors, to read only those that are used.

    Raises:
        UsageError: If it cannot be read, holds more than tensors and plain values, or no ``state_dict``.
    """
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # whatever a file that is no checkpoint makes of it
        reason = next((line for line in str(error).splitlines() if "GLOBAL" in line), "")
        reason = reason.strip() or (str(error).splitlines() or [""])[0] or type(error).__name__
        raise UsageError(f"{str(path)!r} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UsageError(f"{str(path)!r} is no checkpoint: it has no state_dict.")
    return checkpoint


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint file of a module of this library, on the CPU.

    Raises:
        UsageError: If it cannot be read, or was written by another.
    """
    checkpoint = load(path)
    if KEY not in checkpoint:
        raise UsageError(f"{str(path)!r} was not written by a lit_sparse module: it names no method and backbone.")
    return checkpoint


def saved_method(saved: Mapping[str, Any]) -> SparseMethod:
    """The method that a checkpoint names by class path and arguments; errors as those of :func:`known_class`."""
    return known_class(saved["class_path"], SparseMethod)(**saved["init_args"])


def known_class(path: str, parent: type[Kind]) -> type[Kind]:
    """The sub-class of ``parent`` that a checkpoint names, of those known here.

    A file must not choose what is imported: only modules of this library are, others must be already.

    Raises:
        UsageError: If no class of this name is known, or several are.
    """
    module, _, name = path.rpartition(".")
    if module.startswith("lit_sparse."):
        importlib.import_module(module)
    # By the name alone: a class defined in a script has another module when the script is imported.
    found = [kind for kind in {parent, *_subclasses(parent)} if kind.__qualname__ == name]
    exact = [kind for kind in found if kind.__module__ == module]
    if len(exact or found) != 1:
        raise UsageError(
            f"The checkpoint was trained with {path}, and {len(found)} classes of this name are known. Import the one "
            "that is meant first."
        )
    return (exact or found)[0]


def require_fit(model: nn.Module, backbone: str, method: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Check that a checkpoint belongs to these adapters and to this backbone.

    If it was compacted, the adapters are cut to the ranks that it has left.

    Args:
        model: The model that is to be restored, with its adapters.
        backbone: Name of its backbone, for the message.
        method: Class path and arguments of its method.
        checkpoint: The checkpoint as loaded.

    Raises:
        UsageError: If it was not written by this library, or its adapters or frozen weights are others.
    """
    if KEY not in checkpoint:
        raise UsageError(
            "The checkpoint was not written by a lit_sparse module: it has no record of backbone and adapters. Give "
            "the checkpoint of a lit_sparse run, or load plain weights as the backbone."
        )
    saved = checkpoint[KEY]
    # By the class alone: one defined in a script has another module name when the script is imported.
    trained_with, own = (m["class_path"].rpartition(".")[2] for m in (saved["method"], method))
    if trained_with != own:
        raise UsageError(
            f"The checkpoint was trained with {trained_with}, but the method here is {own}. Use the same method."
        )
    adapters = dict(adapters_in(model))
    ranks = {name: adapter.max_rank for name, adapter in adapters.items()}
    if saved["ranks"] != ranks:
        raise UsageError(
            f"The checkpoint's adapters are others than the model's: {_difference(saved['ranks'], ranks)}. It was "
            f"trained with {saved['method']['init_args']}; use the same arguments."
        )
    sample = frozen_sample(model)
    if sample is not None and saved["backbone_sample"] is not None:
        if sample.shape != saved["backbone_sample"].shape:
            raise UsageError(
                f"The checkpoint belongs to the backbone {saved['backbone']!r}, which has another structure than "
                f"{backbone!r} or is quantized otherwise. Adapters only work on the weights they were trained on."
            )
        if not torch.allclose(sample, saved["backbone_sample"], rtol=_ROUNDING, atol=1e-6):
            raise UsageError(
                f"The checkpoint belongs to the backbone {saved['backbone']!r}; the frozen weights of {backbone!r} are "
                "others. Adapters only work on the weights they were trained on."
            )
    for name, left in saved.get("ranks_left", {}).items():
        if left < adapters[name].rank:
            shrink(adapters[name], left)


def _subclasses(kind: type[Kind]) -> Iterator[type[Kind]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


def _difference(saved: dict[str, int], own: dict[str, int]) -> str:
    for name in own:
        if name not in saved:
            return f"it has none at {name!r}"
        if saved[name] != own[name]:
            return f"{name!r} has rank {saved[name]} there and {own[name]} here"
    extra = next(name for name in saved if name not in own)
    return f"it has one at {extra!r}, the model has not"
