"""What an export takes from a trained model: folded adapters without dead ranks, and parameters trained whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter, ReplacesLayer
from lit_sparse.adapters.experts import AdaptedExperts, LowRankExperts
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import adapters_in, take_out
from lit_sparse.adapters.statistics import live_ranks
from lit_sparse.adapters.token_rows import TokenRows, token_rows_in
from lit_sparse.errors import UsageError
from lit_sparse.interchange.vocabulary import forget_rows, rows_of


@torch.no_grad()
def folded(name: str, adapter: LowRankAdapter) -> LayerFactors:
    """Fold gate and scale into B, and drop the ranks that contribute nothing.

    A stays bit for bit what was trained. B is rounded once: the product is formed in float64.

    Args:
        name: Full name of the layer.
        adapter: Left as it is.

    Returns:
        Factors with scale 1 and without gates, on the CPU, in the adapter's precision (float32 or better).
    """
    return without_dead_ranks(LayerFactors.of(name, adapter))


@torch.no_grad()
def without_dead_ranks(layer: LayerFactors) -> LayerFactors:
    """What :func:`folded` gives, of stored factors."""
    live = live_ranks(layer)
    counts = [int(part.sum()) for part in live.split(layer.ranks)]
    return LayerFactors(
        name=layer.name,
        lora_A=layer.lora_A[live].cpu(),
        lora_B_t=layer.scaled_lora_B_t().to(layer.lora_B_t.dtype)[live].cpu(),
        ranks=tuple(counts),
        max_rank=layer.max_rank,
    )


def padded(layers: Mapping[str, LayerFactors]) -> dict[str, LayerFactors]:
    """All layers with the same rank, the largest of any of them and at least 1, padded with zeros."""
    rank = max(1, *(max(layer.ranks) for layer in layers.values()))
    return {name: with_rank(layer, rank) for name, layer in layers.items()}


def with_rank(layer: LayerFactors, rank: int) -> LayerFactors:
    """The same layer with ``rank`` ranks in each of its matrices, padded with zeros."""
    lora_A, lora_B_t = (
        torch.cat([F.pad(part, (0, 0, 0, rank - len(part))) for part in matrix.split(layer.ranks)])
        for matrix in (layer.lora_A, layer.lora_B_t)
    )
    return replace(layer, lora_A=lora_A, lora_B_t=lora_B_t, ranks=(rank,) * len(layer.ranks))


def without_empty(layers: Mapping[str, LayerFactors]) -> dict[str, LayerFactors]:
    """The layers that have a rank; if none has, the first with a rank of zeros, since no format takes an empty LoRA."""
    return {name: layer for name, layer in layers.items() if any(layer.ranks)} or padded(dict([*layers.items()][:1]))


def require_trained(model: nn.Module, original: str | None = None) -> dict[str, Adapter]:
    """The adapters of a model that can be exported.

    Args:
        model: After training.
        original: Refuse adapters that changed their frozen weights; names the export in the error ("a LoRA"). None:
            the export holds the weights, so changed ones are fine.

    Returns:
        Full name to adapter.

    Raises:
        UsageError: If it is a LightningModule, it holds no adapter or a disabled one, all of it is frozen, or their
            start changed weights that must be the original ones.
    """
    kind = type(model).__name__
    if isinstance(model, LightningModule):
        raise UsageError(
            f"{kind} is a LightningModule, whose names other programs do not know: give the Hugging Face model in it, "
            "usually module.model."
        )
    adapters = dict(adapters_in(model))
    if not adapters:
        raise UsageError(f"{kind} holds no adapter to export. Inject a method, or load the checkpoint of a run.")
    off = [name for name, adapter in adapters.items() if not adapter.enabled]
    if off:
        raise UsageError(f"{len(off)} adapters are switched off, the first at {off[0]!r}: switch them on to export.")
    if not any(p.requires_grad for p in model.parameters()):
        raise UsageError(
            f"All of {kind} is frozen, so the trained head cannot be told from the rest. Export before freeze() or "
            "requires_grad_(False)."
        )
    changed = [name for name, adapter in adapters.items() if adapter.took_from_weight]
    if changed and original is not None:
        raise UsageError(
            f"{len(changed)} adapters started as a part of the frozen weights (init_weights 'pissa' or 'lora_ga'), the "
            f"first at {changed[0]!r}. That changed the weights, and {original} would only fit the changed ones. "
            "Export the whole model as merged."
        )
    return adapters


def weight_name(name: str, adapter: Adapter) -> str:
    """Full name, in the plain model, of the weight that the adapter of this name adapts."""
    return name if isinstance(adapter, LowRankExperts) else f"{name}.weight"


def trained_whole(model: nn.Module) -> dict[str, Tensor]:
    """Parameters trained beside the adapters, usually the task head, under their names in the plain model.

    Buffers of modules that are trained entirely are included, such as the running means of a norm.
    """
    held = [*adapters_in(model), *token_rows_in(model)]
    own = {id(p) for _, module in held for p in module.parameters(recurse=False)}
    found = {
        plain_name(model, n): p.detach() for n, p in model.named_parameters() if p.requires_grad and id(p) not in own
    }
    for name in whole_modules(model):
        module = model.get_submodule(name)
        kept = module.state_dict()
        found |= {f"{name}.{n}": b.detach() for n, b in module.named_buffers() if n in kept}
    return found


def whole_modules(model: nn.Module) -> list[str]:
    """Names of the largest modules without adapters whose parameters are all trained."""
    return list(_whole(model, ""))


def plain_name(model: nn.Module, name: str) -> str:
    """A parameter's name in the plain model, from its name in the model with adapters."""
    parts: list[str] = []
    owner: nn.Module | None = model
    for part in name.split("."):
        if not (part == "base" and isinstance(owner, ReplacesLayer | AdaptedExperts | TokenRows)):
            parts.append(part)
        owner = owner._modules.get(part) if owner is not None else None
    return ".".join(parts)


@torch.no_grad()
def plain_copy(model: nn.Module, forget_head: bool = True) -> nn.Module:
    """A copy of the model as it was before injection, to read an export back into.

    Args:
        model: Left as it is.
        forget_head: Set modules that were trained whole to zero, so that the comparison notices if the export lacks
            them. Rows of new tokens are always removed.
    """
    copied = copy.deepcopy(model)
    trained = trained_whole(copied)
    take_out(copied)
    forget_rows(copied, rows_of(model))
    for tensor in trained.values() if forget_head else ():
        tensor.zero_()  # shares its memory with the parameter
    return copied


def _whole(module: nn.Module, prefix: str) -> Iterator[str]:
    parameters = list(module.parameters())
    adapted = any(isinstance(m, Adapter) for m in module.modules())
    if prefix and parameters and not adapted and all(p.requires_grad for p in parameters):
        yield prefix
        return
    for name, child in module.named_children():
        yield from _whole(child, f"{prefix}.{name}".lstrip("."))
