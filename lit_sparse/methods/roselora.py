"""RoseLoRA (Wang et al. 2024): rows of A and columns of B kept sparse by sensitivity."""

from __future__ import annotations

from dataclasses import dataclass

from lit_sparse.methods.masks import Masks


@dataclass(eq=False, repr=False, kw_only=True)
class RoseLoRA(Masks):
    """Row- and column-wise sparse LoRA: every row of A and column of B keeps its most sensitive entries.

    After every optimizer step the entries with the smallest average sensitivity |w · ∂L/∂w| are zeroed, so
    that at most ``density`` of each row of A and of each column of B remains, and with it only about
    1 − (1 − density²)^rank of the frozen weight's entries are changed.

    Its other arguments are those of :class:`~lit_sparse.methods.masks.Masks` and :class:`~lit_sparse.SparseMethod`.

    Args:
        alpha: Numerator of the scale alpha / rank; None: equal to rank, as the paper's equation has no scale.

    Raises:
        UsageError: If an argument is outside its range, ``begin`` lies after ``end``, or they are shares of a
            run without end.

    Source:
        Wang et al. 2024 (arXiv:2406.10777), Eqs. (3), (4), (6), (8).
    """

    @property
    def acts_by_rank(self) -> bool:
        """True unless ``changed`` lets the entries of all layers compete."""
        return self.changed is None
