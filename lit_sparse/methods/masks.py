"""Masks on rows of A and columns of B, chosen by sensitivity, for RoseLoRA and GatedRoseLoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import cubic_density, sensitivities, top_fraction_mask, update_moving_average_
from lit_sparse.functional.piecewise import is_at_hand, piecewise
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.changes import MEASURED_EVERY, Changes
from lit_sparse.methods.schedule import FIRST_SCORES, decided_at, length_of, require_end, require_points
from lit_sparse.methods.step import Run, Step

BROAD_CHANGE = 0.1
"""Largest share of W0's entries that BA may change without a warning that the change is not local."""


@dataclass(eq=False, repr=False, kw_only=True)
class Masks(Changes):
    """Methods that keep the most sensitive entries of A and B, as :class:`~lit_sparse.RoseLoRA`.

    Give ``changed``, for which the rows of all layers compete (:class:`~lit_sparse.methods.changes.Changes`), or
    ``density``, the paper's share of every row.

    Args:
        density: τ, the share of each row of A and column of B that remains, in (0, 1]; rounded down to whole
            entries, at least one. None: 0.05, unless ``changed`` is given.
        begin: t_i, until which everything is kept: a number of optimizer steps, or with a decimal point a
            share of the run.
        end: t_f, from which on ``density`` or ``changed`` holds; in between the share falls with the cube of the
            remaining time. The same units as ``begin``. A resumed run with another length has another schedule.
        beta: Memory of the sensitivity's moving average, in [0, 1); 0.8 as released.
        clamp: Largest size of an entry of A and B, enforced after every step; the released editing runs use
            3e-3. None: no bound.
        update_every: Optimizer steps from one choice of masks to the next; in between the last ones hold, and keep A
            and B sparse after every step. 1 as in the paper; more saves a part of the update's time.
    """

    overridable = (*SparseMethod.overridable, "density")

    density: float | None = None
    beta: float = 0.8
    clamp: float | None = None
    update_every: int = 1

    def __post_init__(self) -> None:
        if self.density is None and self.changed is None:
            self.density = 0.05
        super().__post_init__()
        if self.density is not None and self.changed is not None:
            raise UsageError(
                f"Give changed (a share of all weights) or density (a share of every row); got changed={self.changed} "
                f"and density={self.density}."
            )
        require_range("density", self.density, above=0, at_most=1)
        require_range("beta", self.beta, at_least=0, below=1)
        require_range("clamp", self.clamp, above=0)
        require_range("update_every", self.update_every, at_least=1)
        require_points(self.begin, self.end)

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer in an adapter with average sensitivities, and with masks that hold for several steps.

        Both are rank-major as A and Bᵀ are; sensitivities start at zero.
        """
        adapter = super().adapt(layer, overrides)
        for name, weight in (("A", adapter.lora_A), ("B_t", adapter.lora_B_t)):
            adapter.register_buffer(f"sensitivity_{name}", torch.zeros_like(weight, requires_grad=False))
            if self._holds_masks:
                adapter.register_buffer(f"mask_{name}", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        if self.changed is not None:
            adapter.register_buffer("overlap", torch.ones((), device=adapter.lora_A.device))
        return adapter

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if not hasattr(adapter, "sensitivity_A"):
            return "no sensitivities"
        if self._holds_masks and not hasattr(adapter, "mask_A"):
            return "no masks, which changed and update_every > 1 need"
        if self.changed is not None and not hasattr(adapter, "overlap"):
            return "no measured overlap, which changed needs"
        return super().mismatch(adapter)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the schedule against the run, and warn when BA will not be a local change."""
        require_end(self.begin, self.end, run.total)
        self.density_at(0, run.total)  # raises when begin lies after end
        others = super().check(adapters, run)
        if self.changed is not None:
            return others
        settings = {(self._density(adapter), adapter.rank) for adapter in adapters}
        # A density of 1 asks for no local change.
        sparse = [(1 - (1 - d**2) ** r, d, r) for d, r in settings if d < 1]
        touched, density, rank = max(sparse, default=(0.0, 1.0, 0))
        if touched <= BROAD_CHANGE:
            return others
        return [
            *others,
            f"density {density:g} with rank {rank} lets BA change about {100 * touched:.0f} % of the entries of "
            "each weight, which is no local change. Lower density or rank if locality matters.",
        ]

    def density_at(self, step: int, total: int | None, density: float | None = None) -> float:
        """τ⁽ᵗ⁾: the share kept after ``step`` of ``total`` optimizer steps, where ``density`` is the final one."""
        final = density or self.density or self.changed or 1.0
        return cubic_density(step, length_of(total), final, self.begin, self.end)

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> list[Tensor]:
        """|w · ∂L/∂w| of every A and Bᵀ, from the weights before the step and unclipped gradients (Eq. 3).

        They take as much memory as the gradients do. All else in an update is made for a few layers at a time.
        """
        if self._is_chosen(step):
            return []
        weights = _matrices(adapters)
        # A layer that the loss did not reach has no gradient, and its weights no influence.
        gradients = [torch.zeros_like(w, requires_grad=False) if w.grad is None else w.grad for w in weights]
        return sensitivities(weights, gradients)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """Average the sensitivities (Eq. 4), keep the most sensitive entries (Eq. 8), clamp."""
        if not self._is_chosen(step):
            # The average starts at the first value, as in the released code.
            update_moving_average_(_buffers(adapters, "sensitivity"), observed, 0.0 if step.index == 1 else self.beta)
        by_density: dict[float, list[LowRankAdapter]] = {}
        for adapter in adapters:
            by_density.setdefault(self._density(adapter), []).append(adapter)
        for final, alike in by_density.items():
            density = self.density_at(step.index, step.total, final)
            if density < 1:
                self._mask(alike, step, density)
        if self.clamp is not None:
            weights = [weight.detach() for weight in _matrices(adapters)]
            torch._foreach_clamp_min_(weights, -self.clamp)
            torch._foreach_clamp_max_(weights, self.clamp)

    def _mask(self, adapters: Sequence[LowRankAdapter], step: Step, density: float) -> None:
        """Zero all entries but those chosen now, or at the last update."""
        weights, averages = [weight.detach() for weight in _matrices(adapters)], _buffers(adapters, "sensitivity")
        masks = _buffers(adapters, "mask") if self._holds_masks else None
        # A run must end with the final density.
        is_due = step.index % self.update_every == 0 or step.index == step.total
        if self.changed is None and is_due:
            keep_top_share_(weights, averages, density, masks)
            return
        if self.changed is not None and not self._is_chosen(step) and (is_due or self._is_last(step)):
            self._choose_entries(adapters, step, is_measured=step.index % MEASURED_EVERY < self.update_every)
        _keep_(weights, _buffers(adapters, "mask"))

    @property
    def _holds_masks(self) -> bool:
        """Whether a choice of entries outlives the step that makes it."""
        return self.update_every > 1 or self.changed is not None

    def _density(self, adapter: LowRankAdapter) -> float:
        """τ of one layer, or the share of all weights that may change."""
        return adapter.overrides.get("density", self.density or self.changed or 1.0)

    def settled_after(self, total: int) -> int:
        """The first step after which masks have the final density, or their entries stay."""
        if self.changed is not None:
            return min(decided_at(self.end, total), total)
        steps = range(self.update_every, total + 1, self.update_every)
        settled = (step for step in steps if step >= FIRST_SCORES and self.density_at(step, total, 0.5) == 0.5)
        return next(settled, total)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that ended before anything was masked."""
        sparse = [adapter for adapter in adapters if self._density(adapter) < 1]
        if not sparse or any(bool((w == 0).any()) for w in _matrices(sparse)):
            return super().shortfall(adapters)
        return (
            f"No entry of A or B was zeroed: the run ended before the schedule began (begin={self.begin}, "
            f"end={self.end}), or before any gradient told entries apart. Train longer, or lower begin and end."
        )


def keep_top_share_(
    weights: Sequence[Tensor], scores: Sequence[Tensor], density: float, masks: Sequence[Tensor] | None = None
) -> None:
    """Zero, in every row, all but the ``density`` share with the highest scores.

    Rows of equal width are ranked together, whichever layer they come from. A row with only zero scores is not masked,
    because its scores do not rank its entries. This holds for all rows at first: A has no influence while B is zero,
    and neither have entries of B at zero. Entries zeroed then would never have a sensitivity again.

    Args:
        weights: Matrices of shape ``(rank, width)``, changed in place.
        scores: One matrix per weight, of the same shape.
        density: Share to keep of every row, in (0, 1].
        masks: Boolean matrices of the same shapes, to write the choice into.
    """
    for piece in piecewise(weights):
        mine = [weights[i] for i in piece]
        stacked = torch.cat([scores[i] for i in piece])
        mask = top_fraction_mask(stacked, density, dim=1)
        unseen = stacked.amax(dim=1, keepdim=True) == 0
        if not is_at_hand(unseen) or bool(unseen.any()):
            mask |= unseen
        _multiply_(mine, mask)
        if masks is not None:
            torch._foreach_copy_([masks[i] for i in piece], list(mask.split([len(weight) for weight in mine])))


def _keep_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero all entries but those chosen at the last update."""
    for piece in piecewise(weights):
        _multiply_([weights[i] for i in piece], torch.cat([masks[i] for i in piece]))


def _multiply_(weights: list[Tensor], mask: Tensor) -> None:
    factors = mask.view(torch.uint8).to(weights[0].dtype)  # booleans take several times as long to convert
    torch._foreach_mul_(weights, list(factors.split([len(weight) for weight in weights])))


def _matrices(adapters: Sequence[LowRankAdapter]) -> list[nn.Parameter]:
    return [matrix for adapter in adapters for matrix in (adapter.lora_A, adapter.lora_B_t)]


def _buffers(adapters: Sequence[LowRankAdapter], kind: str) -> list[Tensor]:
    # Not get_buffer, which takes ten times as long: a tenth of an update at rank 8.
    return [getattr(adapter, f"{kind}_{name}") for adapter in adapters for name in ("A", "B_t")]
