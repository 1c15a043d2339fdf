"""RoseLoRA (Wang et al. 2024): rows of A and columns of B kept sparse by sensitivity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.methods.base import Overrides, Run, SparseMethod, Step
from lit_sparse.methods.masks import SensitivityMasks, require_density


class RoseLoRA(SparseMethod):
    """Row- and column-wise sparse LoRA: every row of A and column of B keeps its most sensitive entries.

    After every optimizer step the entries with the smallest average sensitivity |w · ∂L/∂w| are zeroed, so
    that at most ``density`` of each row of A and of each column of B remains, and with it only about
    1 − (1 − density²)^rank of the frozen weight's entries are changed.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names.
        rank: Ranks r of every adapter.
        alpha: Numerator of the scale alpha / rank; None: equal to rank, as the paper's equation has no scale.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        density: τ, the share of each row of A and column of B that remains, in (0, 1]; rounded down to whole
            entries, at least one.
        begin: t_i, until which everything is kept: a number of optimizer steps, or with a decimal point a
            share of the run.
        end: t_f, from which on ``density`` is kept; in between the share falls with the cube of the remaining
            time. The same units as ``begin``. A resumed run with another length has another schedule.
        beta: Memory of the sensitivity's moving average, in [0, 1); 0.8 as released.
        clamp: Largest size of an entry of A and B, enforced after every step; the released editing runs use
            3e-3. None: no bound.
        update_every: Optimizer steps from one choice of masks to the next; in between the last ones hold, and keep A
            and B sparse after every step. 1 as in the paper; more saves a part of the update's time.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output.
        overrides: Other settings for some layers: trailing name parts or a regular expression, to rank, alpha and
            density, such as
            ``{"attention.output.dense": {"rank": 16}}``. The first pattern that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range, ``begin`` lies after ``end``, or they are shares of a
            run without end.

    Source:
        Wang et al. 2024 (arXiv:2406.10777), Eqs. (3), (4), (6), (8).
    """

    overridable = (*SparseMethod.overridable, "density")

    def __init__(
        self,
        target_modules: str | list[str] = "all-linear",
        rank: int = 8,
        alpha: float | None = None,
        dropout: float = 0.0,
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
        overrides: Overrides | None = None,
    ) -> None:
        super().__init__(
            target_modules,
            rank,
            alpha,
            dropout,
            layers,
            exclude_modules,
            train_head,
            use_rslora,
            overrides=overrides,
        )
        for values in (overrides or {}).values():
            require_density(values.get("density", density))
        self.density = density
        self.begin = begin
        self.end = end
        self.beta = beta
        self.clamp = clamp
        self.update_every = update_every
        self._masks = SensitivityMasks(density, begin, end, beta, clamp, update_every)

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer in an adapter with sensitivities."""
        return self._masks.adopt(super().adapt(layer, overrides))

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        return super().mismatch(adapter) or self._masks.mismatch(adapter)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the schedule against the run, and warn when BA will not be a local change."""
        return self._masks.check(adapters, run)

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> list[Tensor]:  # noqa: ARG002
        """The sensitivities of this step."""
        return self._masks.before_step(adapters)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """Average, mask, clamp."""
        self._masks.after_step(adapters, step, observed)

    def settled_after(self, total: int) -> int:
        """The first step after which masks have the final density."""
        return self._masks.settled_after(total)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """Whether the run ended before anything was masked."""
        return self._masks.shortfall(adapters)
