"""The arguments of a module: kept in its checkpoints as plain values, by which it is built again."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml
from lightning.pytorch import LightningModule
from torch import nn
from torch.optim import Optimizer

from lit_sparse.errors import UsageError, reason_of
from lit_sparse.methods.method import Method

Kind = TypeVar("Kind")
Module = TypeVar("Module", bound=nn.Module)

_CODE = ("trust_remote_code", "code_revision", "use_kernels", "kernel_config", "allow_all_kernels")
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def keep_arguments(module: LightningModule, method: Method, optimizer: Any, backbone: str | None) -> None:
    """Keep the arguments of a SparseModule as plain values, so that its checkpoints load with ``weights_only``.

    Args:
        module: The module, whose constructor calls this.
        method: Its method.
        optimizer: What makes its optimizer; kept if it is a class with arguments.
        backbone: Name of its backbone; None: a built model, which is not kept.
    """
    module.save_hyperparameters(ignore=["backbone", "method", "optimizer"])
    if "_instantiator" in module.hparams:
        module.save_hyperparameters()  # the command line hands over its configuration, which is plain
        return
    plain: dict[str, Any] = {"method": method_record(method)}
    if backbone is not None:
        plain["backbone"] = backbone
    if isinstance(optimizer, functools.partial) and isinstance(optimizer.func, type):
        plain["optimizer"] = {"class_path": path_of(optimizer.func), "init_args": optimizer.keywords}
    module.save_hyperparameters({**module.hparams, **plain})


def rebuild(
    kind: type[Module], checkpoint: Mapping[str, Any], given: Mapping[str, Any], trust_remote_code: bool
) -> Module:
    """Build a module by the arguments in a checkpoint. Nothing that the file names is imported or run.

    Args:
        kind: Class of the module, unless the checkpoint names a sub-class of it. Arguments of the checkpoint that the
            class does not take are left out.
        checkpoint: The checkpoint as loaded, with ``hyper_parameters``.
        given: Arguments that replace those of the checkpoint.
        trust_remote_code: Whether the checkpoint may ask for code that comes with the backbone.

    Raises:
        UsageError: If the checkpoint names a class that is not known here, or wants to run code.
    """
    saved: Mapping[str, Any] = checkpoint.get("hyper_parameters") or {}
    if not isinstance(saved, Mapping) or not all(isinstance(name, str) for name in saved):
        raise UsageError("The checkpoint has hyper_parameters that are no arguments by name.")
    if "_class_path" in saved:
        kind = known_class(saved["_class_path"], kind)
    found = {
        name: value
        for name, value in saved.items()
        if name not in given and not name.startswith("_") and _takes(kind, name)
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
    """Read the ``hparams.yaml`` that Lightning's loggers write.

    Raises:
        UsageError: If it is no YAML, or contains objects.
    """
    try:
        return yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{str(file)!r} cannot be read as hyperparameters: {reason_of(error)}.") from error


def method_record(method: Method) -> dict[str, Any]:
    """Class path and arguments of a method, as a checkpoint names it."""
    return {"class_path": path_of(type(method)), "init_args": method.init_args()}


def path_of(kind: type) -> str:
    """Module and name of a class, as :func:`known_class` finds it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def saved_method(saved: Mapping[str, Any]) -> Method:
    """The method that a checkpoint names by class path and arguments.

    Raises:
        UsageError: If its class is not known or does not take the arguments.
    """
    kind, arguments = _named(saved, Method)
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UsageError(f"The checkpoint has arguments that {kind.__name__} cannot take: {error}.") from error


def known_class(path: str, parent: type[Kind]) -> type[Kind]:
    """The sub-class of ``parent`` that a checkpoint names.

    A file must not choose what is imported: modules of this library are imported, others must be imported already.

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


def _takes(kind: type, argument: str) -> bool:
    """Whether a constructor takes an argument; those of this library pass further arguments to their base class."""
    for parent in kind.__mro__:
        if "__init__" in vars(parent):
            parameters = inspect.signature(parent).parameters
            if argument in parameters:
                return True
            if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
                return False
            if not parent.__module__.startswith("lit_sparse."):
                return True
    return False


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
    """The arguments of ``from_pretrained`` that would run code which is not installed."""
    return {
        name: value
        for name, value in backbone_args.items()
        if (name in _CODE and value)
        or (name == "weights_only" and not value)  # pickles
        or (name in _IMPLEMENTATIONS and "/" in str(value))  # kernels of the hub
    }


def _subclasses(kind: type[Kind]) -> Iterator[type[Kind]]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)
