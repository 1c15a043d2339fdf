"""SoRA (Ding et al. 2023): gates on the ranks, zeroed by a proximal step after every optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from lit_sparse.methods.gates import Gates
from lit_sparse.methods.rank_budget import DEFAULT_BUDGET
from lit_sparse.methods.start import Start


@dataclass(eq=False, repr=False, kw_only=True)
class SoRA(Gates, Start):
    """Sparse low-rank adaptation: ``y = W0 x + b + alpha/rank · B (g ∘ (A x))``, the gate g learned to be sparse.

    With a ``budget``, the gates of the ranks that it does not pay for are set to zero after every optimizer step, and
    those of the others are left to the loss (:class:`~lit_sparse.methods.budget.Budgets`). It is 0.25 if neither a
    budget nor a threshold is given.

    Otherwise each gate entry is moved towards zero by a threshold t after every optimizer step, and stays at zero when
    |g| ≤ t. Either ``threshold`` or ``sparsity_weight`` sets t, and they differ when the learning
    rate decays: with ``sparsity_weight`` the pull fades together with the lr that could resist it (proximal
    gradient for λ‖g‖₁, the paper's rule); with a constant ``threshold`` it does not, so that at the end of a
    run every gate only shrinks. A gate at zero may come back, unless ``freeze_zero_after`` is set. In the last part
    of a run, ``refit``, none comes back, and the ranks that are left train on without a threshold.

    Its other arguments are those of :class:`~lit_sparse.methods.gates.Gates`,
    :class:`~lit_sparse.methods.start.Start` and :class:`~lit_sparse.SparseMethod`.

    Args:
        alpha: Numerator of the scale alpha / rank, 16 as in the released runs; None: equal to rank, scale 1.

    Raises:
        UsageError: If an argument is outside its range, more than one of ``budget``, ``threshold`` and
            ``sparsity_weight`` is given, or ``metric="optimizer"`` meets an optimizer other than Adam(W).

    Source:
        Ding et al. 2023 (arXiv:2311.11696) for the method; Yun et al. 2021 (arXiv:2006.07065) for
        ``metric="optimizer"``.
    """

    alpha: float | None = 16

    def __post_init__(self) -> None:
        """Take the default budget, and check the arguments."""
        if self.budget is None and self.threshold is None and self.sparsity_weight is None:
            self.budget = DEFAULT_BUDGET
        super().__post_init__()

    @property
    def acts_by_rank(self) -> bool:
        """True unless ranks share a budget or a penalty, or start from the weights or their gradients."""
        return self.init_weights == "lora" and self.budget is None and self.l1_weight == 0
