"""Gates on ranks, zeroed by a proximal step after every optimizer step: what SoRA and GatedRoseLoRA share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError
from lit_sparse.functional import (
    optimizer_metric_threshold,
    released_threshold_,
    soft_threshold_,
)
from lit_sparse.methods.base import Run, Step

Operator = Literal["soft", "released"]
Metric = Literal["euclidean", "optimizer"]


class ProximalGates:
    """The gates of a method: their optimizer group, their penalty and the proximal step on them.

    The arguments are those of :class:`~lit_sparse.SoRA`.
    """

    def __init__(
        self,
        threshold: float | None,
        sparsity_weight: float | None,
        l1_weight: float,
        operator: Operator,
        metric: Metric,
        gate_lr: float | None,
        freeze_zero_after: int | None,
    ) -> None:
        if (threshold is None) == (sparsity_weight is None):
            given = "neither" if threshold is None else "both"
            raise UsageError(
                f"Give exactly one of threshold (ξ, constant) and sparsity_weight (λ, threshold lr · λ); got {given}."
            )
        require_strengths({"threshold": threshold, "sparsity_weight": sparsity_weight, "l1_weight": l1_weight})
        if operator not in ("soft", "released"):
            raise UsageError(f"operator must be 'soft' or 'released'; got {operator!r}.")
        if metric not in ("euclidean", "optimizer"):
            raise UsageError(f"metric must be 'euclidean' or 'optimizer'; got {metric!r}.")
        if metric == "optimizer" and sparsity_weight is None:
            raise UsageError("metric 'optimizer' scales the threshold by lr · λ: give sparsity_weight, not threshold.")
        if gate_lr is not None and not gate_lr > 0:
            raise UsageError(f"gate_lr must be positive, or None for the optimizer's own lr; got {gate_lr}.")
        if freeze_zero_after is not None and freeze_zero_after < 1:
            raise UsageError(f"freeze_zero_after counts steps, at least 1; got {freeze_zero_after}.")
        self.threshold, self.sparsity_weight, self.l1_weight = threshold, sparsity_weight, l1_weight
        self.operator, self.metric = operator, metric
        self.gate_lr, self.freeze_zero_after = gate_lr, freeze_zero_after

    def adopt(self, adapter: LowRankAdapter) -> LowRankAdapter:
        """Give a new adapter the buffer that :attr:`freeze_zero_after` needs."""
        if self.freeze_zero_after is not None:
            steps = torch.zeros(adapter.lora_A.shape[0], dtype=torch.int32, device=adapter.lora_A.device)
            adapter.register_buffer("steps_at_zero", steps)
        return adapter

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:
        """One group of all gates: no weight decay, which is a second pull towards zero in other units."""
        group: dict[str, Any] = {"params": _gates(adapters), "weight_decay": 0.0}
        if self.gate_lr is not None:
            group["lr"] = self.gate_lr
        return [group]

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` lacks what these gates need, or None."""
        if self.freeze_zero_after is not None and not hasattr(adapter, "steps_at_zero"):
            return "no count of steps at zero, which freeze_zero_after needs"
        return None

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the optimizer, and warn of thresholds that can zero no gate or must zero all."""
        gates = _gates(adapters)
        if self.metric == "optimizer":
            _require_adam(run.optimizer)
        if run.done:
            return []
        warnings = self._compare_groups(gates, run.optimizer)
        if run.total is not None and self.metric == "euclidean":  # else the thresholds depend on gradients to come
            trained = [a for a in adapters if a.gate is not None and a.gate.requires_grad]  # others have no lr
            for strength in sorted({self._strength(adapter) for adapter in trained}):
                alike = _gates([adapter for adapter in trained if self._strength(adapter) == strength])
                warnings += self._foretell(alike, strength, run.learning_rates)
        return warnings

    def before_step(self, adapters: Sequence[LowRankAdapter]) -> None:
        """Add the subgradient of ``l1_weight · mean|g|`` to the gates' gradients."""
        if not self.l1_weight:
            return
        gates = _gates(adapters)
        entries = sum(a.copies * a.max_rank for a in adapters if a.gate is not None)  # compaction changes no pull
        trained = [(gate, gate.grad) for gate in gates if gate.grad is not None]
        if trained:
            signs = torch._foreach_sign([gate.detach() for gate, _ in trained])
            torch._foreach_add_([grad for _, grad in trained], signs, alpha=self.l1_weight / entries)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> None:
        """The proximal step, with the learning rate that the optimizer step used."""
        operate_ = soft_threshold_ if self.operator == "soft" else released_threshold_
        alike: dict[tuple[int, float], list[nn.Parameter]] = {}
        for adapter in adapters:
            gate = adapter.gate
            if gate is None or gate not in step.group_of:  # a gate frozen by the user is in no optimizer
                continue
            # Without a gradient the optimizer takes no step on a gate, and its metric has no step to correct.
            if self.metric == "euclidean" or gate.grad is not None:
                alike.setdefault((step.group_of[gate], self._strength(adapter)), []).append(gate)
        for (_, strength), gates in alike.items():
            operate_(gates, self._threshold(gates, strength, step))
        if self.freeze_zero_after is not None:
            _hold_at_zero(adapters, self.freeze_zero_after)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that zeroed no gate."""
        gates = [gate.detach() for gate in _gates(adapters)]
        if any(a.rank < a.max_rank for a in adapters) or any(bool((gate == 0).any()) for gate in gates):
            return None
        smallest = min(float(gate.abs().min()) for gate in gates)
        return (
            f"No gate became zero: all {sum(g.numel() for g in gates)} ranks remain, the smallest |gate| is "
            f"{smallest:.2g}. Raise {self._knob}, or train longer."
        )

    @property
    def _knob(self) -> str:
        return "threshold" if self.threshold is not None else "sparsity_weight"

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

    def _compare_groups(self, gates: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[str]:
        """An optimizer built without :meth:`parameter_groups` knows nothing of ``gate_lr``, and may decay gates."""
        held = {gate for gate in gates if gate.requires_grad}
        groups = [group for group in optimizer.param_groups if any(p in held for p in group["params"])]
        rates = [float(group.get("initial_lr", group["lr"])) for group in groups]
        if self.gate_lr is not None and any(rate != self.gate_lr for rate in rates):
            raise UsageError(
                f"gate_lr is {self.gate_lr:g}, but the optimizer holds gates with lr {rates}. Build it from "
                "lit_sparse.parameter_groups(model, method)."
            )
        decays = [group["weight_decay"] for group in groups if group.get("weight_decay")]
        if decays:
            return [
                f"The optimizer's weight decay {decays} pulls at the gates beside the threshold. Build it from "
                "lit_sparse.parameter_groups(model, method), which exempts them."
            ]
        return []

    def _foretell(
        self, gates: list[nn.Parameter], strength: float, learning_rates: Callable[[nn.Parameter], Sequence[float]]
    ) -> list[str]:
        """Follow two extreme gates through the run: one at 1 that is only pulled, one that Adam only pushes.

        An Adam step moves a gate by about its lr at most. The threshold is hopeless when the pull alone cannot
        take a gate from 1 to 0, and destructive when even the largest gate, pushed outward by lr at every
        step, ends at 0.
        """
        rates = learning_rates(gates[0])
        knob = self._knob
        pulls = [strength if knob == "threshold" else lr * strength for lr in rates]
        largest = float(torch.cat([gate.detach().flatten() for gate in gates]).abs().max())
        for lr, pull in zip(rates, pulls, strict=True):
            largest = max(0.0, largest + lr - pull)
        if sum(pulls) < 1:
            return [
                f"{knob} {strength:g} pulls a gate towards zero by {sum(pulls):.2g} in the whole run of {len(rates)} "
                f"steps, so that by itself it cannot zero a gate of size 1. Raise {knob}, or train longer."
            ]
        if largest == 0:
            return [
                f"{knob} {strength:g} pulls every gate to zero within the run of {len(rates)} steps, even one that the "
                f"optimizer always pushes outward. Lower {knob}, or raise the learning rate of the gates."
            ]
        return []


def require_strengths(values: Mapping[str, float | None]) -> None:
    """Raise a UsageError unless all that are given are finite and not negative."""
    for name, value in values.items():
        if value is not None and not 0 <= value < float("inf"):
            raise UsageError(f"{name} must be a finite number of at least 0; got {value}.")


def _gates(adapters: Sequence[LowRankAdapter]) -> list[nn.Parameter]:
    return [adapter.gate for adapter in adapters if adapter.gate is not None]


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


def _require_adam(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
        raise UsageError(
            f"metric 'optimizer' is the metric of Adam and AdamW; the optimizer is {type(optimizer).__name__}. Use one "
            "of them, or metric 'euclidean'."
        )


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
