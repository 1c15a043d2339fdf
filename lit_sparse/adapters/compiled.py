"""Compile a model block by block, and only once more when ranks are removed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import torch
from torch import nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.blocks import blocks_of
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import require_choice

_GRAPHS = 64
"""Graphs that blocks of one class may have; torch allows 8 and computes everything else without a graph. Gradients or
none at the first block's input, training and evaluation, two kinds of attention, lengths and ranks fixed or variable:
their product is more than 8."""

LEAST_RANKS = 2
"""Ranks that stay in a compiled adapter: torch compiles a size of 0 or 1 as a constant, in another graph."""


class CompileOptions(TypedDict, total=False):
    """Arguments of :func:`torch.compile`."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
    dynamic: bool | None
    fullgraph: bool
    backend: str
    options: dict[str, str | int | bool]


def compile_options(given: bool | CompileOptions) -> CompileOptions | None:
    """What ``compile`` asks for: true has no arguments, false is None.

    Raises:
        UsageError: If an argument is not known.
    """
    if isinstance(given, bool):
        return {} if given else None
    for name in given:
        require_choice("An argument in compile", name, list(CompileOptions.__annotations__))
    return given


def compile_blocks(model: nn.Module, device_type: str | None = None, **options: Any) -> None:
    """Compile every block of a model in place, by :meth:`torch.nn.Module.compile`.

    The blocks are the members of the outermost module lists, such as the layers of a transformer. Equal ones share
    their graphs, which are made in a fraction of the time that a graph of the whole model takes. A model without such a
    list is compiled as a whole.

    :func:`~lit_sparse.compact` leaves at least two ranks in every adapter of a compiled model. After the first time it
    removes any, the graphs are compiled once more with the numbers of ranks as variables, and serve for all numbers
    from then on. (torch compiles a size of 0 or 1 as a constant, which would be another graph.)

    On a CPU, random numbers are drawn as without compilation. Dropout then has the same zeros, and takes less time than
    with the compiler's own random numbers, which are drawn one by one there.

    Args:
        model: Model with adapters.
        device_type: Where the model will run, such as ``cuda``; None: where its weights are.
        options: Arguments of :func:`torch.compile`: ``mode``, ``dynamic``, ``fullgraph``, ``backend``, ``options``.
    """
    device_type = device_type or next(model.parameters()).device.type
    if device_type == "cpu" and options.get("backend", "inductor") == "inductor":
        mode = options.pop("mode", "default")  # torch takes either a mode or options
        modes = {} if mode == "default" else torch._inductor.list_mode_options(mode)
        options["options"] = {**modes, "fallback_random": True, **(options.get("options") or {})}
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    for part in blocks_of(model) or [model]:
        part.compile(**options)
    for _, adapter in adapters_in(model):
        adapter.compiled = True


def allow_other_ranks(adapters: Iterable[Adapter]) -> None:
    """Make the numbers of ranks variables of the graphs that are compiled from now on."""
    for adapter in adapters:
        if adapter.compiled:
            torch._dynamo.config.force_parameter_static_shapes = False  # else marks on parameters are not read
            for parameter in adapter.parameters(recurse=False):
                torch._dynamo.maybe_mark_dynamic(parameter, 0)
