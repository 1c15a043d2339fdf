"""Holding what layers put out on the texts of anchors: the inputs that they have there, and the price of changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.fused import no_autocast
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.modes import in_mode
from lit_sparse.editing.watching import Places, watching
from lit_sparse.editing.whole_weights import Changing
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.functional.ultraedit import Held

Adds = Callable[[int], None]
"""Adds the gradients of a price in a turn, whose number it takes."""
_TINY = torch.finfo(torch.float32).tiny ** 0.5  # its inverse, times a price, is finite


class HeldInputs:
    """The inputs of layers on the texts that are held, found once for all edits of the same model and layers."""

    def __init__(self) -> None:
        self._known: list[tuple[dict[str, Tensor], dict[str, Held]]] = []

    def clear(self) -> None:
        """Forget them."""
        self._known.clear()

    def of(
        self, model: nn.Module, layers: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]]
    ) -> list[dict[str, Held]]:
        """For each batch, the inputs of each layer where tokens are held. Others are forgotten.

        Args:
            model: The model before the edit.
            layers: Layers by name.
            batches: The rows of each batch, as :class:`~lit_sparse.editing.objective.Objective` takes them.

        Raises:
            UsageError: If a layer does not see one input for each token.
            TrainingError: If inputs are not finite.
        """
        held_of_batches = [held_of(batch) for batch in batches]
        self._known[:] = [one for one in self._known if any(equal_rows(one[0], rows) for rows in held_of_batches)]
        found = []
        for rows in held_of_batches:
            held = next((held for others, held in self._known if equal_rows(rows, others)), None)
            if held is None:
                held = _inputs_of(model, layers, rows)
                self._known.append((rows, held))
            found.append(held)
        return found


def price_of_adapters(
    model: nn.Module, adapters: Mapping[str, Adapter], batches: Sequence[Mapping[str, Tensor]], held: HeldInputs
) -> Adds:
    """What adapters of low rank cost, by what they do to the outputs that are held.

    The price of changes D of the weights W, both ``(out_features, in_features)``, is

        w · Σ over layers of  Σ_s ‖D x(s)‖² / Σ_s ‖W x(s)‖²

    with the inputs x(s) of a layer where the anchors' tokens s are predicted, and the anchors' ``weight`` w. A layer
    whose outputs are all zero there has no price. Gates that are random in training count as in evaluation.

    Args:
        model: The model.
        adapters: Its adapters by name, new. Copies of a layer's adapter are changes of their own.
        batches: The rows of each turn, as :class:`~lit_sparse.editing.objective.Objective` takes them.
        held: The inputs of the layers, as far as they are known.

    Returns:
        A function that adds the gradients of the price in a turn to those of the parameters.

    Raises:
        UsageError: If an adapter is of another kind.

    Source:
        Its numerator is the first term of MEMIT's objective (Meng et al. 2022, arXiv:2210.07229, Eq. 8), D = W − W₀.
    """
    weights = {}
    for name, adapter in adapters.items():
        if not isinstance(adapter, LowRankLinear) or adapter.took_from_weight:
            raise UsageError(
                f"Anchors hold the outputs of linear layers that change by A and B from zero, and {name!r} is adapted "
                f"as {type(adapter).__name__}: leave it out, or set hold of the anchors to probabilities."
            )
        weights[name] = adapter.matrix
    found = held.of(model, adapters, batches)
    factors = _factors(batches, found, weights)

    def add(turn: int) -> None:
        prices = []
        with no_autocast(next(iter(weights.values()))):
            for name, inputs in found[turn].items():
                adapter: Any = adapters[name]
                A, B_t = (m.unflatten(0, (adapter.copies, -1)) for m in (adapter.lora_A, adapter.scaled_lora_B_t()))
                # ‖B A x‖² = xᵀ Aᵀ (Bᵀ B) A x
                prices.append(factors[turn][name] * (inputs.weighed(A) @ A.mT * (B_t @ B_t.mT)).sum())
            if prices:
                torch.stack(prices).sum().backward()

    return add


def price_of_weights(
    model: nn.Module, change: Changing, batches: Sequence[Mapping[str, Tensor]], held: HeldInputs
) -> Adds:
    """The price of :func:`price_of_adapters` for whole weights.

    Raises:
        UsageError: If a layer is not linear.
    """
    change.require_linear("FineTuning, with anchors that hold outputs,")
    found = held.of(model, change.layers, batches)
    factors = _factors(batches, found, {name: change.as_matrix(name, before) for name, before in change.before.items()})

    @torch.no_grad()
    def add(turn: int) -> None:
        for name, inputs in found[turn].items():
            weight = change.weights[name]
            with no_autocast(weight):
                delta = change.as_matrix(name, weight - change.before[name])
                slope = inputs.weighed(delta) * (2 * factors[turn][name])
            if weight.grad is not None:  # else the loss does not depend on the layer
                change.as_matrix(name, weight.grad).add_(slope)

    return add


def _factors(
    batches: Sequence[Mapping[str, Tensor]], held: Sequence[Mapping[str, Held]], weights: Mapping[str, Tensor]
) -> list[dict[str, Tensor]]:
    """The factors w / Σ_s w(s) ‖W x(s)‖² of each turn; held inputs have the roots of the shares w(s) of w."""
    found: list[dict[str, Tensor]] = []
    for batch, inputs in zip(batches, held, strict=True):
        found.append({})
        for name, one in inputs.items():
            with no_autocast(weights[name]):
                usual = one.moved(weights[name])
            # A layer that puts out nothing has no usual size to compare with, and no price.
            found[-1][name] = (batch["held"].sum() / usual.clamp(min=_TINY)).where(usual > 0, 0)
    return found


def answers_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are not held."""
    if "held" not in batch:
        return dict(batch)
    return {name: rows for name, rows in _some(batch, ~batch["held"].any(1)).items() if name != "held"}


def held_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The rows that are held."""
    if "held" not in batch or not batch["held"].any():
        return {"labels": batch["labels"][:0, :0]}
    return _some(batch, batch["held"].any(1))


def equal_rows(rows: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> bool:
    """Whether two batches are the same."""
    return rows.keys() == others.keys() and all(torch.equal(rows[name], others[name]) for name in rows)


def require_finite(tensors: Sequence[Tensor], where: str) -> None:
    """Raise a TrainingError if values are NaN or infinite."""
    if tensors and not torch.stack([tensor.isfinite().all() for tensor in tensors]).all():  # at once, for this waits
        raise TrainingError(
            f"Inputs or gradients of layers are NaN or infinite, {where}: lower the learning rate, or give the model a "
            "wider dtype."
        )


def _some(batch: Mapping[str, Tensor], chosen: Tensor) -> dict[str, Tensor]:
    """Some rows, without columns that are padding in all of them."""
    width = int(batch["attention_mask"][chosen].sum(1).max())
    return {name: rows[chosen, :width] for name, rows in batch.items()}


@torch.no_grad()
def _inputs_of(model: nn.Module, layers: Mapping[str, nn.Module], held: Mapping[str, Tensor]) -> dict[str, Held]:
    if not len(held["labels"]):
        return {}
    arguments = {name: rows for name, rows in held.items() if name not in ("labels", "held")}
    places = Places.of(held["held"] > 0)
    with in_mode(model, training=False), watching(layers, lambda: places) as seen:
        model(**arguments, use_cache=False)
    roots = held["held"].flatten()[places.flat + 1].sqrt()[:, None]
    found = {name: Held(roots * inputs) for name, (inputs, _) in seen.items()}
    require_finite([held.squares for held in found.values()], "on the anchors")
    return found
