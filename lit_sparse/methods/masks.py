"""Masks on rows of A and columns of B, chosen by sensitivity: what RoseLoRA and GatedRoseLoRA share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError
from lit_sparse.functional import cubic_density, sensitivities, top_fraction_mask, update_moving_average_
from lit_sparse.functional.schedules import resolve_step
from lit_sparse.functional.sensitivity import where_finite
from lit_sparse.methods.base import Run, Step

BROAD_CHANGE = 0.1
"""Share of W0's entries that BA may touch before the method is no longer a local change, and says so."""

_FIRST_SCORES = 3
"""The step whose gradients tell entries apart in any run: B moves away from zero at the first step, or at the second
where a warm-up begins at a learning rate of zero."""


class SensitivityMasks:
    """The row and column masks of a method: sensitivities, their average, the density schedule, the clamp.

    The arguments are those of :class:`~lit_sparse.RoseLoRA`.
    """

    def __init__(
        self,
        density: float,
        begin: int | float,
        end: int | float,
        beta: float,
        clamp: float | None,
        update_every: int,
    ) -> None:
        require_density(density)
        if not 0 <= beta < 1:
            raise UsageError(f"beta is the memory of the sensitivity average, in [0, 1); got {beta}.")
        if clamp is not None and not clamp > 0:
            raise UsageError(
                f"clamp bounds the size of entries and must be positive, or None for no bound; got {clamp}."
            )
        if update_every < 1:
            raise UsageError(
                f"update_every counts steps from one choice of masks to the next, >= 1; got {update_every}."
            )
        if type(begin) is type(end) and begin > end:
            raise UsageError(f"begin must not be after end; got begin={begin} and end={end}.")
        for value in (begin, end):
            resolve_step(value, 1)  # raises for what is neither a share of the run nor a number of steps
        self.density, self.begin, self.end, self.beta, self.clamp = density, begin, end, beta, clamp
        self.update_every = update_every

    def adopt(self, adapter: LowRankAdapter) -> LowRankAdapter:
        """Give a new adapter its average sensitivities: rank-major as A and Bᵀ are, starting at zero.

        And, where they hold for several steps, its masks.
        """
        for name, weight in (("A", adapter.lora_A), ("B_t", adapter.lora_B_t)):
            adapter.register_buffer(f"sensitivity_{name}", torch.zeros_like(weight, requires_grad=False))
            if self.update_every > 1:
                adapter.register_buffer(f"mask_{name}", torch.ones_like(weight, dtype=torch.bool, requires_grad=False))
        return adapter

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` lacks what these masks need, or None."""
        if not hasattr(adapter, "sensitivity_A"):
            return "no sensitivities"
        return None if self.update_every == 1 or hasattr(adapter, "mask_A") else "no masks for update_every > 1"

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the schedule against the run, and warn when BA will not be a local change."""
        if run.total is None and (isinstance(self.begin, float) or isinstance(self.end, float)):
            raise UsageError(
                f"begin={self.begin} and end={self.end} are shares of the run, but this run has no end: set the "
                "Trainer's max_epochs or max_steps, or give begin and end as whole numbers of steps."
            )
        self.density_at(0, run.total)  # raises when begin lies after end
        settings = {(self._density(adapter), adapter.rank) for adapter in adapters}
        # Who keeps everything wants no local change.
        sparse = [(1 - (1 - d**2) ** r, d, r) for d, r in settings if d < 1]
        touched, density, rank = max(sparse, default=(0.0, 1.0, 0))
        if touched <= BROAD_CHANGE:
            return []
        return [
            f"density {density:g} with rank {rank} lets BA change about {100 * touched:.0f} % of the entries of "
            "each weight, which is no local change. Lower density or rank if locality matters."
        ]

    def density_at(self, step: int, total: int | None, density: float | None = None) -> float:
        """τ⁽ᵗ⁾: the share kept after ``step`` of ``total`` optimizer steps, where ``density`` is the final one."""
        # A run without an end has begin and end as step numbers (check() saw to it): total is not used.
        final = self.density if density is None else density
        return cubic_density(step, 1 if total is None else total, final, self.begin, self.end)

    def before_step(self, adapters: Sequence[LowRankAdapter]) -> list[Tensor]:
        """|w · ∂L/∂w| of every A and Bᵀ, from the weights before the step and unclipped gradients (Eq. 3)."""
        weights = _matrices(adapters)
        # A layer that the loss did not reach has no gradient, and its weights no influence.
        gradients = [torch.zeros_like(w, requires_grad=False) if w.grad is None else w.grad for w in weights]
        return sensitivities(weights, gradients)

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: list[Tensor]) -> None:
        """Average the sensitivities (Eq. 4), keep the top share of each slice (Eq. 8), clamp."""
        averages = _buffers(adapters, "sensitivity")
        if step.index == 1:
            # The average starts at the first value, as released.
            torch._foreach_copy_(averages, where_finite(observed, averages))
        else:
            update_moving_average_(averages, observed, self.beta)
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
        """Zero all but the chosen entries; those chosen now, or some steps ago."""
        weights, averages = [weight.detach() for weight in _matrices(adapters)], _buffers(adapters, "sensitivity")
        if self.update_every == 1:
            keep_top_share_(weights, averages, density)
            return
        masks = _buffers(adapters, "mask")
        # The end of a run must find the density that its schedule ends with.
        if step.index % self.update_every == 0 or step.index == step.total:
            keep_top_share_(weights, averages, density, masks)
        else:
            _keep_(weights, masks)

    def _density(self, adapter: LowRankAdapter) -> float:
        """τ of one layer."""
        return adapter.overrides.get("density", self.density)

    def settled_after(self, total: int) -> int:
        """The first step after which masks have the final density."""
        steps = range(self.update_every, total + 1, self.update_every)
        settled = (step for step in steps if step >= _FIRST_SCORES and self.density_at(step, total, 0.5) == 0.5)
        return next(settled, total)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that ended before anything was masked."""
        sparse = [adapter for adapter in adapters if self._density(adapter) < 1]
        if not sparse or any(bool((w == 0).any()) for w in _matrices(sparse)):
            return None
        return (
            f"No entry of A or B was zeroed: the run ended before the schedule began (begin={self.begin}, "
            f"end={self.end}), or before any gradient told entries apart. Train longer, or lower begin and end."
        )


def keep_top_share_(
    weights: Sequence[Tensor], scores: Sequence[Tensor], density: float, masks: Sequence[Tensor] | None = None
) -> None:
    """Zero, in every row, all but the ``density`` share with the highest scores.

    Rows of equal width are ranked together, whichever layer they come from. A row all of whose scores are zero stays
    whole: nothing is known of its entries. So are all rows at first, as A has no influence while B is zero and the
    entries of B none while they are; what were zeroed then would have no sensitivity ever after.

    Args:
        weights: Matrices of shape ``(rank, width)``, changed in place.
        scores: One matrix per weight, of the same shape.
        density: Share to keep of every row, in (0, 1].
        masks: Boolean matrices of the same shapes, to write the choice into.
    """
    for indices in _by_width(weights):
        stacked = torch.cat([scores[i] for i in indices])
        mask = top_fraction_mask(stacked, density, dim=1)
        mask |= stacked.amax(dim=1, keepdim=True) == 0
        _multiply_([weights[i] for i in indices], mask)
        if masks is not None:
            torch._foreach_copy_([masks[i] for i in indices], list(mask.split([weights[i].shape[0] for i in indices])))


def _keep_(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero all entries but those that were chosen before."""
    for indices in _by_width(weights):
        _multiply_([weights[i] for i in indices], torch.cat([masks[i] for i in indices]))


def _by_width(weights: Sequence[Tensor]) -> list[list[int]]:
    """Which matrices have equally long rows."""
    found: dict[int, list[int]] = {}
    for index, weight in enumerate(weights):
        found.setdefault(weight.shape[1], []).append(index)
    return list(found.values())


def _multiply_(weights: Sequence[Tensor], mask: Tensor) -> None:
    parts = mask.to(weights[0].dtype).split([weight.shape[0] for weight in weights])
    torch._foreach_mul_(list(weights), list(parts))


def _matrices(adapters: Sequence[LowRankAdapter]) -> list[nn.Parameter]:
    return [matrix for adapter in adapters for matrix in (adapter.lora_A, adapter.lora_B_t)]


def _buffers(adapters: Sequence[LowRankAdapter], kind: str) -> list[Tensor]:
    return [adapter.get_buffer(f"{kind}_{name}") for adapter in adapters for name in ("A", "B_t")]


def require_density(density: float) -> None:
    """Raise a UsageError unless ``density`` is a share of entries."""
    if not 0 < density <= 1:
        raise UsageError(f"density is the share of each row of A and column of B to keep, in (0, 1]; got {density}.")
