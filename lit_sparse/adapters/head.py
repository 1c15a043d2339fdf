"""Find the task head of a model, the modules outside of its pretrained body, and keep its precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_HALF = (torch.float16, torch.bfloat16)


def task_head(model: nn.Module) -> list[str]:
    """Names of the modules (and bare parameters) that a task adds to a pretrained body.

    For ``BertForSequenceClassification`` that is ``["classifier"]``, for DeBERTa ``["pooler", "classifier"]``,
    for a user's ``nn.Module`` all modules beside the Hugging Face model in it. A language
    model's output embeddings came with the pretrained weights and are not a task head. A model without any
    Hugging Face model in it has no recognisable head.

    Args:
        model: A Hugging Face model, or a module that holds one or more.

    Returns:
        Full names within ``model`` of the parts that hold parameters.
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
    """Name and task-independent part of every outermost Hugging Face model in ``model``."""
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
    """Whether the class is a user's wrapper around another model: no class of transformers defines its forward."""
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
            except NotImplementedError:  # such as models of audio
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


def keep_precision(trained: nn.Module | nn.Parameter, owner: nn.Module) -> None:
    """Train a part of the model in float32, whatever half precision the model has or gets later.

    ``.half()``, ``.to(dtype)`` and Lightning's true half precision then leave this part in float32, because the 8 bits
    of a bfloat16 mantissa lose updates of size lr. Inputs of the part are cast.

    Args:
        trained: A fully trained module, or a parameter.
        owner: The module that holds it.
    """
    if isinstance(trained, nn.Parameter):
        trained.data = _widened(trained.data)
        held = [trained]
    else:
        if any(p.dtype in _HALF for p in trained.parameters()):
            trained.float()
            _cast_what_enters(trained)
        owner, held = trained, None
    before = owner.__dict__.get("_apply")
    if isinstance(before, _Keeping) and held is not None and before.held is not None:
        held = [*before.held, *held]
    owner._apply = _Keeping(owner, held)  # type: ignore[method-assign]


class _Keeping:
    """Replaces the ``_apply`` of a module, which every ``.to()``, ``.half()`` and ``.cuda()`` calls.

    Args:
        module: The module.
        held: Its parameters that keep their precision; None: everything in it.
    """

    def __init__(self, module: nn.Module, held: list[nn.Parameter] | None) -> None:
        self.module, self.held = module, held

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        kept = None if self.held is None else {id(t) for p in self.held for t in (p, p.grad)}
        wide = never_narrowing(fn)

        def apply(tensor: Tensor) -> Tensor:
            return wide(tensor) if kept is None or id(tensor) in kept else fn(tensor)

        type(self.module)._apply(self.module, apply, recurse)
        if self.held is None and fn(torch.empty(0)).dtype in _HALF:
            _cast_what_enters(self.module)
        return self.module


def never_narrowing(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function that ``nn.Module._apply`` gets, changed to keep the precision of tensors of 32 bits and more."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        narrowed = moved.is_floating_point() and moved.dtype.itemsize < 4 <= tensor.dtype.itemsize
        return tensor.to(moved.device) if narrowed else moved

    return move


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def _cast_what_enters(module: nn.Module) -> None:
    if _cast_inputs not in module._forward_pre_hooks.values():
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)


def leave_head_precision(model: nn.Module) -> None:
    """Undo :func:`keep_precision` in all of ``model``, but leave dtypes as they are."""
    for module in model.modules():
        if isinstance(module.__dict__.get("_apply"), _Keeping):
            del module._apply
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
    """The largest parts of ``module`` that are no body and contain none."""
    if module in bodies:
        return
    if not any(m in bodies for m in module.modules()):
        yield prefix, module
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield f"{prefix}.{name}".lstrip("."), parameter
    for name, child in module.named_children():
        yield from _outside(child, bodies, f"{prefix}.{name}".lstrip("."))
