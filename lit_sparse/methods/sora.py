"""SoRA (Ding et al. 2023): gates on the ranks, zeroed by a proximal step after every optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.methods.base import GateInit, InitWeights, Overrides, Run, SparseMethod, Step
from lit_sparse.methods.gates import Metric, Operator, ProximalGates, require_strengths


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
            proximal map in Adam's own metric, with the threshold lr · λ / (√v̂ + ε) for each entry that Adam stepped.
        gate_lr: Learning rate of the gates; None: that of the other parameters. A short run needs a larger one: a gate
            of size 1 takes 1 / (lr · λ) steps to zero.
        freeze_zero_after: Number of consecutive steps at zero after which a gate stays there for good;
            None: never.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
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
        layers: int | list[int] | None = None,
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
