"""LoRA (Hu et al. 2021): the dense baseline on the same layer."""

from __future__ import annotations

from dataclasses import dataclass

from lit_sparse.methods.start import Start


@dataclass(eq=False, repr=False, kw_only=True)
class LoRA(Start):
    """Low-rank adapters that stay dense: what the sparse methods are compared with.

    Its other arguments are those of :class:`~lit_sparse.methods.start.Start` and :class:`~lit_sparse.SparseMethod`.

    Args:
        alpha: Numerator of the scale alpha / rank of the adapter's output; None: equal to rank, scale 1.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.

    Source:
        Hu et al. 2021 (arXiv:2106.09685).
    """

    alpha: float | None = 16

    @property
    def acts_by_rank(self) -> bool:
        """True unless A and B start from the weights or their gradients."""
        return self.init_weights == "lora"
