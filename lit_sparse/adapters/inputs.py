"""What comes into adapted layers, which of them have the same input, and which of its positions are no padding."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.adapters.base import LowRankAdapter


@contextmanager
def watch_inputs(adapters: Mapping[str, LowRankAdapter], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context, show every input of these adapters."""

    def hook_of(name: str) -> Callable[..., None]:
        return lambda _, args, kwargs: see(name, args[0] if args else next(iter(kwargs.values())))

    hooks = [adapter.register_forward_pre_hook(hook_of(name), with_kwargs=True) for name, adapter in adapters.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def equal_inputs(adapters: Mapping[str, LowRankAdapter], forward: Callable[[], Any]) -> dict[str, str]:
    """By a pass, the first layer that has the same input, for each layer that the pass calls."""
    first: dict[str, str] = {}
    seen: list[tuple[weakref.ref[Tensor], int, str]] = []  # a freed tensor's place may be another's input later

    def note(name: str, x: Tensor) -> None:
        if name not in first:
            same = (other for alive, version, other in seen if alive() is x and version == x._version)
            first[name] = next(same, name)
            seen.append((weakref.ref(x), x._version, first[name]))

    with watch_inputs(adapters, note):
        forward()
    return first


@contextmanager
def real_positions(model: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
    """Within the context, a function that takes the rows out of a layer's input that are no padding.

    They are the positions in ``attention_mask`` of the call of the Hugging Face model that is under way. If its labels
    have that shape, positions with the label -100 are left out, too, as in PEFT. In an encoder-decoder, labels and
    ``decoder_attention_mask`` are for the decoder alone, whose layers that read the encoder's output have the text's
    mask. Inputs with another number of positions have none left out.
    """
    calls: list[_Call] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        signature = inspect.signature(module.forward)
        given = {**signature.bind_partial(*args, **kwargs).arguments, **kwargs}
        calls.append(_call(given, "decoder_input_ids" in signature.parameters, calls[-1] if calls else _Call()))

    def leave(*_: Any) -> None:
        calls.pop()

    def positions(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        call = calls[-1] if calls else _Call()
        masks = (call.text,) if x is call.memory else (call.target, call.text)
        mask = next((mask for mask in masks if mask is not None and mask.numel() == len(rows)), None)
        return rows if mask is None else rows[mask.flatten()]

    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    hooks = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in models]
    hooks += [module.register_forward_hook(leave) for module in models]
    try:
        yield positions
    finally:
        for hook in hooks:
            hook.remove()


class _Call(NamedTuple):
    """Which positions are no padding in a call of a Hugging Face model."""

    text: Tensor | None = None
    target: Tensor | None = None
    """Those of an encoder-decoder's target."""
    memory: Tensor | None = None
    """The encoder's output, in a call of the decoder."""
    divided: bool = False
    """Whether this is the call of a whole encoder-decoder."""


def _call(given: Mapping[str, Any], divided: bool, outer: _Call) -> _Call:
    """What holds in a call with these arguments within another call."""
    if outer.text is None and outer.target is None:
        text, labels = _real(given.get("attention_mask")), given.get("labels")
        target = labels != -100 if isinstance(labels, Tensor) and labels.ndim > 1 else None
        if divided:
            return _Call(text, _both(_real(given.get("decoder_attention_mask")), target), divided=True)
        return _Call(_both(text, target))
    if divided or not outer.divided:
        return outer
    memory = given.get("encoder_hidden_states")
    if isinstance(memory, Tensor):
        return _Call(outer.text, outer.target, memory)
    return _Call(outer.text)


def _real(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and not mask.is_floating_point() else None


def _both(mask: Tensor | None, labelled: Tensor | None) -> Tensor | None:
    if mask is None or labelled is None:
        return labelled if mask is None else mask
    return mask & labelled if mask.shape == labelled.shape else mask
