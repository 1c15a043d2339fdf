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
from lit_sparse.functional import cubic_density, resolve_step, sensitivities, update_moving_average_, within_budget
from lit_sparse.methods.account import Account, is_trained, open_gates, parse_budget
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.schedule import FIRST_SCORES, decided_at, length_of, require_end, require_points
from lit_sparse.methods.spectrum import cut
from lit_sparse.methods.step import Run, Step

Score = Literal["singular", "norm", "sensitivity"]

_MEMORY = 0.8
"""β of the moving average of a gate's sensitivity."""

_CUTS = 32
"""Into how many cuts the schedule is divided for singular values, each of which decomposes every adapter."""


@dataclass(eq=False, repr=False, kw_only=True)
class Budgets(SparseMethod):
    """Methods with gates that can be given a budget, for which the ranks of all layers compete.

    A rank of a layer costs the d_in + d_out numbers of its row of A and column of B. The budget falls from all ranks at
    ``begin`` to its final value at ``end``. Ranks are taken by score, the highest first, as long as the budget lasts,
    and the gates of all others are set to zero. Nothing else pulls at a gate, so that ranks which survive do not
    shrink. From ``end`` on the choice stays, and what is left is trained on.

    Until ``end``, the objective is the loss under the constraint that the ranks cost no more than the budget. After the
    optimizer's step on the loss, the step here is the proximal map of the constraint's indicator: the projection onto
    it. With the score ``singular``, the distance is the Frobenius norm of what changes in the weights,
    Σ ‖Z − scale · B diag(g) A‖² over all layers, and the projection cuts singular values (Eckart and Young). With the
    others it is Σ_k w_k (z_k − g_k)² over the gates, where w_k g_k² is the square of the score ``norm``, or the score
    ``sensitivity`` itself: ranks are cut as they are. Where layers cost differently the exact projection is a knapsack,
    and the step is a greedy approximation (:func:`~lit_sparse.functional.within_budget`). From ``end`` on, the
    objective is the loss alone, over the ranks that are left.

    Args:
        budget: What may be left of the adapters: a share in (0, 1] of the parameters that A and B start with;
            parameters, such as ``20000``, ``500k`` or ``1.2M``; or bytes of them, such as ``2MB``, in the dtype of the
            adapters, which PEFT's file has, too. Units are decimal. Gates do not count, since exports fold them into B,
            nor do modules trained whole, the header of the file, and the zeros that pad all layers to one rank in
            exports for engines (``layout: padded``).
        score: What decides which ranks live. ``singular``: the ranks of a layer are turned into the singular directions
            of its update, without a change of the function, and the smallest σ / √c of all layers are cut, where c is
            what a rank costs. A closed rank does not come back. Gates are not trained, unless they have a ``gate_lr``:
            they are 1 or 0, and until the first cut the run is that of a LoRA. ``norm``: scale · |g| ‖A_k‖ ‖B_k‖, the
            Frobenius norm of what a rank adds to the weight, after every step. ``sensitivity``: the moving average of
            |g ∂L/∂g|, so that the step raises the loss least, to first order. With the last two, a rank at zero may
            come back until ``end``, but seldom does.
        begin: Until when all ranks are kept: a number of optimizer steps, or with a decimal point a share of the run.
            The first choice is made at the third step at the earliest, since all scores are zero while B is. The
            default is that of ``end``: all is cut at once. Give 0.1 with ``norm`` and ``sensitivity``.
        end: From when on the budget holds and the choice of ranks stays, in the same units. A resumed run with another
            length has another schedule, and one with a larger budget gets back no rank after ``end``. ``score``,
            ``begin`` and ``end`` count with ``budget`` only.
    """

    budget: float | str | None = None
    score: Score = "singular"
    begin: int | float = 0.5
    end: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("score", self.score, ("singular", "norm", "sensitivity"))
        require_points(self.begin, self.end)
        if self.budget is not None:
            parse_budget(self.budget)

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

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the budget against the adapters, and its schedule against the run."""
        warnings = super().check(adapters, run)
        if self.budget is None:
            return warnings
        require_end(self.begin, self.end, run.total)
        account = Account.of(self.budget, adapters)
        account.require_possible()
        self._allowed(account, 0, run.total)  # raises when begin lies after end
        return warnings + (self._warn_of_rest(adapters, account) if self._ranks_stay(run.done + 1, run.total) else [])

    def _warn_of_rest(self, adapters: Sequence[LowRankAdapter], account: Account) -> list[str]:
        """Warn if a run that is resumed when ranks stay has another budget than before."""
        ranks = open_gates(adapters)
        held = account.spent(ranks)
        if held > account.limit and self.score == "singular":
            return [
                f"The ranks that are left hold {held:,} {account.unit}, more than the budget of {account.limit:,}, and "
                f"nothing is cut after end={self.end}. Resume from an earlier checkpoint, or raise end."
            ]
        closed = [a.copies * a.max_rank > n and is_trained(a) for a, n in zip(adapters, ranks, strict=True)]
        if not any(c and cost <= account.limit - held for c, cost in zip(closed, account.costs, strict=True)):
            return []
        return [
            f"The budget is {account.limit:,} {account.unit}, but the ranks that are left hold {held:,}, and the "
            f"others do not come back after end={self.end}. Resume from an earlier checkpoint, or raise end."
        ]

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

    def goal(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The budget in parameters or bytes; raises UsageError if it is impossible."""
        if self.budget is None:
            return super().goal(adapters)
        account = Account.of(self.budget, adapters)
        account.require_possible()
        others = super().goal(adapters)
        return (
            f"The budget leaves at most {account.limit:,} of {account.dense:,} {account.unit} of A and B from "
            f"end={self.end} on."
        ) + (f" {others}" if others else "")

    def settled_after(self, total: int) -> int:
        """The first step after which the budget holds, or after which ranks stay."""
        settled, stay = super().settled_after(total), self.ranks_stay_after(total)
        return settled if stay is None else max(settled, min(stay, total))

    def ranks_stay_after(self, total: int | None) -> int | None:
        """The step of ``end``, if there is a budget."""
        if self.budget is None:
            return super().ranks_stay_after(total)
        return decided_at(self.end, total)

    def is_final(self, step: int, total: int | None, at_end: bool) -> bool:
        """Whether adapters are as sparse as this method makes them in the run: from when on ranks stay, if they do."""
        stay = self.ranks_stay_after(total)
        if stay is None:
            return super().is_final(step, total, at_end)
        return step >= stay and super().is_final(step, total, at_end=True)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that ended above its budget."""
        if self.budget is None:
            return super().shortfall(adapters)
        account = Account.of(self.budget, adapters)
        held = account.spent(open_gates(adapters))
        if held <= account.limit:
            return super().shortfall(adapters)
        return (
            f"The adapters hold {held:,} {account.unit}, more than the budget of {account.limit:,}: the run ended "
            f"before the budget held (begin={self.begin}, end={self.end}). Train longer, or lower end."
        )

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

    def _ranks_stay(self, step: int, total: int | None) -> bool:
        """Whether gates at zero stay there in this step."""
        after = self.ranks_stay_after(total)
        return after is not None and step > after

    def _allowed(self, account: Account, step: int, total: int | None) -> int:
        """What the ranks may cost together after ``step``."""
        share = cubic_density(step, length_of(total), account.limit / account.dense, self.begin, self.end)
        if step < FIRST_SCORES:
            return account.dense
        if self._ranks_stay(step + 1, total):
            return account.limit
        return max(account.limit, math.floor(share * account.dense))


def gates_of(adapters: Sequence[LowRankAdapter]) -> list[nn.Parameter]:
    """The gates of all adapters that have them."""
    return [adapter.gate for adapter in adapters if adapter.gate is not None]


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
