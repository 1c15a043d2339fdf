"""EVA: principal components of inputs, batch after batch, and ranks by the variance that they explain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_sparse.errors import UsageError

TAU = 0.99
"""A component has converged when a batch leaves this cosine between what it was and what it is, as in PEFT."""


class PrincipalComponents:
    """The principal components of rows that come in parts, by PEFT's incremental PCA.

    Args:
        name: The layer whose inputs the rows are, for errors.
        count: Number of components.

    Raises:
        UsageError: If PEFT is not installed, rows are not finite, or all rows are equal.

    Source:
        Paischer et al. 2024 (EVA, arXiv:2410.07170), as in PEFT 0.21.2 (``peft/tuners/lora/eva.py``).
    """

    def __init__(self, name: str, count: int) -> None:
        try:
            from peft.utils.incremental_pca import IncrementalPCA
        except ImportError as error:
            raise UsageError("init_weights 'eva' needs PEFT: pip install \"lit-sparse[peft]\".") from error

        self.name, self.count, self.rows, self.fitted = name, count, 0, False
        """``fitted`` is whether there were as many rows as components."""
        self.converged = torch.zeros(count, dtype=torch.bool)
        self._pca = IncrementalPCA(n_components=count, copy=True, lowrank=True, lowrank_seed=42)  # as PEFT makes it
        self._waiting: list[Tensor] = []

    def fit(self, rows: Tensor) -> None:
        """Take rows into account, shape ``(rows, features)``. They wait until there are as many as components."""
        if not rows.isfinite().all():
            raise UsageError(
                f"The inputs of {self.name!r} are not finite: init_weights 'eva' cannot start from them. Check the "
                "model on the first training batches."
            )
        self.rows += len(rows)
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) < self.count:
            return
        before = self.vectors if self.fitted else None
        with torch.autocast(rows.device.type, enabled=False):
            self._pca.partial_fit(torch.cat(self._waiting))  # type: ignore[no-untyped-call]
        self._waiting, self.fitted = [], True
        if before is not None:
            self.converged = (F.cosine_similarity(self.vectors, before) >= TAU).cpu()

    @property
    def vectors(self) -> Tensor:
        """The components, orthonormal rows of shape ``(count, features)``, the one that explains most first."""
        found: Tensor = self._pca.components_
        return found

    @property
    def shares(self) -> Tensor:
        """The share of the variance that each component explains, in main memory."""
        found: Tensor = self._pca.explained_variance_ratio_.float().cpu()
        if not found.isfinite().all():
            raise UsageError(
                f"The inputs of {self.name!r} are all equal, and have no principal components: leave the layer out, "
                "or set init_weights to 'lora'."
            )
        return found


def explained_ranks(ratios: Sequence[Tensor], budget: int) -> list[int]:
    """Divide a number of ranks among layers, by the variance that each further component explains.

    The components of all layers compete by their shares of the variance of their own layer's inputs; among equal
    shares, the earlier layer wins. Every layer has at least one rank. PEFT takes the adapter out of a layer that gets
    none; where it leaves none out, the ranks are the same.

    Args:
        ratios: Shares of variance of each layer, largest first, as many as it may have ranks.
        budget: Ranks of all layers together, at least one for each.

    Source:
        Paischer et al. 2024 (EVA, arXiv:2410.07170), as in PEFT 0.21.2 (``_get_rank_distribution``).

    Example:
        >>> explained_ranks([torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.3, 0.2, 0.2])], budget=4)
        [2, 2]
        >>> explained_ranks([torch.tensor([0.6, 0.4, 0.1]), torch.tensor([0.05, 0.04, 0.03])], budget=4)
        [3, 1]
    """
    shares = [torch.cat([share.new_full((1,), torch.inf), share[1:]]) for share in ratios]
    layers = torch.arange(len(shares)).repeat_interleave(torch.tensor([len(share) for share in shares]))
    order = torch.cat(shares).cpu().argsort(descending=True, stable=True)[:budget]
    counts: list[int] = layers[order].bincount(minlength=len(shares)).tolist()
    return counts
