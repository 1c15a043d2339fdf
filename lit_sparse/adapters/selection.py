"""Which layers of a backbone a method's ``target_modules`` mean, and why others are left out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.experts import AdaptedExperts, ExpertWeight, expert_weights
from lit_sparse.adapters.head import output_embeddings, pretrained_bodies
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.patterns import NamePatterns
from lit_sparse.adapters.quantized import is_quantized
from lit_sparse.adapters.weight_reads import reads_weight
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class Candidate:
    """A layer of a kind that can be adapted.

    Args:
        name: Full name.
        layer: The layer.
        refusal: Why this one cannot be adapted all the same, or None.
        passed_over: Why ``"all-linear"`` leaves it out although its name could be given, or None.
    """

    name: str
    layer: Layer
    refusal: str | None
    passed_over: str | None

    def parameters(self) -> list[nn.Parameter]:
        """The layer's own."""
        return [self.layer.weight] if isinstance(self.layer, ExpertWeight) else list(self.layer.parameters())


def survey(model: nn.Module, head: Collection[str] = ()) -> dict[str, Candidate]:
    """Look at every layer of a kind that can be adapted: linear, experts, convolution, embedding.

    Args:
        model: The backbone.
        head: Names of the head modules that are trained whole.

    Returns:
        Full name to candidate, in the order of ``model.named_modules()``; without layers that are adapted already.
    """
    inside = [name for name, _ in pretrained_bodies(model)]
    # T5's body is the whole model, its output embeddings included.
    output_layers = {id(layer) for layer in output_embeddings(model)}
    owners = _owners(model)
    candidates = {}
    for name, layer in _layers(model):
        passed_over = None
        if any(_is_inside(name, part) for part in head):
            refusal: str | None = "is in the task head, which is trained whole"
        else:
            refusal = _refusal(model, name, layer, owners)
        if isinstance(layer, nn.Conv2d | nn.Embedding):
            passed_over = f"is {_kind(layer)}, not a linear layer"
        elif id(layer) in output_layers:
            passed_over = "gives the scores of the vocabulary"
        elif inside and not any(_is_inside(name, body) for body in inside):
            passed_over = "lies outside the pretrained body"
        candidates[name] = Candidate(name, layer, refusal, passed_over)
    return candidates


def left_out(model: nn.Module) -> dict[str, str]:
    """Why the weights that an injection left frozen are not adapted.

    Args:
        model: Model after injection.

    Returns:
        Full name of a layer, or of a parameter of at least two dimensions in a module of another kind, to the reason.
    """
    reasons = {}
    seen: set[int] = set()
    for name, candidate in survey(model).items():
        seen.update(id(p) for p in candidate.parameters())
        if not any(p.requires_grad for p in candidate.parameters()):
            reasons[name] = candidate.refusal or candidate.passed_over or "is not named by target_modules"
    for module in model.modules():
        if isinstance(module, LowRankAdapter):
            seen.update(id(p) for p in module.layer.parameters())
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if (
                parameter is not None
                and parameter.ndim > 1
                and id(parameter) not in seen
                and not parameter.requires_grad
            ):
                seen.add(id(parameter))
                reasons[f"{name}.{own}".lstrip(".")] = f"belongs to {type(module).__name__}, which has no adapter"
    return reasons


def select_layers(
    model: nn.Module,
    target_modules: str | Sequence[str],
    layers: int | Sequence[int] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
    head: Collection[str] = (),
) -> dict[str, Layer]:
    """Choose the layers to adapt.

    Args:
        model: The backbone.
        target_modules: ``"all-linear"`` (every linear layer of the pretrained body but its output embeddings, the
            weights of experts included), another string: a regular expression that must match the full name, or a list
            of whole trailing name parts. Convolutions and embeddings are adapted when they are named.
        layers: Keep only these transformer blocks, or this one: the first number in a layer's name. None keeps all.
        exclude_modules: Left out of the choice: a regular expression or a list of trailing name parts.
        head: Names of the head modules that are trained whole and therefore not adapted.

    Returns:
        Full name to layer, in the order of ``model.named_modules()``; never empty.

    Raises:
        UsageError: If a pattern matches nothing, or something that cannot be adapted, ``layers`` holds a bool or a
            block that does not exist, or nothing is left.
    """
    candidates = survey(model, head)
    if not candidates:
        raise UsageError(f"{type(model).__name__} has no layer in it that could be adapted, linear or other.")
    if target_modules == "all-linear":
        chosen = [n for n, c in candidates.items() if c.refusal is None and c.passed_over is None]
    else:
        chosen = _matched(model, "target_modules", target_modules, candidates)
    if exclude_modules is not None:
        excluded = set(_matched(model, "exclude_modules", exclude_modules, candidates))
        chosen = [n for n in chosen if n not in excluded]
    if layers is not None:
        chosen = _in_blocks(chosen, [layers] if isinstance(layers, int) else layers)
    if not chosen:
        raise UsageError(
            f"No layer of {type(model).__name__} is left to adapt after target_modules={target_modules!r}, "
            f"layers={layers!r} and exclude_modules={exclude_modules!r}. Its {_adaptable(candidates)}."
        )
    for name in chosen:
        refusal = candidates[name].refusal
        if refusal is not None:
            tail = ".".join(name.split(".")[-2:])
            raise UsageError(
                f"target_modules {target_modules!r} matches {name!r} of {type(model).__name__}, which {refusal}. "
                f"Leave it out, for example with exclude_modules={[tail]!r}."
            )
    return {name: candidates[name].layer for name in chosen}


def matches_tail(name: str, pattern: str) -> bool:
    """Whether ``pattern`` is the whole name or whole trailing parts of it."""
    return f".{name}".endswith(f".{pattern}")


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers without an adapter, each by the name that its adapter would have."""
    adapted = {(id(m.layer), id(m.weight)) for m in model.modules() if isinstance(m, LowRankAdapter)}
    wrapped = {id(m.base) for m in model.modules() if isinstance(m, AdaptedExperts)}
    for name, module in model.named_modules():
        if not name:
            continue  # what is the whole model cannot be replaced in it
        if isinstance(module, FrozenLinear | nn.Conv2d | nn.Embedding):
            if (id(module), id(module.weight)) not in adapted:
                yield name, module
            continue
        holder = name.removesuffix(".base") if id(module) in wrapped else name
        for weight in expert_weights(module):
            if (id(module), id(weight.weight)) not in adapted:
                yield f"{holder}.{weight.name}", weight


def _refusal(model: nn.Module, name: str, layer: Layer, owners: dict[int, list[nn.Module]]) -> str | None:
    holder = layer.module if isinstance(layer, ExpertWeight) else layer
    # The weight norm of torch.nn.utils, older than parametrizations, leaves a plain tensor there.
    if is_parametrized(holder) or not isinstance(layer.weight, nn.Parameter):
        return "computes its weight from other parameters"
    others = [other for other in owners.get(id(layer.weight), ()) if other is not holder]
    if others:
        second = next(n for n, m in model.named_modules() if m is others[0])
        return f"shares its weight with {second!r}: what merging adds would change both"
    if isinstance(layer, ExpertWeight):
        if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize == 1:
            return f"is quantized to {layer.weight.dtype}, which its adapter cannot compute with"
        if getattr(layer.module, "_is_expert_parallel", False):
            return "is spread over devices by expert parallelism"
        return None
    reader = reads_weight(model, name)
    if reader is not None:
        return f"the class {reader} computes with the weight of, without calling it: an adapter would be ignored"
    if not _computes_as_its_kind(layer):
        return f"computes something else than {_kind(layer)} ({type(layer).__name__})"
    return None


def _computes_as_its_kind(layer: nn.Module) -> bool:
    """Whether a sub-class with a forward of its own still is the layer that an adapter adds to."""
    kind = next(k for k in (*FrozenLinear.__args__, nn.Conv2d, nn.Embedding) if isinstance(layer, k))
    if isinstance(layer, nn.Embedding) and layer.max_norm is not None:
        return False  # changes its weight in forward
    if type(layer).forward is kind.forward or is_quantized(layer):
        return True
    if not isinstance(layer, nn.Linear):
        return False
    x = torch.linspace(-1, 1, layer.in_features, device=layer.weight.device, dtype=layer.weight.dtype).unsqueeze(0)
    try:
        with torch.no_grad():
            found = layer(x)
            expected = F.linear(x, layer.weight, layer.bias)
    except Exception:  # whatever a forward that wants other inputs stumbles on
        return False
    same_kind = isinstance(found, Tensor) and found.shape == expected.shape and found.dtype == expected.dtype
    return same_kind and (found.is_meta or torch.allclose(found, expected, rtol=1e-2, atol=1e-3))


def _owners(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Parameter to the modules that hold it; a module with two names counts once."""
    owners: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(module)
    return owners


def _matched(
    model: nn.Module, argument: str, patterns: str | Sequence[str], candidates: dict[str, Candidate]
) -> list[str]:
    """Names of the layers that ``patterns`` mean; every single pattern must mean one."""
    kind = type(model).__name__
    modules = {name: type(m) for name, m in model.named_modules() if name}
    known = dict.fromkeys([*modules, *candidates])
    chosen: set[str] = set()
    expressions = NamePatterns(argument)
    whole = isinstance(patterns, str)
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = [n for n in known if (expressions.matches(pattern, n) if whole else matches_tail(n, pattern))]
        layers = [candidates[n] for n in found if n in candidates]
        # The head is passed over as long as something else is meant too: "dense" is a part of many heads.
        usable = [c.name for c in layers if argument == "exclude_modules" or not _in_head(c)]
        if usable:
            chosen.update(usable)
        elif layers:
            raise UsageError(
                f"{argument} {pattern!r} matches only the task head of {kind}, which is trained whole. Leave it out, "
                "or set train_head to false to adapt it instead."
            )
        elif found:
            types = sorted({modules[n].__name__ for n in found})
            raise UsageError(
                f"{argument} {pattern!r} matches modules of {kind} of type {types}, not linear layers. Its "
                f"{_adaptable(candidates)}."
            )
        else:
            how = (
                "Give a list of trailing name parts, or a regular expression that matches a full name"
                if whole
                else "Give whole trailing parts of a name, such as 'query' or 'attention.output.dense'"
            )
            raise UsageError(
                f"{argument} {pattern!r} matches no linear layer of {kind}, whose {_adaptable(candidates)}. {how}."
            )
    return [n for n in candidates if n in chosen]


def _in_head(candidate: Candidate) -> bool:
    return candidate.refusal is not None and "task head" in candidate.refusal


def _in_blocks(names: list[str], layers: Sequence[int]) -> list[str]:
    if any(isinstance(number, bool) for number in layers):
        raise UsageError(
            f"layers takes the numbers of transformer blocks, such as 1 or [0, 1]; got {list(layers)}. Leave it out to "
            "adapt all."
        )
    block = {n: next((int(part) for part in n.split(".") if part.isdigit()), None) for n in names}
    present = {b for b in block.values() if b is not None}
    absent = sorted(set(layers) - present, key=str)
    if absent or not layers:
        raise UsageError(
            f"layers {absent or list(layers)} match no chosen layer; the chosen ones stand in blocks {sorted(present)}."
        )
    return [n for n in names if block[n] in set(layers)]


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")


def _adaptable(candidates: dict[str, Candidate]) -> str:
    """``linear layers end in [...]``, and convolutions and embeddings if there are any."""
    kinds: dict[str, list[str]] = {}
    for name, candidate in candidates.items():
        kinds.setdefault(_plural(candidate.layer), []).append(name)
    return ", ".join(f"{kind} end in {_leaves(names)}" for kind, names in kinds.items())


def _leaves(names: Iterable[str]) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})


def _kind(layer: Layer) -> str:
    if isinstance(layer, nn.Conv2d):
        return "a convolution"
    return "an embedding" if isinstance(layer, nn.Embedding) else "a linear layer"


def _plural(layer: Layer) -> str:
    return {"a convolution": "convolutions", "an embedding": "embeddings"}.get(_kind(layer), "linear layers")
