"""Gates on ranks under a budget, for which the ranks of all layers compete, for SoRA and GatedRoseLoRA."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.statistics import per_rank
from lit_sparse.errors import require_choice
from lit_sparse.functional import resolve_step, sensitivities, update_moving_average_, within_budget
from lit_sparse.methods.account import Account
from lit_sparse.methods.rank_budget import RankBudget, gates_of
from lit_sparse.methods.schedule import decided_at, length_of
from lit_sparse.methods.spectrum import cut
from lit_sparse.methods.step import Step

Score = Literal["singular", "norm", "sensitivity"]

_MEMORY = 0.8
"""β of the moving average of a gate's sensitivity."""

_CUTS = 32
"""Into how many cuts the schedule is divided for singular values, each of which decomposes every adapter."""


@dataclass(eq=False, repr=False, kw_only=True)
class Budgets(RankBudget):
    """Methods with gates that can be given a budget, for which the ranks of all layers compete.

    Ranks are taken by score, the highest first, as long as the budget lasts, and the gates of all others are set to
    zero. Nothing else pulls at a gate, so that ranks which survive do not shrink. From ``end`` on the choice stays, and
    what is left is trained on. The arguments of the budget are those of
    :class:`~lit_sparse.methods.rank_budget.RankBudget`.

    Until ``end``, the objective is the loss under the constraint that the ranks cost no more than the budget. After the
    optimizer's step on the loss, the step here is the proximal map of the constraint's indicator: the projection onto
    it. With the score ``singular``, the distance is the Frobenius norm of what changes in the weights,
    Σ ‖Z − scale · B diag(g) A‖² over all layers, and the projection cuts singular values (Eckart and Young). With the
    others it is Σ_k w_k (z_k − g_k)² over the gates, where w_k g_k² is the square of the score ``norm``, or the score
    ``sensitivity`` itself: ranks are cut as they are. Where layers cost differently the exact projection is a knapsack,
    and the step is a greedy approximation (:func:`~lit_sparse.functional.within_budget`). From ``end`` on, the
    objective is the loss alone, over the ranks that are left.

    Args:
        score: What decides which ranks live. ``singular``: the ranks of a layer are turned into the singular directions
            of its update, without a change of the function, and the smallest σ / √c of all layers are cut, where c is
            what a rank costs. A closed rank does not come back. Gates are not trained, unless they have a ``gate_lr``:
            they are 1 or 0, and until the first cut the run is that of a LoRA. ``norm``: scale · |g| ‖A_k‖ ‖B_k‖, the
            Frobenius norm of what a rank adds to the weight, after every step. ``sensitivity``: the moving average of
            |g ∂L/∂g|, so that the step raises the loss least, to first order. With the last two, a rank at zero may
            come back until ``end``, but seldom does.
        begin: Until when all ranks are kept: a number of optimizer steps, or with a decimal point a share of the run.
            The default is that of ``end``: all is cut at once. Give 0.1 with ``norm`` and ``sensitivity``.
    """

    score: Score = "singular"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, ("singular", "norm", "sensitivity"))

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer, with the average sensitivity of its gates if that is the score."""
        adapter = super().adapt(layer, overrides)
        if self._averages:
            adapter.register_buffer("sensitivity_gate", torch.zeros_like(adapter.gate, requires_grad=False))  # type: ignore[arg-type]
        return adapter

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if self._averages and not hasattr(adapter, "sensitivity_gate"):
            return "no sensitivities of gates, which score 'sensitivity' needs"
        return super().mismatch(adapter)

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> Any:
        """Note which gates are open once ranks stay, and |g · ∂L/∂g| where it is the score."""
        others = super().before_step(adapters, step)
        gates = gates_of(adapters)
        if not self._gates_learn:
            for gate in gates:
                gate.grad = None  # no optimizer steps it, and no clipping counts it
        opened = _values(gates) != 0 if self._gates_learn and self._holds(step) else None  # others do not move
        seen: list[Tensor] = []
        if self._averages:
            # A layer that the loss did not reach has no gradient, and its gates no influence.
            grads = [torch.zeros_like(g, requires_grad=False) if g.grad is None else g.grad for g in gates]
            seen = sensitivities(gates, grads)
        if opened is not None:
            _silence(gates, opened)
        return opened, seen, others

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """Set the gates to zero that are to stay there, or that the budget does not pay for."""
        opened, seen, others = observed
        if opened is not None:
            gates = gates_of(adapters)
            _close(gates, _values(gates), opened)
        if self._averages:
            update_moving_average_([a.get_buffer("sensitivity_gate") for a in adapters], seen, _MEMORY)
        if self.budget is not None and (self.score != "singular" or self._cuts(step.index, step.total)):
            account = Account.of(self.budget, adapters)
            allowed = self._allowed(account, step.index, step.total)
            if allowed < account.dense and self.score == "singular":
                cut(adapters, account, allowed, step.optimizer)
            elif allowed < account.dense:
                self._choose(adapters, account, allowed, stay=opened is not None)
        super().after_step(adapters, step, others)

    def _choose(self, adapters: Sequence[LowRankAdapter], account: Account, allowed: int, stay: bool) -> None:
        gates = gates_of(adapters)
        values = _values(gates)
        sizes = [gate.numel() for gate in gates]
        scores = self._scores(adapters, values)
        trained = [gate.requires_grad for gate in gates]
        highest = torch.cat([s for s, own in zip(scores.split(sizes), trained, strict=True) if own]).amax()
        if not all(trained):  # gates that the user froze stay, and are paid for first
            parts = zip(scores.split(sizes), values.split(sizes), trained, strict=True)
            scores = torch.cat([s if own else torch.where(v == 0, s, math.inf) for s, v, own in parts])
        if stay:  # ranks at zero come after all others
            scores = scores.masked_fill(values == 0, -1.0)
        kept = within_budget(scores, account.costs, sizes, allowed)
        kept |= highest == 0  # scores tell no ranks apart before B has moved
        _close(gates, values, kept)

    def _scores(self, adapters: Sequence[LowRankAdapter], gates: Tensor) -> Tensor:
        if self._averages:
            return torch.cat([a.get_buffer("sensitivity_gate") for a in adapters])
        norms_A = per_rank([a.lora_A.detach() for a in adapters], _norms)
        scales = [a.scale for a in adapters]
        scaled = torch.cat(torch._foreach_mul(list(gates.abs().split([len(a.lora_A) for a in adapters])), scales))
        return scaled * norms_A * per_rank([a.lora_B_t.detach() for a in adapters], _norms)

    @property
    def _cuts_later(self) -> bool:
        """Whether ranks are cut after ``end``, too: by scores that are there at every step."""
        return self.score != "singular"

    @property
    def _gates_learn(self) -> bool:
        """Whether the loss moves gates."""
        return True

    @property
    def _averages(self) -> bool:
        """Whether sensitivities are averaged."""
        return self.budget is not None and self.score == "sensitivity"

    def _holds(self, step: Step) -> bool:
        """Whether gates that are zero before the step are zero after it, unless it is one that chooses."""
        never_return = self.budget is not None and self.score == "singular"
        return never_return or self._ranks_stay(step.index, step.total)

    def _cuts(self, step: int, total: int | None) -> bool:
        """Whether singular values are cut after the step: at ``end``, and at equal distances before it."""
        last = decided_at(self.end, total)
        distance = max(1, math.ceil((last - resolve_step(self.begin, length_of(total))) / _CUTS))
        return step <= last and (last - step) % distance == 0


def _values(gates: Sequence[nn.Parameter]) -> Tensor:
    return torch.cat([gate.detach() for gate in gates])


def _close(gates: Sequence[nn.Parameter], values: Tensor, kept: Tensor) -> None:
    """Give gates these values, and zero where they are not kept."""
    sizes = [gate.numel() for gate in gates]
    torch._foreach_copy_([gate.detach() for gate in gates], list(values.masked_fill(~kept, 0.0).split(sizes)))


def _silence(gates: Sequence[nn.Parameter], opened: Tensor) -> None:
    """Take the gradients of gates that stay closed out of the norm by which all gradients are clipped."""
    masks = opened.to(gates[0].dtype).split([gate.numel() for gate in gates])
    held = [(gate.grad, mask) for gate, mask in zip(gates, masks, strict=True) if gate.grad is not None]
    if held:
        torch._foreach_mul_([grad for grad, _ in held], [mask for _, mask in held])


def _norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms
