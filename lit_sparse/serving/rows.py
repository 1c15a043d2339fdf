"""Send each row of a batch through an adapter of its own."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.experts import AdaptedExperts
from lit_sparse.adapters.linear import FrozenLinear, LowRankLinear
from lit_sparse.adapters.rowwise import CannotShareError, Routes, RowwiseChoice, RowwiseLinear
from lit_sparse.errors import UsageError
from lit_sparse.interchange.loading import fill
from lit_sparse.interchange.remains import folded
from lit_sparse.serving.places import Place

_INPUTS = ("input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "pixel_values", "input_values")
_SEQUENCE_FIRST = ("fsmt", "led", "longformer", "xlnet")
"""Types of models whose layers get (positions, rows, features): an error if they differ in number, wrong if not."""
Versions = dict[nn.Module, dict[str, nn.Module]]
"""Layer of the plain model → name of an adapter → what takes the layer's place with it."""


def row_places(model: nn.Module, places: Mapping[str, Sequence[Place]], routes: Routes) -> list[Place]:
    """What to change in the plain model, so that each row goes through an adapter.

    Args:
        model: Without an adapter in use.
        places: Name of an adapter to what it changes. Number 0 of the routes is the plain model, number 1 the first.
        routes: The adapter of each row.

    Raises:
        UsageError: If heads have other shapes, experts are adapted, a parameter outside of layers is trained, or the
            model is of a type whose layers see positions in place of rows.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind in _SEQUENCE_FIRST:
        raise UsageError(
            f"{type(model).__name__} turns its batches, so that layers see positions where other models have rows, and "
            "the rows cannot be told apart. Run the rows of each adapter alone, with using."
        )
    versions = _versions(model, places)
    made: list[Place] = []
    for parent in list(model.modules()):
        for key, layer in parent._modules.items():
            if layer in versions:
                known = next((place.own for place in made if place.plain is layer), None)  # under another name
                own = known or _rowwise(layer, [versions[layer].get(name, layer) for name in places], routes)
                made.append(Place(parent._modules, key, layer, own))
    return made


@contextmanager
def routed(model: nn.Module, copies: Tensor, routes: Routes) -> Iterator[None]:
    """Within the context, calls of the model and its ``generate`` route the rows of their batch.

    Args:
        model: With the layers of :func:`row_places`.
        copies: Number of the adapter of each row.
        routes: Of these layers. Generation repeats rows, for beams or for several answers, and so does this.

    Raises:
        UsageError: If a batch has another number of rows, or a layer does not see the rows of the batch.
    """
    routes.copies, generating = copies, False

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = _rows(args, kwargs)
        repeats = rows // len(copies) if generating else 1
        if rows != repeats * len(copies):
            raise UsageError(f"The batch has {rows} rows, and rows(…) names adapters for {len(copies)}: name one each.")
        if len(routes.copies) != rows:
            routes.copies = copies.repeat_interleave(repeats)

    def generate(*args: Any, **kwargs: Any) -> Any:
        nonlocal generating
        before(model, args, kwargs)
        generating = True
        try:
            return plain(*args, **kwargs)
        finally:
            generating, routes.copies = False, copies

    plain: Any = getattr(model, "generate", None)
    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    if plain is not None:
        vars(model)["generate"] = generate
    try:
        yield
    except CannotShareError as error:
        raise UsageError(
            f"The rows of a batch cannot be told apart: {error}. Run the rows of each adapter alone, with using."
        ) from error
    finally:
        hook.remove()
        vars(model).pop("generate", None)


def _rows(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """Rows of the batch that a model is called with."""
    given = [*(kwargs.get(name) for name in _INPUTS), *args, *kwargs.values()]
    return next((len(value) for value in given if isinstance(value, Tensor) and value.dim()), 0)


def _versions(model: nn.Module, places: Mapping[str, Sequence[Place]]) -> Versions:
    """Every layer that an adapter replaces, or of which it has other weights."""
    owners: dict[int, nn.Module] = {}
    for module in model.modules():
        owners |= {id(own): module for own in (module._parameters, module._buffers, vars(module))}
    found: Versions = {}
    for name, changed in places.items():
        for place in changed:
            if isinstance(place.plain, nn.Module):
                if isinstance(place.own, AdaptedExperts):
                    raise UsageError(f"{name!r} adapts experts, which do not see the rows of a batch: use using.")
                found.setdefault(place.plain, {})[name] = place.own
                continue
            layer = owners[id(place.owner)]
            if place.key == "out_features":
                raise UsageError(
                    f"The head of {name!r} has another number of outputs than the backbone's, so rows cannot be mixed: "
                    "use using."
                )
            if any(True for _ in layer.children()):
                raise UsageError(
                    f"{name!r} has an own {place.key!r} of {type(layer).__name__}, which is no layer, so rows cannot "
                    "be mixed: use using."
                )
            of_layer = found.setdefault(layer, {})
            if name not in of_layer:
                of_layer[name] = _with_own_tensors(layer)
            (of_layer[name]._buffers if place.key in layer._buffers else of_layer[name]._parameters)[place.key] = (
                place.own
            )
    return found


def _with_own_tensors(layer: nn.Module) -> nn.Module:
    """A copy that shares everything, and can be given other parameters and buffers."""
    made = copy.copy(layer)
    vars(made).pop("_apply", None)  # of a trained head, which would move the tensors of the original
    made._parameters, made._buffers = dict(layer._parameters), dict(layer._buffers)
    return made


def _rowwise(layer: nn.Module, versions: Sequence[nn.Module], routes: Routes) -> nn.Module:
    """One layer in place of those of all adapters."""
    every = [layer, *versions]
    adapters = [version for version in every if version is not layer]
    if not isinstance(layer, FrozenLinear) or not all(type(adapter) is LowRankLinear for adapter in adapters):
        return RowwiseChoice(every, routes)
    stored = {version: folded("a layer", version) for version in adapters if isinstance(version, LowRankLinear)}
    rank = max(1, *(sum(factors.ranks) for factors in stored.values()))
    parts = []
    for version in every:
        part = LowRankLinear(layer, rank, 1.0).requires_grad_(False)  # its B is zero
        if isinstance(version, LowRankLinear):
            fill(part, stored[version], "the bank")
        parts.append(part)
    with torch.no_grad():
        return RowwiseLinear(parts, routes).requires_grad_(False)
