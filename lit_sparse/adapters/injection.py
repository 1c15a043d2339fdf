"""Put adapters into a backbone, find them by type, and switch them off."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, overload

from lightning.fabric.utilities import rank_zero_warn
from torch import nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter, ReplacesLayer
from lit_sparse.adapters.experts import AdaptedExperts, LowRankExperts
from lit_sparse.adapters.head import keep_precision, pretrained_bodies, task_head
from lit_sparse.adapters.naming import clean_name
from lit_sparse.adapters.originals import keep_originals, originals
from lit_sparse.adapters.placement import require_whole
from lit_sparse.adapters.quantized import require_trainable_around
from lit_sparse.adapters.replacing import replace_modules
from lit_sparse.adapters.selection import select_layers
from lit_sparse.adapters.token_rows import TokenRows
from lit_sparse.errors import UsageError

if TYPE_CHECKING:
    from lit_sparse.methods.base import SparseMethod
    from lit_sparse.methods.method import Method


@overload
def inject(model: nn.Module, method: SparseMethod) -> dict[str, LowRankAdapter]: ...
@overload
def inject(model: nn.Module, method: Method) -> dict[str, Any]: ...
def inject(model: nn.Module, method: Method) -> dict[str, Any]:
    """Wrap the layers that ``method`` targets in adapters, in place.

    All parameters are frozen, except those of the adapters and of the task head (``method.train_head``). A layer with
    several names gets one adapter under all of these names.

    Args:
        model: Hugging Face model, or a module that holds one.
        method: Chooses the layers and wraps each of them.

    Returns:
        Full layer name to adapter, in the model's order.

    Raises:
        UsageError: If the model already holds adapters, ours or PEFT's, is offloaded or spread over several devices, a
            target matches no layer or one that cannot be adapted, a module in ``train_head`` does not exist or is
            quantized, or no gradient passes through a quantized layer.
    """
    present = [name for name, _ in adapters_in(model)]
    if present:
        raise UsageError(
            f"{type(model).__name__} already holds {len(present)} adapters, the first at {present[0]!r}. "
            "Inject once, into a freshly loaded model."
        )
    require_whole(model)
    head = _trained_head(model, method.train_head)
    if method.target_modules == "all-linear" and method.train_head is True and not any(pretrained_bodies(model)):
        rank_zero_warn(
            f"{type(model).__name__} holds no Hugging Face model, so its task head cannot be told from the rest: "
            "all-linear adapts every linear layer, the last one too. Name the head in train_head to train it whole."
        )
    chosen = select_layers(model, method.target_modules, method.layers, method.exclude_modules, head)
    settings = method.settings(chosen)
    model.requires_grad_(False)
    require_trainable_around(model, head)
    adapters = {name: method.adapt(layer, settings[name]) for name, layer in chosen.items()}
    replace_modules(model, _replacements(adapters))
    for name in head:
        _train(model, name)
    for adapter in adapters.values():
        adapter.train(adapter.layer.training)
    return adapters


def take_out(model: nn.Module) -> None:
    """Replace every adapter by its frozen layer. Fully trained modules keep their values.

    Parameters stay frozen as injection left them.
    """
    kinds = ReplacesLayer | AdaptedExperts | TokenRows
    replace_modules(model, {m: m.base for m in model.modules() if isinstance(m, kinds)})


def adapters_in(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """Iterate over ``(name, adapter)`` of every adapter in ``model``, each once, found by type.

    Names do not depend on wrappers such as FSDP's.
    """
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield clean_name(name), module


def low_rank_in(model: nn.Module, needs: str, instead: str = "") -> dict[str, LowRankAdapter]:
    """The adapters by name, for what needs their A and B.

    Args:
        model: Model with adapters, or without any.
        needs: A clause on what needs A and B, such as ``compact removes ranks``.
        instead: A sentence on what to do without them.

    Raises:
        UsageError: If there is an adapter without A and B.
    """
    found = dict(adapters_in(model))
    factored = {name: adapter for name, adapter in found.items() if isinstance(adapter, LowRankAdapter)}
    if len(factored) < len(found):
        raise UsageError(
            f"{needs}, and the adapters of {type(model).__name__} have no A and B: they change single entries of the "
            f"weights. {instead or 'Take a low-rank method for it.'}"
        )
    return factored


@contextmanager
def disable_adapters(model: nn.Module, head: bool = True) -> Iterator[None]:
    """Within the context, the model computes exactly what the pretrained model did, for example as a reference.

    Every adapted layer returns the frozen layer's output, and fully trained modules, such as the task head, have the
    values from before injection. Adapters that were off before the context are off after it.

    Args:
        model: Model with adapters.
        head: False: only switch the adapters off. True uses a copy of the original values, made at injection, which
            moves to the model's device at the first use. After a resume, the original values of a randomly
            initialized head are the same only if both runs had the same seed.

    Raises:
        UsageError: If there is no adapter in ``model``. With ``head``, also if the original values are not known,
            because a parameter was unfrozen after injection or PiSSA changed the frozen weights.
    """
    # One walk: a loss with a reference comes here at every step.
    adapters = [module for module in model.modules() if isinstance(module, Adapter | TokenRows)]
    if not any(isinstance(adapter, Adapter) for adapter in adapters):
        raise UsageError(f"{type(model).__name__} holds no adapter to disable. Inject a method first.")
    before = [adapter.enabled for adapter in adapters]
    with originals(model) if head else nullcontext():
        for adapter in adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter, enabled in zip(adapters, before, strict=True):
                adapter.enabled = enabled


def _replacements(adapters: Mapping[str, Adapter]) -> dict[nn.Module, nn.Module]:
    """Frozen module to the module that replaces it."""
    replacements: dict[nn.Module, nn.Module] = {}
    experts: dict[nn.Module, dict[str, LowRankExperts]] = {}
    for name, adapter in adapters.items():
        if isinstance(adapter, LowRankExperts):
            experts.setdefault(adapter.layer, {})[name.rpartition(".")[2]] = adapter
        else:
            replacements[adapter.layer] = adapter
    for module, own in experts.items():
        replacements[module] = AdaptedExperts(module, own).train(module.training)
    return replacements


def _trained_head(model: nn.Module, train_head: bool | list[str]) -> list[str]:
    if isinstance(train_head, bool):
        return task_head(model) if train_head else []
    names = dict(model.named_modules())
    del names[""]
    unknown = [name for name in train_head if name not in names]
    if unknown:
        children = [name for name, _ in model.named_children()]
        raise UsageError(
            f"train_head {unknown} are no modules of {type(model).__name__}, whose parts are {children}. Give full "
            "names, or true to find the head by structure."
        )
    return list(train_head)


def _train(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    part = getattr(owner, leaf)
    part.requires_grad_(True)
    if isinstance(part, nn.Module):
        keep_originals(part)
    else:
        keep_originals(owner, {leaf})
    keep_precision(part, owner)
