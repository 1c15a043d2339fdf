"""Start the adapters of an edit at the inputs that its answers have, and the anchors have not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.fused import no_autocast
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.modes import in_mode
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.holding import HeldInputs, answers_of, require_finite
from lit_sparse.editing.objective import Objective
from lit_sparse.editing.watching import Places, watching
from lit_sparse.errors import UsageError
from lit_sparse.functional.keys import key_directions, needed_features
from lit_sparse.functional.ultraedit import Held
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.method import Method


def require_startable(method: object, start_at_keys: bool) -> None:
    """Refuse a method whose adapters cannot start at keys."""
    if start_at_keys and not isinstance(method, SparseMethod):
        raise UsageError(f"start_at_keys starts A, and {type(method).__name__} has no A: leave it out.")


def start_at_keys(
    model: nn.Module,
    method: Method,
    adapters: Mapping[str, Adapter],
    batches: Sequence[Mapping[str, Tensor]],
    held: HeldInputs | None,
) -> None:
    """Give A the directions along which a change of the weight does most for the answers and least to the anchors.

    The rows of A become the main left singular vectors of (C + λI)⁻¹ Σ x gᵀ, where the sum is over the places in which
    the answers' tokens of all turns are predicted, with the inputs x and the loss's gradients g by the outputs of the
    layer, and C is the covariance of its inputs on the anchors
    (:func:`~lit_sparse.functional.keys.key_directions`). Where there are fewer, the other rows stay random. A method
    that keeps a ``density`` of each row starts with that share of the input features, the same for all rows: those with
    the largest mean square in these places, relative to that on the anchors. Rows keep their norms.

    It takes one pass over the rows of each turn, without dropout.

    Args:
        model: The model with new adapters.
        method: Their method.
        adapters: By layer name, with B at zero.
        batches: The rows of each turn. The inputs of the first turn's anchors are C's.
        held: What is known of these inputs; None: outputs are not held, and C is the identity.

    Raises:
        UsageError: If an adapter is not one of a linear layer, or a layer does not see one input for each token.
        TrainingError: If inputs or gradients are not finite.

    Source:
        The keys of ROME (Meng et al. 2022, arXiv:2202.05262), as a start.
    """
    others = sorted(name for name, adapter in adapters.items() if not isinstance(adapter, LowRankLinear))
    if others:
        raise UsageError(f"start_at_keys is for linear layers, and {others[:3]} are of other kinds: leave them out.")
    inputs_held = {} if held is None else held.of(model, adapters, batches)[0]
    inputs: dict[str, list[Tensor]] = {name: [] for name in adapters}
    gradients: dict[str, list[Tensor]] = {name: [] for name in adapters}
    with torch.enable_grad(), in_mode(model, training=False):
        for batch in map(answers_of, batches):
            places = Places.of(batch["labels"] != IGNORED)
            with watching(adapters, lambda places=places: places) as seen:  # type: ignore[misc]
                loss, _ = Objective(model, batch)(model)
                loss.sum().backward()
            for name, (own, output) in seen.items():
                if output is not None and output.grad is not None:  # else the answers do not depend on it
                    inputs[name].append(own)
                    gradients[name].append(places.rows(output.grad, name))
    for adapter in adapters.values():
        adapter.zero_grad()
    require_finite([tensor for rows in (*inputs.values(), *gradients.values()) for tensor in rows], "before the edit")
    for name, adapter in adapters.items():
        if inputs[name]:
            share = adapter.overrides.get("density", getattr(method, "density", None) or 1.0)
            _start(adapter, torch.cat(inputs[name]), torch.cat(gradients[name]), inputs_held.get(name), share)


@torch.no_grad()
def _start(adapter: Adapter, inputs: Tensor, gradients: Tensor, held: Held | None, share: float) -> None:
    lora_A: Any = adapter.lora_A
    with no_autocast(lora_A):
        squares = inputs.square().sum(0)
        features = needed_features(squares, torch.zeros_like(squares) if held is None else held.squares, share)
        norms = lora_A.norm(dim=1, keepdim=True)
        if features is not None:
            lora_A.mul_(torch.zeros_like(lora_A[0]).index_fill(0, features, 1.0))
        directions = key_directions(inputs, gradients, held, features, len(lora_A))
        lora_A[: len(directions)] = directions.to(lora_A.dtype)
        lora_A.mul_(norms / lora_A.norm(dim=1, keepdim=True))
