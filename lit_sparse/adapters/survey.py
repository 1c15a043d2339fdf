"""Which layers of a backbone can be adapted, and why others cannot."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.experts import AdaptedExperts, ExpertWeight, expert_weights
from lit_sparse.adapters.head import output_embeddings, pretrained_bodies
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.linear import FrozenLinear
from lit_sparse.adapters.quantized import is_quantized
from lit_sparse.adapters.weight_reads import reads_weight


@dataclass(frozen=True)
class Candidate:
    """A linear layer, convolution, embedding or expert weight.

    Args:
        name: Full name.
        layer: The layer.
        in_head: Whether it belongs to the task head.
        refusal: Why this layer cannot be adapted, or None.
        passed_over: Why ``"all-linear"`` leaves it out although its name could be given, or None.
    """

    name: str
    layer: Layer
    in_head: bool
    refusal: str | None
    passed_over: str | None

    @property
    def kind(self) -> str:
        """The kind of layer, for a sentence."""
        if isinstance(self.layer, nn.Conv2d):
            return "convolution"
        return "embedding" if isinstance(self.layer, nn.Embedding) else "linear layer"

    def parameters(self) -> list[nn.Parameter]:
        """The layer's own parameters."""
        return [self.layer.weight] if isinstance(self.layer, ExpertWeight) else list(self.layer.parameters())


def survey(model: nn.Module, head: Collection[str] = ()) -> dict[str, Candidate]:
    """Find every linear layer, expert weight, convolution and embedding, and whether it can be adapted.

    Args:
        model: The backbone.
        head: Names of the head modules that are trained whole.

    Returns:
        Full name to candidate, in the order of ``model.named_modules()``, without layers that are adapted already.
    """
    inside = [name for name, _ in pretrained_bodies(model)]
    # T5's body is the whole model, its output embeddings included.
    output_layers = {id(layer) for layer in output_embeddings(model)}
    owners = _owners(model)
    candidates = {}
    for name, layer in _layers(model):
        passed_over = None
        in_head = any(_is_inside(name, part) for part in head)
        refusal = "is in the task head, which is trained whole" if in_head else _refusal(model, name, layer, owners)
        if isinstance(layer, nn.Conv2d | nn.Embedding):
            passed_over = "is no linear layer"
        elif id(layer) in output_layers:
            passed_over = "gives the scores of the vocabulary"
        elif inside and not any(_is_inside(name, body) for body in inside):
            passed_over = "lies outside the pretrained body"
        candidates[name] = Candidate(name, layer, in_head, refusal, passed_over)
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
        if isinstance(module, Adapter):
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


def _layers(model: nn.Module) -> Iterator[tuple[str, Layer]]:
    """The layers without an adapter, each under the name that its adapter would have."""
    adapted = {(id(m.layer), id(m.weight)) for m in model.modules() if isinstance(m, Adapter)}
    wrapped = {id(m.base) for m in model.modules() if isinstance(m, AdaptedExperts)}
    for name, module in model.named_modules():
        if not name:
            continue  # the model itself cannot be replaced in the model
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
        return f"shares its weight with {second!r}, so that merging would change both"
    if isinstance(layer, ExpertWeight):
        if not layer.weight.is_floating_point() or layer.weight.dtype.itemsize == 1:
            return f"is quantized to {layer.weight.dtype}, which its adapter cannot compute with"
        if getattr(layer.module, "_is_expert_parallel", False):
            return "is spread over devices by expert parallelism"
        return None
    reader = reads_weight(model, name)
    if reader is not None:
        return f"is not called: {reader} reads its weight directly, so that an adapter would have no effect"
    kind = next(k for k in (*FrozenLinear.__args__, nn.Conv2d, nn.Embedding) if isinstance(layer, k))
    if not _computes_as(kind, layer):
        return f"computes something else than {kind.__name__} ({type(layer).__name__})"
    return None


def _computes_as(kind: type[nn.Module], layer: nn.Module) -> bool:
    """Whether a sub-class with its own forward still computes what an adapter adds to."""
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
    except Exception:  # a forward with other inputs may raise anything
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


def _is_inside(name: str, part: str) -> bool:
    return not part or name == part or name.startswith(f"{part}.")
