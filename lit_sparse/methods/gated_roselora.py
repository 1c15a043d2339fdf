"""SoRA's gates and RoseLoRA's masks on one adapter: ranks chosen by gates, entries by sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.methods.base import GateInit, Overrides, Run, SparseMethod, Step
from lit_sparse.methods.gates import Metric, Operator, ProximalGates, require_strengths
from lit_sparse.methods.masks import SensitivityMasks, require_density


class GatedRoseLoRA(SparseMethod):
    """A row- and column-sparse adapter whose rank is learned: ``y = W0 x + b + alpha/rank · B (g ∘ (A x))``.

    Every step first moves the gates as :class:`~lit_sparse.SoRA` does, then masks A and B as
    :class:`~lit_sparse.RoseLoRA` does. The sensitivities see the gate: the gradient of a rank's row of A and
    column of B is proportional to it.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names.
        rank: Largest rank; gates only ever remove ranks.
        alpha: Numerator of the scale alpha / rank; None: equal to rank, as for RoseLoRA.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        threshold: ξ, constant threshold on the gates, in units of the gate, per step.
        sparsity_weight: λ, the weight of ‖g‖₁; the threshold of a step is lr · λ. Give exactly one of the two.
        l1_weight: Adds ``l1_weight · mean|g|`` over all gates to the loss, by its subgradient.
        operator: ``soft`` or ``released``, as for SoRA.
        metric: ``euclidean`` or ``optimizer``, as for SoRA.
        gate_lr: Learning rate of the gates; None: that of the other parameters.
        freeze_zero_after: Number of consecutive steps at zero after which a gate stays there for good;
            None: never.
        density: τ, the share of each row of A and column of B that remains, in (0, 1].
        begin: t_i, until which all entries are kept: optimizer steps, or with a decimal point a share of the
            run.
        end: t_f, from which on ``density`` is kept, in the units of ``begin``.
        beta: Memory of the sensitivity's moving average, in [0, 1).
        clamp: Largest size of an entry of A and B, enforced after every step; None: no bound.
        update_every: Optimizer steps from one choice of masks to the next; in between the last ones hold, and keep A
            and B sparse after every step. 1 as in the paper; more saves a part of the update's time.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output.
        gate_init: ``gaussian``: N(0, 1), as released. ``ones``: at the start the adapter is LoRA's, exactly.
        overrides: Other settings for some layers: trailing name parts or a regular expression, to rank, alpha,
            threshold or sparsity_weight, and density, such as
            ``{"attention.output.dense": {"rank": 16}}``. The first pattern that matches a layer holds for it.

    Raises:
        UsageError: As :class:`~lit_sparse.SoRA` and :class:`~lit_sparse.RoseLoRA`.

    Source:
        Ding et al. 2023 (arXiv:2311.11696) and Wang et al. 2024 (arXiv:2406.10777); the combination is ours.
    """

    gated = True
    overridable = (*SparseMethod.overridable, "threshold", "sparsity_weight", "density")

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
        threshold: float | None = None,
        sparsity_weight: float | None = None,
        l1_weight: float = 0.0,
        operator: Operator = "soft",
        metric: Metric = "euclidean",
        gate_lr: float | None = None,
        freeze_zero_after: int | None = None,
        density: float = 0.05,
        begin: int | float = 0.1,
        end: int | float = 0.8,
        beta: float = 0.8,
        clamp: float | None = None,
        update_every: int = 1,
        layers: int | list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
        train_head: bool | list[str] = True,
        use_rslora: bool = False,
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
            gate_init=gate_init,
            overrides=overrides,
        )
        for values in (overrides or {}).values():
            require_density(values.get("density", density))
            require_strengths({k: v for k, v in values.items() if k in ("threshold", "sparsity_weight")})
        self.l1_weight = l1_weight
        self.operator = operator
        self.metric = metric
        self.gate_lr = gate_lr
        self.freeze_zero_after = freeze_zero_after
        self.density = density
        self.begin = begin
        self.end = end
        self.beta = beta
        self.clamp = clamp
        self.update_every = update_every
        self._gates = ProximalGates(threshold, sparsity_weight, l1_weight, operator, metric, gate_lr, freeze_zero_after)
        self._masks = SensitivityMasks(density, begin, end, beta, clamp, update_every)

    def set_threshold(self, threshold: float) -> None:
        """Go on with another ξ, from the next step on, as the stages of a schedule do."""
        require_strengths({"threshold": threshold})
        self.threshold = self._gates.threshold = threshold

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer in a gated adapter with sensitivities."""
        return self._masks.adopt(self._gates.adopt(super().adapt(layer, overrides)))

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:
        """The gates, without weight decay and with their own learning rate."""
        return self._gates.parameter_groups(adapters)

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        return super().mismatch(adapter) or self._gates.mismatch(adapter) or self._masks.mismatch(adapter)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """The checks and warnings of both."""
        return self._gates.check(adapters, run) + self._masks.check(adapters, run)

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> list[Tensor]:  # noqa: ARG002
        """The gates' penalty, and the sensitivities of this step."""
        self._gates.before_step(adapters)
        return self._masks.before_step(adapters)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """The proximal step on the gates, then average, mask and clamp A and B."""
        self._gates.after_step(adapters, step)
        self._masks.after_step(adapters, step, observed)

    def settled_after(self, total: int) -> int:
        """The first step after which masks have the final density."""
        return self._masks.settled_after(total)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """Whether gates or masks pruned nothing."""
        return self._gates.shortfall(adapters) or self._masks.shortfall(adapters)
