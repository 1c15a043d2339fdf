"""A budget of weights that may change, for which the entries of all layers compete, for RoseLoRA and GatedRoseLoRA."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.statistics import sparsity_of_layer
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import cubic_density
from lit_sparse.functional.changes import Rows, lowest_threshold, union
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.schedule import decided_at, length_of
from lit_sparse.methods.step import Run, Step

MEASURED_EVERY = 32
"""Steps between two measurements of how much the changes of a layer's ranks overlap, each of which forms BA's support.
The overlap moves slowly, and the last choice is measured as it is made."""


@dataclass(eq=False, repr=False, kw_only=True)
class Changes(SparseMethod):
    """Methods that can be told how many weights of the model may change.

    Args:
        changed: The share of the adapted weights that BA may change, over all layers together, in (0, 1]. Every row of
            A and column of B keeps the entries whose sensitivity reaches one threshold, and its most sensitive one in
            any case. The threshold is the lowest with which no more weights change. The share falls from 1 at
            ``begin`` to ``changed`` at ``end``; from then on the choice of entries stays, and what is left is trained
            on. None: ``density`` holds.
    """

    changed: float | None = None
    begin: int | float = 0.1
    end: int | float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("changed", self.changed, above=0, at_most=1)

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check that every rank can keep an entry of A and one of B."""
        self._limit(adapters)
        return super().check(adapters, run)

    def goal(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The number of weights; raises UsageError if it is impossible."""
        limit = self._limit(adapters)
        if limit is None:
            return super().goal(adapters)
        return f"At most {limit:,} of {_adapted(adapters):,} adapted weights change from end={self.end} on."

    def _limit(self, adapters: Sequence[LowRankAdapter]) -> int | None:
        if self.changed is None:
            return None
        limit, ranks = math.floor(self.changed * _adapted(adapters) + 1e-6), sum(len(a.lora_A) for a in adapters)
        if limit < ranks:
            raise UsageError(
                f"changed={self.changed:g} lets {limit:,} of {_adapted(adapters):,} adapted weights change, fewer than "
                f"the {ranks:,} ranks, each of which changes one at least. Raise changed, or lower rank."
            )
        return limit

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run in which more weights change."""
        limit = self._limit(adapters)
        if limit is None:
            return super().shortfall(adapters)
        layers = [sparsity_of_layer(LayerFactors.of("", adapter)) for adapter in adapters]
        found = round(sum(layer.density_BA * layer.adapted_parameters for layer in layers))
        if found <= limit:
            return super().shortfall(adapters)
        return (
            f"{found:,} weights change, more than the {limit:,} of changed={self.changed:g}: the run ended before it "
            f"held (begin={self.begin}, end={self.end}). Train longer, or lower end."
        )

    def _is_chosen(self, step: Step) -> bool:
        """Whether the choice of entries was made in an earlier step, and stays."""
        return self.changed is not None and step.index > decided_at(self.end, step.total)

    def _is_last(self, step: Step) -> bool:
        """Whether the choice that stays is made after this step."""
        return step.index == decided_at(self.end, step.total)

    def _choose_entries(self, adapters: Sequence[LowRankAdapter], step: Step, is_measured: bool) -> None:
        """Write into the masks which entries are kept after this step, and measure the overlap if it is time."""
        last = self._is_last(step)
        share = cubic_density(step.index, length_of(step.total), self.changed or 1.0, self.begin, self.end)
        limit = math.floor(share * _adapted(adapters) + 1e-6)
        of_A, of_B_t = ([adapter.get_buffer(f"sensitivity_{name}") for adapter in adapters] for name in ("A", "B_t"))
        rows = Rows(of_A, of_B_t, _opened(adapters))
        masks_A, masks_B_t = ([adapter.get_buffer(f"mask_{name}") for adapter in adapters] for name in ("A", "B_t"))
        copies = [adapter.copies for adapter in adapters]
        overlaps = [adapter.get_buffer("overlap") for adapter in adapters]

        def measured(threshold: Tensor) -> Tensor:
            rows.mark_(masks_A, masks_B_t, threshold)
            return union(masks_A, masks_B_t, copies)

        if last:
            threshold = lowest_threshold(lambda t: measured(t).sum(), limit, overlaps[0].device)
        else:
            threshold = rows.lowest_threshold(limit, torch.stack(overlaps))
        if is_measured and not last:
            found = rows.changes(threshold) / measured(threshold).clamp(min=1)
            torch._foreach_copy_(overlaps, list(found.clamp(min=1).to(overlaps[0].dtype)))
        rows.mark_(masks_A, masks_B_t, threshold, unseen=not last)


def _adapted(adapters: Sequence[LowRankAdapter]) -> int:
    return sum(a.copies * a.in_features * a.out_features for a in adapters)


def _opened(adapters: Sequence[LowRankAdapter]) -> list[Tensor] | None:
    """Which ranks have open gates, and may change something; None without gates."""
    gates = [gate for gate in (adapter.effective_gate() for adapter in adapters) if gate is not None]
    return list((torch.cat(gates) != 0).split([len(gate) for gate in gates])) if gates else None
