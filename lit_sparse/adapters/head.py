"""Find the task head of a model by its structure: what lies outside the pretrained body."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def task_head(model: nn.Module) -> list[str]:
    """Names of the modules (and bare parameters) that a task adds to a pretrained body.

    For ``BertForSequenceClassification`` that is ``["classifier"]``, for DeBERTa ``["pooler", "classifier"]``,
    for a ``nn.Module`` of the user's own whatever stands beside the Hugging Face model in it. A language
    model's output embeddings came with the pretrained weights and are not a task head. A model without any
    Hugging Face model in it has no recognisable head.

    Args:
        model: A Hugging Face model, or a module that holds one or more.

    Returns:
        Full names within ``model``, without those that hold no parameter.
    """
    bodies = {body for _, body in pretrained_bodies(model)}
    if not bodies:
        return []
    output_layers = {id(layer) for layer in output_embeddings(model)}
    return [
        name
        for name, part in _outside(model, bodies)
        if isinstance(part, nn.Parameter)
        or (any(True for _ in part.parameters()) and not any(id(m) in output_layers for m in part.modules()))
    ]


def pretrained_bodies(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The task-independent part of every outermost Hugging Face model in ``model``, with its name."""
    found: list[tuple[str, nn.Module]] = []
    owned: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel) and module not in owned and not _is_wrapper(module):
            owned.update(module.modules())
            body = module.base_model
            inner = next(n for n, m in module.named_modules() if m is body)
            found.append((".".join(part for part in (name, inner) if part), body))
    return found


def _is_wrapper(model: PreTrainedModel) -> bool:
    """Whether the user wrote this class around another model: no class of transformers says what it computes."""
    kinds = [kind for kind in type(model).__mro__ if kind.__module__.startswith("transformers")]
    return (
        model.base_model is model
        and not any("forward" in vars(kind) for kind in kinds)
        and any(isinstance(part, PreTrainedModel) for part in model.modules() if part is not model)
    )


def input_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that turn token ids into vectors, of every Hugging Face model in ``model``."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            try:
                layer = module.get_input_embeddings()
            except NotImplementedError:  # such as those of sounds
                continue
            if isinstance(getattr(layer, "weight", None), Tensor):
                yield layer


def output_embeddings(model: nn.Module) -> Iterator[nn.Module]:
    """The layers that turn hidden states into token scores, of every Hugging Face model in ``model``."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            layer = module.get_output_embeddings()
            if layer is not None:
                yield layer


def keep_head_precision(head: nn.Module) -> None:
    """Train a half-precision head in float32, and cast what enters it.

    Args:
        head: Trained head module; left alone when its parameters are float32 already.
    """
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in head.parameters()):
        head.float()
        if _cast_inputs not in head._forward_pre_hooks.values():
            head.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def leave_head_precision(model: nn.Module) -> None:
    """Stop casting what enters the heads of ``model``: undoes :func:`keep_head_precision` but for the dtype."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is _cast_inputs:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)


def _cast_inputs(
    head: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[tuple[object, ...], dict[str, object]]:
    dtype = next(head.parameters()).dtype

    def cast(value: object) -> object:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(a) for a in args), {name: cast(value) for name, value in kwargs.items()}


def _outside(
    module: nn.Module, bodies: set[nn.Module], prefix: str = ""
) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """The largest parts of ``module`` that neither are nor contain a body."""
    if module in bodies:
        return
    if not any(m in bodies for m in module.modules()):
        yield prefix, module
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}.{name}".lstrip("."), parameter
    for name, child in module.named_children():
        yield from _outside(child, bodies, f"{prefix}.{name}".lstrip("."))
