"""The way from trained adapters and heads back to the pretrained model."""

from __future__ import annotations

import torch
from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.originals import trained_and_original
from lit_sparse.adapters.token_rows import TokenRows
from lit_sparse.errors import UsageError


class WayBack:
    """A continuous way from trained weights to pretrained ones: adapters shrink, then trained heads go back.

    Its length is 2 with the weights as trained, 1 with every B (and the values of every ``DeltaLinear``) at zero, and 0
    where the heads, too, have their values from before injection. A, gates and masks stay as they are, and zeros of B
    stay zeros.

    Args:
        model: Model with trained adapters, for which :func:`require_way_back` found a way.
    """

    whole = 2.0
    """The length of what was trained."""

    def __init__(self, model: nn.Module) -> None:
        held = [adapter for _, adapter in adapters_in(model)]
        factors = [a.lora_B_t for a in held if isinstance(a, LowRankAdapter)]
        factors += [a.values for a in held if isinstance(a, DeltaLinear)]
        self._factors = [(factor, factor.detach().clone()) for factor in factors]
        heads = [(now, original) for now, original in trained_and_original(model) if now.is_floating_point()]
        self._heads = [(now, now.detach().clone(), original.detach().to(now)) for now, original in heads]
        self.shortest = 0.0 if heads else 1.0
        """The length of the pretrained model."""
        self.length = self.whole

    @property
    def scale(self) -> float:
        """The factor of what the adapters add at the present length, in [0, 1]."""
        return max(self.length - 1, 0.0)

    @torch.no_grad()
    def go(self, length: float) -> None:
        """Set the weights that are at a length."""
        self.length = length
        for factor, trained in self._factors:
            factor.copy_(trained * self.scale)
        for now, trained, original in self._heads:
            now.copy_(original.lerp(trained, min(length, 1.0)))


def require_way_back(model: nn.Module) -> None:
    """Check that a model without what was trained is the pretrained one.

    Raises:
        UsageError: If it has no adapters, they took their start out of the frozen weights, or rows of tokens are
            trained.
    """
    adapters = [adapter for _, adapter in adapters_in(model)]
    if not adapters:
        raise UsageError(f"ForgettingCap shrinks adapters, and {type(model).__name__} has none. Inject a method first.")
    if any(adapter.took_from_weight for adapter in adapters):
        raise UsageError(
            "ForgettingCap cannot shrink adapters that took their start out of the frozen weights (init_weights "
            "'pissa' or 'lora_ga'): without them, the model is not the pretrained one. Set init_weights to 'lora'."
        )
    if any(isinstance(part, TokenRows) for part in model.modules()):
        raise UsageError("ForgettingCap cannot shrink trained rows of tokens. Remove new_tokens or ForgettingCap.")
