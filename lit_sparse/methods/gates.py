"""Gates on ranks, zeroed by a proximal step after every optimizer step, for SoRA and GatedRoseLoRA."""

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
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.functional import optimizer_metric_threshold, released_threshold_, resolve_step, soft_threshold_
from lit_sparse.methods.base import GateInit, SparseMethod
from lit_sparse.methods.budget import Budgets
from lit_sparse.methods.gate_checks import compare_groups, predict, require_adam
from lit_sparse.methods.rank_budget import gates_of
from lit_sparse.methods.step import Run, Step

Operator = Literal["soft", "released"]
Metric = Literal["euclidean", "optimizer"]


@dataclass(eq=False, repr=False, kw_only=True)
class Gates(Budgets):
    """Methods whose ranks have gates that a proximal step zeroes, as those of :class:`~lit_sparse.SoRA`.

    Give exactly one of ``budget``, ``threshold`` and ``sparsity_weight``: how much is to be left, or how hard gates are
    pulled towards zero. The arguments of budgets are those of :class:`~lit_sparse.methods.budget.Budgets`.

    While gates are pulled, the objective is the loss + λ‖g‖₁, where a threshold ξ stands for λ = ξ / lr, plus the term
    of ``l1_weight``. It shrinks the gates that survive, too. In the steps of ``refit`` the objective is the loss alone,
    over the ranks that are left, which undoes the shrinking (debiasing).

    Args:
        threshold: ξ, the constant threshold of SoRA's released code, in units of the gate, per step.
        sparsity_weight: λ, the weight of ‖g‖₁; the threshold of a step is lr · λ. Adam moves a gate by about lr at
            most, so that from λ = 1 on every gate shrinks whatever the data say, and the largest at the start survive;
            below 1, those survive that the loss pushes outward.
        l1_weight: Adds ``l1_weight · mean|g|`` over all gates to the loss, by its subgradient, before
            gradients are clipped (``sparse_lambda`` in the released code).
        operator: ``soft``: the proximal map of |g|. ``released``: the released code's, which after
            shrinking by t zeroes everything below t again, so that |g| < 2t vanishes.
        metric: ``euclidean``: one threshold for all gates, the paper's rule. ``optimizer``: the exact
            proximal map in Adam's own metric, with the threshold lr · λ / (√v̂ + ε) for each entry that Adam stepped.
        gate_lr: Learning rate of the gates; None: that of the other parameters, or with a budget and the score
            ``singular`` no training of gates. A threshold needs a larger one in a short run: a gate of size 1 takes
            1 / (lr · λ) steps to zero.
        freeze_zero_after: Number of consecutive steps at zero after which a gate stays there for good;
            None: never.
        refit: The last part of the run, in which gates at zero stay there and nothing pulls at the others: a number of
            optimizer steps, or with a decimal point a share of the run. 0: gates are pulled until the end, as in the
            paper. With a ``budget``, give ``end`` instead.
        gate_init: ``gaussian``: N(0, 1), as released. ``ones``: at the start the adapter is LoRA's, exactly. None:
            ``ones`` with a budget, else ``gaussian``.

    Source:
        Belloni and Chernozhukov 2013 (arXiv:1001.0188) for ``refit``, there after least squares with an ℓ1 penalty.
    """

    gated = True
    overridable = (*SparseMethod.overridable, "threshold", "sparsity_weight")
    pulls = MappingProxyType({"threshold": "ξ, constant", "sparsity_weight": "λ, threshold lr · λ"})

    threshold: float | None = None
    sparsity_weight: float | None = None
    l1_weight: float = 0.0
    operator: Operator = "soft"
    metric: Metric = "euclidean"
    gate_lr: float | None = None
    freeze_zero_after: int | None = None
    refit: int | float = 0
    gate_init: GateInit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("threshold", "sparsity_weight", "l1_weight"):
            require_range(name, getattr(self, name), at_least=0)
        require_choice("operator", self.operator, ("soft", "released"))
        require_choice("metric", self.metric, ("euclidean", "optimizer"))
        if self.budget is not None:
            self._require_no_pull()
        if self.metric == "optimizer" and self.sparsity_weight is None:
            raise UsageError("metric 'optimizer' scales the threshold by lr · λ: give sparsity_weight, not threshold.")
        require_range("gate_lr", self.gate_lr, above=0)
        require_range("freeze_zero_after", self.freeze_zero_after, at_least=1)
        resolve_step(self.refit, 1)

    def _require_no_pull(self) -> None:
        usual = {"operator": "soft", "metric": "euclidean", "l1_weight": 0.0, "freeze_zero_after": None}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if changed:
            raise UsageError(f"A budget has no threshold to shape: remove {' and '.join(changed)}.")
        if self.refit:
            raise UsageError(
                f"With a budget, ranks stay from end on: give end instead of refit; got refit={self.refit}."
            )

    @property
    def gates_start_at_one(self) -> bool:
        """Whether gates are one at the start, so that the adapter is LoRA's, or drawn from N(0, 1)."""
        return self.budget is not None if self.gate_init is None else super().gates_start_at_one

    def set_threshold(self, threshold: float) -> None:
        """Use this threshold ξ from the next step on."""
        if self.budget is not None:
            super().set_threshold(threshold)
        if self.threshold is None:
            raise UsageError("ThresholdStages sets threshold, and the method has sparsity_weight: give it threshold.")
        self._require_valid(threshold=threshold)
        self.threshold = threshold

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer in a gated adapter, with the buffer that ``freeze_zero_after`` needs."""
        adapter = super().adapt(layer, overrides)
        if self.freeze_zero_after is not None:
            steps = torch.zeros(adapter.lora_A.shape[0], dtype=torch.int32, device=adapter.lora_A.device)
            adapter.register_buffer("steps_at_zero", steps)
        return adapter

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:
        """One group of all gates, without weight decay, which would be a second pull towards zero in other units."""
        group: dict[str, Any] = {"params": gates_of(adapters), "weight_decay": 0.0}
        if self.gate_lr is not None:
            group["lr"] = self.gate_lr
        return [group, *super().parameter_groups(adapters)]

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if self.freeze_zero_after is not None and not hasattr(adapter, "steps_at_zero"):
            return "no count of steps at zero, which freeze_zero_after needs"
        return super().mismatch(adapter)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the optimizer, and warn of thresholds that can zero no gate or must zero all."""
        gates = gates_of(adapters)
        if self.metric == "optimizer":
            require_adam(run.optimizer)
        if self.refit and run.total is None:
            raise UsageError(
                f"refit={self.refit} is the last part of the run, but this run has no end: set the Trainer's "
                "max_epochs or max_steps."
            )
        others = super().check(adapters, run)
        if run.done or not self._gates_learn:
            return others
        pull = "threshold" if self.budget is None else "loss"
        warnings = compare_groups(gates, run.optimizer, self.gate_lr, pull)
        # The thresholds of the optimizer's metric depend on gradients to come.
        if self.budget is None and run.total is not None and self.metric == "euclidean":
            trained = [a for a in adapters if a.gate is not None and a.gate.requires_grad]  # others have no lr
            for strength in sorted({self._strength(adapter) for adapter in trained}):
                alike = gates_of([adapter for adapter in trained if self._strength(adapter) == strength])
                rates = run.learning_rates(alike[0])[: self.ranks_stay_after(run.total)]
                span = (
                    f"{'phase' if self.refit else 'run'} of {len(rates)} steps{' before refit' if self.refit else ''}"
                )
                warnings += predict(alike, self._knob, strength, rates, span)
        return warnings + others

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> Any:
        """Add the subgradient of ``l1_weight · mean|g|`` to the gates' gradients."""
        if self.l1_weight and not self._ranks_stay(step.index, step.total):
            self._add_subgradient(adapters)
        return super().before_step(adapters, step)

    def _add_subgradient(self, adapters: Sequence[LowRankAdapter]) -> None:
        entries = sum(a.copies * a.max_rank for a in adapters if a.gate is not None)  # compaction changes no pull
        trained = [(gate, gate.grad) for gate in gates_of(adapters) if gate.grad is not None]
        if trained:
            signs = torch._foreach_sign([gate.detach() for gate, _ in trained])
            torch._foreach_add_([grad for _, grad in trained], signs, alpha=self.l1_weight / entries)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """The proximal step, with the learning rate that the optimizer step used."""
        if self.budget is None and not self._ranks_stay(step.index, step.total):
            self._shrink(adapters, step)
        super().after_step(adapters, step, observed)

    def _shrink(self, adapters: Sequence[LowRankAdapter], step: Step) -> None:
        operate_ = soft_threshold_ if self.operator == "soft" else released_threshold_
        alike: dict[tuple[int, float], list[nn.Parameter]] = {}
        for adapter in adapters:
            gate = adapter.gate
            if gate is None or not gate.requires_grad:  # a gate frozen by the user is in no optimizer
                continue
            # Without a gradient the optimizer takes no step on a gate, and its metric has no step to correct.
            if self.metric == "euclidean" or gate.grad is not None:
                alike.setdefault((step.group_of[gate], self._strength(adapter)), []).append(gate)
        for (_, strength), gates in alike.items():
            operate_(gates, self._threshold(gates, strength, step))
        if self.freeze_zero_after is not None:
            _hold_at_zero(adapters, self.freeze_zero_after)

    def ranks_stay_after(self, total: int | None) -> int | None:
        """The last step before ``refit``, or the step of a budget's ``end``."""
        if self.budget is not None or not self.refit or total is None:
            return super().ranks_stay_after(total)
        return max(0, math.ceil(total - resolve_step(self.refit, total)))

    @property
    def _gates_learn(self) -> bool:
        return self.budget is None or self.score != "singular" or self.gate_lr is not None

    def _strength(self, adapter: LowRankAdapter) -> float:
        """ξ or λ of one layer."""
        return adapter.overrides.get(self._knob, getattr(self, self._knob))

    def _threshold(self, gates: list[nn.Parameter], strength: float, step: Step) -> float | Tensor | list[Tensor]:
        if self.threshold is not None:
            return strength
        group = step.group(gates[0])
        if self.metric == "euclidean":
            return group["lr"] * strength  # type: ignore[no-any-return]
        return [_metric_threshold(gate, strength, group, step.optimizer) for gate in gates]


def _metric_threshold(
    gate: nn.Parameter, weight: float, group: dict[str, Any], optimizer: torch.optim.Optimizer
) -> Tensor:
    state = optimizer.state[gate]
    second_moment = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    threshold = optimizer_metric_threshold(
        weight, group["lr"], second_moment, state["step"], group["betas"][1], group["eps"]
    )
    # An entry whose gradients were all zero has not moved: all gates while B is zero, an expert that got no token.
    return threshold.masked_fill(second_moment == 0, 0.0)


def _hold_at_zero(adapters: Sequence[LowRankAdapter], patience: int) -> None:
    counted = [(a.gate, a.get_buffer("steps_at_zero")) for a in adapters if a.gate is not None]
    gates = [gate.detach() for gate, _ in counted]
    counts = [count for _, count in counted]
    flat, seen = torch.cat(gates), torch.cat(counts)
    flat = flat.masked_fill(seen >= patience, 0.0)
    seen = torch.where(flat == 0, seen + 1, 0)
    sizes = [gate.numel() for gate in gates]
    torch._foreach_copy_(gates, list(flat.split(sizes)))
    torch._foreach_copy_(counts, list(seen.to(torch.int32).split(sizes)))
