"""Which layers of a backbone a method's ``target_modules`` mean."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lit_sparse.adapters.head import output_embeddings, pretrained_bodies
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.errors import UsageError


def select_layers(
    model: nn.Module,
    target_modules: str | Sequence[str],
    layers: Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    head: Collection[str] = (),
) -> dict[str, FrozenLinear]:
    """Choose the linear layers to adapt.

    Args:
        model: The backbone.
        target_modules: ``"all-linear"`` (every linear layer of the pretrained body but its output embeddings), another
            string: a regular expression that must match the full name, or a list of whole trailing name parts.
        layers: Keep only these transformer blocks: the first number in a layer's name. None keeps all.
        exclude_modules: Left out of the choice: a regular expression or a list of trailing name parts.
        head: Names of the head modules that are trained whole and therefore not adapted.

    Returns:
        Full name to layer, in the order of ``model.named_modules()``; never empty.

    Raises:
        UsageError: If a pattern matches nothing, or something that cannot be adapted, or nothing is left.
    """
    modules = dict(model.named_modules())
    del modules[""]
    in_head = {name for name in modules if any(_is_inside(name, part) for part in head)}
    linear = {n: m for n, m in modules.items() if isinstance(m, FrozenLinear)}
    if not linear:
        raise UsageError(f"{type(model).__name__} has no linear layer (nn.Linear or Conv1D) that could be adapted.")
    if target_modules == "all-linear":
        inside = _in_bodies(model, linear)
        # T5's body is the whole model, its output embeddings included.
        output_layers = {id(layer) for layer in output_embeddings(model)}
        left_out = {n for n, m in linear.items() if id(m) in output_layers or _called_by_weight(model, n)}
        chosen = [n for n in linear if n in inside and n not in in_head and n not in left_out]
    else:
        chosen = _matched(model, "target_modules", target_modules, modules, in_head)
    if exclude_modules is not None:
        excluded = set(_matched(model, "exclude_modules", exclude_modules, modules, set()))
        chosen = [n for n in chosen if n not in excluded]
    if layers is not None:
        chosen = _in_blocks(chosen, layers)
    if not chosen:
        raise UsageError(
            f"No layer of {type(model).__name__} is left to adapt after target_modules={target_modules!r}, "
            f"layers={layers!r} and exclude_modules={exclude_modules!r}. Its linear layers end in {_leaves(linear)}."
        )
    _require_called(model, target_modules, chosen)
    return {name: linear[name] for name in chosen}


def _require_called(model: nn.Module, target_modules: str | Sequence[str], chosen: list[str]) -> None:
    for name in chosen:
        if _called_by_weight(model, name):
            parent = type(_parent(model, name)).__name__
            tail = ".".join(name.split(".")[-2:])
            raise UsageError(
                f"target_modules {target_modules!r} matches {name!r} of {type(model).__name__}, whose weight its "
                f"parent {parent} reads without calling the layer: an adapter there would be ignored. Leave it out, "
                f"for example with exclude_modules={[tail]!r}."
            )


def _matched(
    model: nn.Module,
    argument: str,
    patterns: str | Sequence[str],
    modules: dict[str, nn.Module],
    in_head: set[str],
) -> list[str]:
    """Names of the linear layers that ``patterns`` mean; every single pattern must mean one."""
    kind = type(model).__name__
    names: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [n for n in modules if _matches(n, pattern, argument, whole=isinstance(patterns, str))]
        usable = [n for n in found if isinstance(modules[n], FrozenLinear) and n not in in_head]
        if usable:
            names.update(usable)
        elif any(n in in_head for n in found):
            raise UsageError(
                f"{argument} {pattern!r} matches only the task head of {kind}, which is trained whole. Leave it out, "
                "or set train_head to false to adapt it instead."
            )
        elif found:
            types = sorted({type(modules[n]).__name__ for n in found})
            raise UsageError(
                f"{argument} {pattern!r} matches modules of {kind} of type {types}, not linear layers. Its linear "
                f"layers end in {_leaves(n for n, m in modules.items() if isinstance(m, FrozenLinear))}."
            )
        else:
            how = (
                "Give a list of trailing name parts, or a regular expression that matches a full name"
                if isinstance(patterns, str)
                else "Give whole trailing parts of a name, such as 'query' or 'attention.output.dense'"
            )
            raise UsageError(
                f"{argument} {pattern!r} matches no linear layer of {kind}, whose linear layers end in "
                f"{_leaves(n for n, m in modules.items() if isinstance(m, FrozenLinear))}. {how}."
            )
    return [n for n in modules if n in names]


def _matches(name: str, pattern: str, argument: str, whole: bool) -> bool:
    if not whole:
        return f".{name}".endswith(f".{pattern}")
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise UsageError(f"{argument} {pattern!r} is not a valid regular expression: {error}.") from error


def _in_bodies(model: nn.Module, names: Collection[str]) -> set[str]:
    bodies = [name for name, _ in pretrained_bodies(model)]
    return {n for n in names if not bodies or any(_is_inside(n, body) for body in bodies)}


def _in_blocks(names: list[str], layers: Sequence[int]) -> list[str]:
    block = {n: next((int(part) for part in n.split(".") if part.isdigit()), None) for n in names}
    present = {b for b in block.values() if b is not None}
    absent = sorted(set(layers) - present)
    if absent or not layers:
        raise UsageError(
            f"layers {absent or list(layers)} match no chosen layer; the chosen ones stand in blocks {sorted(present)}."
        )
    return [n for n in names if block[n] in set(layers)]


def _called_by_weight(model: nn.Module, name: str) -> bool:
    # The encoder layer calls linear1 and linear2 while training, but in evaluation runs one kernel on their weights.
    return isinstance(_parent(model, name), nn.MultiheadAttention | nn.TransformerEncoderLayer)


def _parent(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
