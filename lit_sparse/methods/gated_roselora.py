"""SoRA's gates and RoseLoRA's masks on one adapter: ranks chosen by gates, entries by sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

from lit_sparse.errors import UsageError
from lit_sparse.methods.budget import Score
from lit_sparse.methods.gates import Gates
from lit_sparse.methods.masks import Masks


@dataclass(eq=False, repr=False, kw_only=True)
class GatedRoseLoRA(Gates, Masks):
    """A row- and column-sparse adapter whose rank is learned: ``y = W0 x + b + alpha/rank · B (g ∘ (A x))``.

    Every step first moves the gates as :class:`~lit_sparse.SoRA` does, then masks A and B as
    :class:`~lit_sparse.RoseLoRA` does. The sensitivities see the gate: the gradient of a rank's row of A and
    column of B is proportional to it. With a ``budget``, ranks compete for it as
    :class:`~lit_sparse.methods.budget.Budgets` says, and masks then leave a share of each rank. With ``changed``, the
    entries of open ranks compete.

    Its other arguments are those of :class:`~lit_sparse.methods.gates.Gates`,
    :class:`~lit_sparse.methods.masks.Masks` and :class:`~lit_sparse.SparseMethod`.

    Args:
        begin: Until when all entries, and with a budget all ranks, are kept: a number of optimizer steps, or with a
            decimal point a share of the run.
        end: From when on ``density`` or ``changed``, and ``budget`` hold, in the same units. A resumed run with another
            length has another schedule.

    Raises:
        UsageError: As :class:`~lit_sparse.SoRA` and :class:`~lit_sparse.RoseLoRA`.

    Source:
        Ding et al. 2023 (arXiv:2311.11696) and Wang et al. 2024 (arXiv:2406.10777); the combination is ours.
    """

    overridable = (*Gates.overridable, "density")

    score: Score = "norm"
    begin: int | float = 0.1
    end: int | float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budget is not None and self.score == "singular":
            raise UsageError(
                "score 'singular' turns whole ranks, and masks keep entries: set score to 'norm' or 'sensitivity'."
            )

    @property
    def acts_by_rank(self) -> bool:
        """True unless ranks share a budget or a penalty, or ``changed`` lets the entries of all layers compete."""
        return self.budget is None and self.changed is None and self.l1_weight == 0
