"""What a checkpoint of a frozen backbone with adapters holds, and whether it fits a model."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
import yaml
from lightning.fabric.utilities.cloud_io import _load as load_remote
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse._version import __version__
from lit_sparse.adapters.compaction import shrink
from lit_sparse.adapters.frozen import frozen_sample
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.token_rows import same_tokens, token_record, train_rows
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.progress import Progress

Kind = TypeVar("Kind")
Module = TypeVar("Module", bound=nn.Module)

KEY = "lit_sparse"
"""The checkpoint entry that says which backbone and adapters it belongs to."""

_CODE = ("trust_remote_code", "code_revision", "use_kernels", "kernel_config", "allow_all_kernels")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")

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
        "ranks": {name: adapter.max_rank for name, adapter in adapters_in(model)},
        "ranks_left": {name: adapter.rank for name, adapter in adapters_in(model)},
        "backbone_sample": sample,
        "progress": None if progress is None else progress.record([a for _, a in adapters_in(model)]),
        "token_rows": token_record(model),
    }


def load(
    path: str | os.PathLike[str] | IO[bytes], mmap: bool = False, map_location: Any = "cpu", weights_only: bool = True
) -> dict[str, Any]:
    """Read a checkpoint file, of whatever module.

    Args:
        path: A file that ``torch.save`` wrote, here or at a URL, or an open stream of one.
        mmap: Map the tensors, to read only those that are used.
        map_location: Where the tensors go, as in ``torch.load``.
        weights_only: False runs whatever pickle the file holds.

    Raises:
        UsageError: If it cannot be read, holds more than tensors and plain values, or no ``state_dict``.
    """
    if isinstance(path, str | os.PathLike) and Path(path).is_dir():
        raise UsageError(f"{str(path)!r} is a folder: give a checkpoint file in it, such as last.ckpt.")
    try:
        reader: Any = load_remote if "://" in str(path) else functools.partial(torch.load, mmap=mmap)
        checkpoint: Any = reader(path, map_location=map_location, weights_only=weights_only)
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


def rebuild(
    kind: type[Module], checkpoint: Mapping[str, Any], given: Mapping[str, Any], trust_remote_code: bool
) -> Module:
    """Build a module by the arguments that a checkpoint has for it. Nothing that the file names is imported or run.

    Args:
        kind: The module's class, unless the checkpoint names a sub-class of it. Arguments of the checkpoint that it
            does not take are left out.
        checkpoint: As loaded, with ``hyper_parameters``.
        given: Arguments of the caller's, which replace those of the checkpoint.
        trust_remote_code: Whether the checkpoint may ask for code that comes with the backbone.

    Raises:
        UsageError: If the checkpoint names a class that is not known here, or wants to run code.
    """
    saved: Mapping[str, Any] = checkpoint.get("hyper_parameters") or {}
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise UsageError("The checkpoint has hyper_parameters that are no arguments by name.")
    if "_class_path" in saved:
        kind = known_class(saved["_class_path"], kind)
    parameters = inspect.signature(kind).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = {
        name: value
        for name, value in saved.items()
        if name not in given and not name.startswith("_") and (takes_any or name in parameters)
    }
    if isinstance(found.get("method"), Mapping):
        found["method"] = saved_method(found["method"])
    if isinstance(found.get("optimizer"), Mapping):
        optimizer, options = _named(found["optimizer"], Optimizer)
        found["optimizer"] = functools.partial(optimizer, **options)
    classes = [name for name, value in found.items() if _names_class(value)]
    if classes:
        raise UsageError(
            f"The checkpoint names classes for {classes}, which are not made from a file: pass these arguments."
        )
    backbone = {**found, **given}.get("backbone")
    code = _code_in(found.get("backbone_args") or {})
    if code and not trust_remote_code:
        raise UsageError(
            f"The checkpoint wants to run code that comes with the backbone {backbone!r} ({code}). If you "
            "trust it, set trust_remote_code to true."
        )
    return kind(**found, **given)


def read_hyperparameters(file: str | os.PathLike[str]) -> Any:
    """What Lightning's loggers write to ``hparams.yaml``.

    Raises:
        UsageError: If it is no YAML, or one with objects in it.
    """
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{str(file)!r} cannot be read as hyperparameters: {' '.join(str(error).split())}.") from error


def require_resumable(checkpoint: Mapping[str, Any], path: str | os.PathLike[str] | None = None) -> None:
    """Raise a UsageError if training cannot go on from a checkpoint: it was saved without the optimizer's state."""
    if "optimizer_states" not in checkpoint:
        raise UsageError(
            f"{'The checkpoint' if path is None else repr(str(path))} holds weights only (save_weights_only): training "
            "cannot go on from it. To start a new run from them, export them for PEFT and give start_from that folder."
        )


def saved_method(saved: Mapping[str, Any]) -> SparseMethod:
    """The method that a checkpoint names by class path and arguments.

    Raises:
        UsageError: As :func:`known_class`, or if the arguments are not its own.
    """
    kind, arguments = _named(saved, SparseMethod)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UsageError(f"The checkpoint has arguments that {kind.__name__} cannot take: {error}.") from error


def known_class(path: str, parent: type[Kind]) -> type[Kind]:
    """The sub-class of ``parent`` that a checkpoint names, of those known here.

    A file must not choose what is imported: only modules of this library are, others must be already.

    Raises:
        UsageError: If no class of this name is known, or several are.
    """
    module, _, name = str(path).rpartition(".")
    exact: Any = None
    if module.partition(".")[0] == "lit_sparse":
        with suppress(ImportError):
            exact = getattr(importlib.import_module(module), name, None)
    else:
        exact = vars(sys.modules.get(module, object)).get(name)
    if isinstance(exact, type) and issubclass(exact, parent):
        return exact
    # By the name alone: a class defined in a script has another module when the script is imported.
    named = [kind for kind in _subclasses(parent) if kind.__qualname__ == name]
    found = [kind for kind in named if "__main__" in {module, kind.__module__}]
    if len(found) != 1:
        raise UsageError(
            f"The checkpoint was trained with {path}, and {len(found)} classes of this name are known. Import the one "
            "that is meant first."
        )
    return found[0]


def _named(saved: Mapping[str, Any], parent: type[Kind]) -> tuple[type[Kind], dict[str, Any]]:
    """The known class and the arguments that ``{class_path: …, init_args: …}`` names."""
    try:
        arguments = {**(saved.get("init_args") or {}), **(saved.get("dict_kwargs") or {})}
        return known_class(saved["class_path"], parent), arguments
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"The checkpoint names no {parent.__name__} by class_path and init_args: {saved}.") from error


def _names_class(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "class_path" in value or any(map(_names_class, value.values()))
    return isinstance(value, list | tuple) and any(map(_names_class, value))


def _code_in(backbone_args: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of ``from_pretrained`` by which code that is not installed would run."""
    return {
        name: value
        for name, value in backbone_args.items()
        if (name in _CODE and value)
        or (name == "weights_only" and not value)  # pickles
        or (name in _IMPLEMENTATIONS and "/" in str(value))  # kernels of the hub
    }


def require_fit(
    model: nn.Module,
    backbone: str,
    method: dict[str, Any],
    checkpoint: dict[str, Any],
    new_tokens: bool = True,
) -> None:
    """Check that a checkpoint belongs to these adapters and to this backbone.

    If it was compacted, the adapters are cut to the ranks that it has left. If it trained rows of tokens and the model
    does not yet, the model does after this.

    Args:
        model: The model that is to be restored, with its adapters.
        backbone: Name of its backbone, for the message.
        method: Class path and arguments of its method.
        checkpoint: The checkpoint as loaded.
        new_tokens: False: refuse a checkpoint of new tokens if the model has no rows of tokens.

    Raises:
        UsageError: If it was not written by this library, or its adapters, tokens or frozen weights are others.
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
        cause = f"It was trained with {saved['method']['init_args']}; use the same arguments."
        if saved["method"]["init_args"].items() <= method["init_args"].items():
            cause = (
                f"The arguments are the same, so the backbone must be another: it was trained on {saved['backbone']!r}"
                f", this is {backbone!r}. Give the backbone that it was trained on."
            )
        raise UsageError(
            f"The checkpoint's adapters are others than the model's: {_difference(saved['ranks'], ranks)}. {cause}"
        )
    _require_token_rows(model, saved.get("token_rows", {}), new_tokens)
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


def _require_token_rows(model: nn.Module, saved: Mapping[str, Mapping[str, Any]], new_tokens: bool) -> None:
    own = token_record(model)
    same = own.keys() == saved.keys() and all(
        same_tokens(entry["ids"], entry["texts"], saved[name]["ids"], saved[name]["texts"])
        for name, entry in own.items()
    )
    if own and not same:
        raise UsageError(
            f"The checkpoint trains rows of the tokens {_tokens(saved)}, the model those of {_tokens(own)}. Set "
            "new_tokens to what the run had."
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
