"""What linear layers have as inputs, and which gradients their outputs get, where some tokens are predicted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_sparse.errors import UsageError


class Places(NamedTuple):
    """Where some tokens of a batch are predicted.

    Args:
        flat: Numbers of these places, counted through all rows, shape ``(tokens,)``.
        shape: Shape of the batch.
    """

    flat: Tensor
    shape: torch.Size

    @classmethod
    def of(cls, tokens: Tensor) -> Places:
        """Those of the tokens that are marked: each is predicted one place before. The first of a row is not."""
        return cls(F.pad(tokens[:, 1:], (0, 1)).flatten().nonzero().flatten(), tokens.shape)

    def rows(self, values: Tensor, name: str) -> Tensor:
        """Copies of the values of a layer there, in float32 or wider, shape ``(tokens, features)``."""
        sizes, own = ([size for size in shape if size != 1] for shape in (values.shape[:-1], self.shape))
        if sizes not in (own, [self.shape.numel()]):  # not in another order
            raise UsageError(
                f"A layer must have one input for each token, and {name!r} has others, of shape {tuple(values.shape)}: "
                "leave the layer out (exclude_modules)."
            )
        return values.flatten(0, -2)[self.flat].to(torch.promote_types(values.dtype, torch.float32))


Seen = dict[str, tuple[Tensor, Tensor | None]]
"""Name of a layer to its inputs where tokens are predicted, and, if gradients are computed, its whole output."""


@contextmanager
def watching(layers: Mapping[str, nn.Module], places: Callable[[], Places]) -> Iterator[Seen]:
    """Within the context, keep what each layer sees in a pass. The caller empties it before the next pass.

    Args:
        layers: The layers by name.
        places: Gives the places of the tokens of a pass.
    """
    seen: Seen = {}

    def hook_of(name: str) -> Callable[..., Tensor]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            if name in seen:
                raise UsageError(
                    f"A layer must have one input for each token, and the model calls {name!r} twice: leave the layer "
                    "out (exclude_modules)."
                )
            inputs = places().rows(args[0] if args else next(iter(kwargs.values())), name)
            if not torch.is_grad_enabled():
                seen[name] = inputs, None
                return output
            output.requires_grad_() if output.is_leaf else output.retain_grad()
            seen[name] = inputs, output
            return output.clone()  # models may write over it

        return hook

    hooks = [layer.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
