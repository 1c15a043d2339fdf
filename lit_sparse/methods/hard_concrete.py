"""Hard-concrete gates on ranks (Louizos et al. 2018): drawn at random in training, and often exactly zero."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.optimizer_state import mix_rows
from lit_sparse.errors import require_range
from lit_sparse.functional.budget import cost_of_each, within_budget
from lit_sparse.methods.account import Account
from lit_sparse.methods.gate_checks import compare_groups
from lit_sparse.methods.rank_budget import DEFAULT_BUDGET, RankBudget, gates_of
from lit_sparse.methods.step import Run, Step

_BETA, _GAMMA, _ZETA = 2 / 3, -0.1, 1.1
_START = math.log(0.9 / 0.1)  # log α of a drop rate of 0.1 by the release's rule: the adapter is nearly a LoRA's
_SETTLED = 50.0  # log α that no noise moves: u stays 1e-6 away from 0 and 1, as released, and |log u/(1 − u)| below 14
_ASCENT = (0.1, 10.0)  # learning rates of the multipliers; the square is small, and damps the other one
_LAGRANGIAN = ("multiplier", "multiplier_of_square", "target")


@dataclass(eq=False, repr=False, kw_only=True)
class HardConcreteLoRA(RankBudget):
    """L0 regularization of ranks: ``y = W0 x + b + alpha/rank · B (z ∘ (A x))``, with random gates z in training.

    A gate's parameter is log α. In training it is drawn once for each forward pass, with u from U(0, 1). Evaluation,
    logs, reports and exports have its estimate ẑ. β = 2/3, γ = −0.1 and ζ = 1.1 are the paper's::

        s = σ((log u − log(1 − u) + log α) / β),   z = min(1, max(0, s (ζ − γ) + γ))           Eqs. (10), (11)
        P(z ≠ 0) = σ(log α − β log(−γ/ζ)),         ẑ = min(1, max(0, σ(log α) (ζ − γ) + γ))    Eqs. (12), (13)

    p is the expected share of A and B that is left: Σ c P(z ≠ 0) / Σ c, where a rank costs c = d_in + d_out. With
    ``penalty_weight`` λ, the objective is the loss + λ p. With a ``budget`` it is the loss + λ₁ (p − t) + λ₂ (p − t)²,
    where the target t falls from 1 at ``begin`` to the budget at ``end``, and λ₁ and λ₂ ascend from 0. At ``end`` the
    ranks with the largest log α stay, as long as the budget lasts, and the others are closed for good. ẑ is folded into
    B: gates are 1 or 0 from then on, and the objective is the loss.

    Gates are drawn as dropout is, by each process from its own generator: with one seed, as ``seed_everything`` sets
    it, all draw the same. Multipliers depend on log α alone, which is equal in all processes.

    Its other arguments are those of :class:`~lit_sparse.methods.rank_budget.RankBudget` and its base.

    Args:
        alpha: Numerator of the scale alpha / rank of the adapter's output; None: equal to rank, scale 1.
        penalty_weight: λ, in units of the loss: the price of all ranks together. Without it, ``budget`` is 0.25.
        gate_lr: Learning rate of log α: about how far a step of Adam moves it. It starts near 2.2; ẑ is 0 below −2.4.

    Raises:
        UsageError: If an argument is outside its range, or ``budget`` and ``penalty_weight`` are given.

    Source:
        Louizos et al. 2018 (arXiv:1712.01312); Wang et al. 2020 (arXiv:1910.04732) for λ₁ and λ₂; the end is ours.
    """

    gated = True
    pulls = MappingProxyType({"penalty_weight": "λ, the price of all ranks"})

    alpha: float | None = 16
    penalty_weight: float | None = None
    gate_lr: float = 0.1
    begin: int | float = 0.1
    end: int | float = 0.6

    def __post_init__(self) -> None:
        if self.penalty_weight is None and self.budget is None:
            self.budget = DEFAULT_BUDGET
        super().__post_init__()
        require_range("penalty_weight", self.penalty_weight, at_least=0)
        require_range("gate_lr", self.gate_lr, above=0)

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer, with a copy of the Lagrangian's numbers."""
        adapter = super().adapt(layer, overrides)
        nn.init.normal_(adapter.gate, _START, 0.01)  # type: ignore[arg-type]
        for name in _LAGRANGIAN if self.budget is not None else ():
            adapter.register_buffer(name, adapter.lora_A.new_zeros(()))
        return adapter

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        lacks = self.budget is not None and not hasattr(adapter, "multiplier")
        return "no multipliers, which a budget needs" if lacks else super().mismatch(adapter)

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:
        """One group of all log α, without weight decay."""
        group = {"params": gates_of(adapters), "weight_decay": 0.0, "lr": self.gate_lr}
        return [group, *super().parameter_groups(adapters)]

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the optimizer of gates, and the budget."""
        return compare_groups(gates_of(adapters), run.optimizer, self.gate_lr, "loss") + super().check(adapters, run)

    def effective_gate(self, gate: Tensor, training: bool) -> Tensor:
        """Gates z in training, else ẑ."""
        logits = (torch.rand_like(gate).logit(1e-6) + gate) / _BETA if training else gate
        return (logits.sigmoid() * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)

    def penalty(self, adapters: Sequence[LowRankAdapter]) -> Tensor:
        """λ p, or what the Lagrangian adds to the loss."""
        share = self._expected_share(adapters)
        if self.budget is None:
            return share * cast(float, self.penalty_weight)
        linear, of_square, target = (adapters[0].get_buffer(name) for name in _LAGRANGIAN)
        return linear * (share - target) + of_square * (share - target).square()

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """Let the multipliers ascend by the Lagrangian's derivatives, until the ranks that stay are chosen."""
        super().after_step(adapters, step, observed)
        if self.budget is None or self._ranks_stay(step.index, step.total):
            return
        account = Account.of(self.budget, adapters)
        target = self._allowed(account, step.index, step.total) / account.dense
        linear, of_square, targets = ([a.get_buffer(name) for a in adapters] for name in _LAGRANGIAN)
        torch._foreach_copy_(targets, [torch.full_like(targets[0], target)] * len(targets))
        if self._ranks_stay(step.index + 1, step.total):
            self._choose(adapters, account, step.optimizer)
            torch._foreach_zero_([*linear, *of_square])
        elif target < 1:
            excess = self._expected_share(adapters) - target
            torch._foreach_add_(linear, [_ASCENT[0] * excess] * len(linear))
            torch._foreach_add_(of_square, [_ASCENT[1] * excess.square()] * len(linear))

    def _expected_share(self, adapters: Sequence[LowRankAdapter]) -> Tensor:
        account, gates = Account.of(self.budget or 1.0, adapters), gates_of(adapters)
        opened = (torch.cat([*gates]) - _BETA * math.log(-_GAMMA / _ZETA)).sigmoid()
        costs = cost_of_each(tuple(account.costs), tuple(len(gate) for gate in gates), opened.device)
        return (costs * opened).sum() / account.dense

    def _choose(self, adapters: Sequence[LowRankAdapter], account: Account, optimizer: Optimizer) -> None:
        gates = gates_of(adapters)
        sizes = [len(gate) for gate in gates]
        scores = torch.cat([g.detach() if g.requires_grad else torch.full_like(g, math.inf) for g in gates])
        kept = within_budget(scores, account.costs, sizes, account.limit).split(sizes)
        for adapter, gate, own in zip(adapters, gates, kept, strict=True):
            factor = self.effective_gate(gate.detach(), training=False)
            inverse = torch.where(factor > 0, 1 / factor.double(), 0).view(adapter.copies, -1).diag_embed()
            mix_rows(optimizer, adapter.lora_B_t, inverse)  # its gradients grow as it shrinks
            mix_rows(optimizer, gate, torch.zeros_like(inverse))  # it stays, without momentum
            adapter.lora_B_t.mul_(factor.unsqueeze(1))
            gate.fill_(-_SETTLED).masked_fill_(own, _SETTLED)
