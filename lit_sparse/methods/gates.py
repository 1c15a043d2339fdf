"""Gates on ranks, zeroed by a proximal step after every optimizer step, for SoRA and GatedRoseLoRA."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.functional import optimizer_metric_threshold, released_threshold_, soft_threshold_
from lit_sparse.methods.base import GateInit, SparseMethod
from lit_sparse.methods.budget import Budgets
from lit_sparse.methods.step import Run, Step

Operator = Literal["soft", "released"]
Metric = Literal["euclidean", "optimizer"]


@dataclass(eq=False, repr=False, kw_only=True)
class Gates(Budgets):
    """Methods whose ranks have gates that a proximal step zeroes, as those of :class:`~lit_sparse.SoRA`.

    Give exactly one of ``budget``, ``threshold`` and ``sparsity_weight``: how much is to be left, or how hard gates are
    pulled towards zero. The arguments of budgets are those of :class:`~lit_sparse.methods.budget.Budgets`.

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
        gate_lr: Learning rate of the gates; None: that of the other parameters. A short run needs a larger one: a gate
            of size 1 takes 1 / (lr · λ) steps to zero.
        freeze_zero_after: Number of consecutive steps at zero after which a gate stays there for good;
            None: never.
        gate_init: ``gaussian``: N(0, 1), as released. ``ones``: at the start the adapter is LoRA's, exactly. None:
            ``ones`` with a budget, else ``gaussian``.
    """

    gated = True
    overridable = (*SparseMethod.overridable, "threshold", "sparsity_weight")

    threshold: float | None = None
    sparsity_weight: float | None = None
    l1_weight: float = 0.0
    operator: Operator = "soft"
    metric: Metric = "euclidean"
    gate_lr: float | None = None
    freeze_zero_after: int | None = None
    gate_init: GateInit | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [n for n in ("budget", "threshold", "sparsity_weight") if getattr(self, n) is not None]
        if len(given) != 1:
            raise UsageError(
                "Give exactly one of budget (what is left), threshold (ξ, constant) and sparsity_weight (λ, threshold "
                f"lr · λ); got {' and '.join(given) or 'none'}."
            )
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

    def _require_no_pull(self) -> None:
        usual = {"operator": "soft", "metric": "euclidean", "l1_weight": 0.0, "freeze_zero_after": None}
        changed = [name for name, value in usual.items() if getattr(self, name) != value]
        if changed:
            raise UsageError(f"A budget has no threshold to shape: remove {' and '.join(changed)}.")

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
        group: dict[str, Any] = {"params": _gates(adapters), "weight_decay": 0.0}
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
        gates = _gates(adapters)
        if self.metric == "optimizer":
            _require_adam(run.optimizer)
        others = super().check(adapters, run)
        if run.done:
            return others
        warnings = self._compare_groups(gates, run.optimizer)
        # The thresholds of the optimizer's metric depend on gradients to come.
        if self.budget is None and run.total is not None and self.metric == "euclidean":
            trained = [a for a in adapters if a.gate is not None and a.gate.requires_grad]  # others have no lr
            for strength in sorted({self._strength(adapter) for adapter in trained}):
                alike = _gates([adapter for adapter in trained if self._strength(adapter) == strength])
                warnings += self._predict(alike, strength, run.learning_rates)
        return warnings + others

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> Any:
        """Add the subgradient of ``l1_weight · mean|g|`` to the gates' gradients."""
        if self.l1_weight:
            self._add_subgradient(adapters)
        return super().before_step(adapters, step)

    def _add_subgradient(self, adapters: Sequence[LowRankAdapter]) -> None:
        entries = sum(a.copies * a.max_rank for a in adapters if a.gate is not None)  # compaction changes no pull
        trained = [(gate, gate.grad) for gate in _gates(adapters) if gate.grad is not None]
        if trained:
            signs = torch._foreach_sign([gate.detach() for gate, _ in trained])
            torch._foreach_add_([grad for _, grad in trained], signs, alpha=self.l1_weight / entries)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """The proximal step, with the learning rate that the optimizer step used."""
        if self.budget is None:
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

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that zeroed no gate, or that ended above its budget."""
        gates = [gate.detach() for gate in _gates(adapters)]
        pruned = any(a.rank < a.max_rank for a in adapters) or any(bool((gate == 0).any()) for gate in gates)
        if pruned or self.budget is not None:
            return super().shortfall(adapters)
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
        """Check ``gate_lr`` and weight decay of an optimizer that may be built without :meth:`parameter_groups`."""
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
            pull = "threshold" if self.budget is None else "loss"
            return [
                f"The optimizer's weight decay {decays} pulls at the gates beside the {pull}. Build it from "
                "lit_sparse.parameter_groups(model, method), which exempts them."
            ]
        return []

    def _predict(
        self, gates: list[nn.Parameter], strength: float, learning_rates: Callable[[nn.Parameter], Sequence[float]]
    ) -> list[str]:
        """Simulate two extreme gates: one that starts at 1 and is only pulled, one that Adam always pushes outward.

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
