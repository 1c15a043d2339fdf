"""The progress of a run and what is left of its adapters: a record in checkpoints, and a sentence for the user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.statistics import LayerSparsity, is_changed, live_ranks_of_all, sparsity_of


@dataclass(frozen=True)
class Progress:
    """The progress of a run.

    Args:
        step: Optimizer steps taken.
        total: Optimizer steps of the whole run, None when the Trainer had no end.
        final: Whether adapters were as sparse as the method makes them in the run.
    """

    step: int
    total: int | None
    final: bool

    def __str__(self) -> str:
        """For example ``step 40 of 100, sparsity not final``."""
        total = "" if self.total is None else f" of {self.total:,}"
        return f"step {self.step:,}{total}, sparsity {'final' if self.final else 'not final'}"

    def record(self, adapters: Sequence[Adapter]) -> dict[str, Any]:
        """Plain values for a file: the fields, live ranks, non-zero parameters, and their share of those at first."""
        entries = sum(adapter.start_size for adapter in adapters)
        factors = [adapter for adapter in adapters if isinstance(adapter, LowRankAdapter)]
        ranks = int(live_ranks_of_all(factors).sum()) if factors else 0
        parameters = int(sparsity_of(adapters)["remaining_parameters"])
        return {**asdict(self), "ranks": ranks, "parameters": parameters, "density": parameters / entries}

    @classmethod
    def of(cls, record: object) -> Progress | None:
        """Read what :meth:`record` returned; None if ``record`` is something else."""
        if not isinstance(record, Mapping) or not {"step", "total", "final"} <= set(record):
            return None
        step, total = record["step"], record["total"]
        if not isinstance(step, int) or not isinstance(total, int | None):
            return None
        return cls(step, total, record["final"] is True)

    @classmethod
    def in_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Progress | None:
        """Read the progress from a checkpoint of a ``SparseModule`` or of any module trained with ``Sparsify``."""
        callbacks = checkpoint.get("callbacks")
        states = list(callbacks.values()) if isinstance(callbacks, Mapping) else []
        holders = [state for state in (checkpoint.get("lit_sparse"), *states) if isinstance(state, Mapping)]
        return next((found for state in holders if (found := cls.of(state.get("progress")))), None)


@dataclass(frozen=True)
class Trained:
    """The size of the adapters at the start of a run. Exports leave out dead ranks and layers without live ranks.

    Args:
        ranks: Ranks of all adapters; 0 for changes without factors.
        weights: Entries of all frozen weights that were adapted.
    """

    ranks: int
    weights: int

    @classmethod
    def of(cls, layers: Sequence[LayerSparsity]) -> Trained:
        """Sum over all layers of a run."""
        return cls(sum(layer.max_rank for layer in layers), sum(layer.adapted_parameters for layer in layers))


def left(layers: Sequence[LayerSparsity], trained: Trained | None = None) -> str:
    """Describe the adapters: ``33,536 parameters in 288 of 296 ranks, 6.15 % of the adapted weights changed``.

    Args:
        layers: At least one layer. Weights in the support of BA count as changed.
        trained: The adapters at the start of the run; None: ``layers`` has all of them.
    """
    began = trained or Trained.of(layers)
    ranks, parameters = sum(layer.rank for layer in layers), sum(layer.remaining_parameters for layer in layers)
    share = 100 * sum(layer.density_BA * layer.adapted_parameters for layer in layers) / began.weights
    held = f" in {ranks:,} of {began.ranks:,} ranks" if began.ranks else ""
    return f"{parameters:,} parameters{held}, {share:.2f} % of the adapted weights changed"


def warn_if_nothing_is_left(adapters: Sequence[Adapter]) -> None:
    """Warn if no adapter changes anything."""
    if adapters and not is_changed(adapters):
        ranked = isinstance(adapters[0], LowRankAdapter)
        rank_zero_warn(
            "No rank is left: the adapters change nothing. Prune less (by a lower threshold or sparsity_weight, or a "
            "higher density), or train longer."
            if ranked
            else "All changes are zero: the adapters change nothing. Train longer."
        )


def sentence(progress: Progress | None, layers: Sequence[LayerSparsity]) -> str:
    """Describe the progress of a run, if it is known, and what is left of its adapters."""
    return left(layers) if progress is None else f"{progress}, {left(layers)}"
