"""SoRA (Ding et al. 2023): gates on the ranks, zeroed by a proximal step after every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.errors import UsageError
from lit_sparse.functional import (
    optimizer_metric_threshold,
    released_threshold_,
    soft_threshold_,
)
from lit_sparse.methods.base import GateInit, InitWeights, Overrides, Run, SparseMethod, Step

Operator = Literal["soft", "released"]
Metric = Literal["euclidean", "optimizer"]


class ProximalGates:
    """The gates of a method: their optimizer group, their penalty and the proximal step on them.

    The arguments are those of :class:`SoRA`.
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
            for strength in sorted({self._strength(adapter) for adapter in adapters}):
                alike = _gates([adapter for adapter in adapters if self._strength(adapter) == strength])
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
            if gate is not None and gate in step.group_of:  # a gate frozen by the user is in no optimizer
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


class SoRA(SparseMethod):
    """Sparse low-rank adaptation: ``y = W0 x + b + alpha/rank · B (g ∘ (A x))``, the gate g learned to be sparse.

    After every optimizer step, each gate entry is moved towards zero by a threshold t and stays at zero when
    |g| ≤ t. Exactly one of ``threshold`` and ``sparsity_weight`` sets t, and they differ when the learning
    rate decays: with ``sparsity_weight`` the pull fades together with the lr that could resist it (proximal
    gradient for λ‖g‖₁, the paper's rule); with a constant ``threshold`` it does not, so that at the end of a
    run every gate only shrinks. A gate at zero may come back, unless ``freeze_zero_after`` is set.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names.
        rank: Largest rank r_max; gates only ever remove ranks.
        alpha: Numerator of the scale alpha / rank; 16 as in the released runs.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        threshold: ξ, the constant threshold of the released code, in units of the gate, per step.
        sparsity_weight: λ, the weight of ‖g‖₁; the threshold of a step is lr · λ. Adam moves a gate by about lr at
            most, so that from λ = 1 on every gate shrinks whatever the data say, and the largest at the start survive;
            below 1, those survive that the loss pushes outward.
        l1_weight: Adds ``l1_weight · mean|g|`` over all gates to the loss, by its subgradient, before
            gradients are clipped (``sparse_lambda`` in the released code).
        operator: ``soft``: the proximal map of |g|. ``released``: the released code's, which after
            shrinking by t zeroes everything below t again, so that |g| < 2t vanishes.
        metric: ``euclidean``: one threshold for all gates, the paper's rule. ``optimizer``: the exact
            proximal map in Adam's own metric, with the threshold lr · λ / (√v̂ + ε) for each entry.
        gate_lr: Learning rate of the gates; None: that of the other parameters. A short run needs a larger one: a gate
            of size 1 takes 1 / (lr · λ) steps to zero.
        freeze_zero_after: Number of consecutive steps at zero after which a gate stays there for good;
            None: never.
        layers: Numbers of the transformer blocks to adapt; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output.
        init_weights: ``lora``: A random and B zero. ``pissa``: A and B take the largest singular values out of the
            frozen weight (Meng et al. 2024, arXiv:2404.02948), which is changed for that: only the rest of it stays
            frozen. A rank whose gate reaches zero is then lost to the model; gate_init must be ``ones``.
        gate_init: ``gaussian``: N(0, 1), as released. ``ones``: at the start the adapter is LoRA's, exactly.
        overrides: Other settings for some layers: trailing name parts or a regular expression, to rank, alpha, and
            threshold or sparsity_weight, such as
            ``{"attention.output.dense": {"rank": 16}}``. The first pattern that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range, both or neither of ``threshold`` and
            ``sparsity_weight`` are given, or ``metric="optimizer"`` meets an optimizer other than Adam(W).

    Source:
        Ding et al. 2023 (arXiv:2311.11696) for the method; Yun et al. 2021 (arXiv:2006.07065) for
        ``metric="optimizer"``.
    """

    gated = True
    overridable = (*SparseMethod.overridable, "threshold", "sparsity_weight")

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        rank: int = 8,
        alpha: float = 16,
        dropout: float = 0.0,
        threshold: float | None = None,
        sparsity_weight: float | None = None,
        l1_weight: float = 0.0,
        operator: Operator = "soft",
        metric: Metric = "euclidean",
        gate_lr: float | None = None,
        freeze_zero_after: int | None = None,
        layers: list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
        train_head: bool | list[str] = True,
        use_rslora: bool = False,
        init_weights: InitWeights = "lora",
        gate_init: GateInit = "gaussian",
        overrides: Overrides | None = None,
    ) -> None:
        # Before super(), which looks whether what is overridden is in use.
        self.threshold = threshold
        self.sparsity_weight = sparsity_weight
        super().__init__(
            target_modules,
            rank,
            alpha,
            dropout,
            layers,
            exclude_modules,
            train_head,
            use_rslora,
            init_weights,
            gate_init,
            overrides,
        )
        for values in (overrides or {}).values():
            require_strengths({k: v for k, v in values.items() if k in ("threshold", "sparsity_weight")})
        self.l1_weight = l1_weight
        self.operator = operator
        self.metric = metric
        self.gate_lr = gate_lr
        self.freeze_zero_after = freeze_zero_after
        self._gates = ProximalGates(threshold, sparsity_weight, l1_weight, operator, metric, gate_lr, freeze_zero_after)

    def set_threshold(self, threshold: float) -> None:
        """Go on with another ξ, from the next step on, as the stages of a schedule do."""
        require_strengths({"threshold": threshold})
        self.threshold = self._gates.threshold = threshold

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer in a gated adapter."""
        return self._gates.adopt(super().adapt(layer, overrides))

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:
        """The gates, without weight decay and with their own learning rate."""
        return self._gates.parameter_groups(adapters)

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        return super().mismatch(adapter) or self._gates.mismatch(adapter)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the optimizer, and warn of thresholds that can zero no gate or must zero all."""
        return self._gates.check(adapters, run)

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> None:  # noqa: ARG002
        """Add the penalty's subgradient."""
        self._gates.before_step(adapters)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:  # noqa: ARG002
        """The proximal step."""
        self._gates.after_step(adapters, step)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """Whether no gate became zero."""
        return self._gates.shortfall(adapters)


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
    return optimizer_metric_threshold(
        weight, group["lr"], second_moment, state["step"], group["betas"][1], group["eps"]
    )


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
