"""LIFT (Liu et al. 2025): the entries that are largest in the rank-reduced weight are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.delta import DeltaLinear, changed_weight
from lit_sparse.adapters.optimizer_state import move_entries
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.entries import Entries, highest
from lit_sparse.methods.step import Run, Step


@dataclass(eq=False, repr=False, kw_only=True)
class LIFT(Entries):
    """Low-rank informed sparse fine-tuning: the entries are trained that are largest after rank reduction.

    With the singular value decomposition W = U Σ Vᵀ of a weight, and r = ``filter_rank``,

        W_r = Σ_{k ≤ r} σ_k u_k v_kᵀ        M = the share ``changed`` of entries with the largest |W_r|

    and a step on the change S has the gradient M ∘ ∂L/∂W. The largest entries of W itself are other ones, and did worse
    in the paper.

    Its other arguments are those of :class:`~lit_sparse.methods.entries.Entries` and :class:`~lit_sparse.Method`.

    Args:
        changed: The share of each adapted weight that is trained, in (0, 1]; 5 % as in the paper.
        filter_rank: r, the rank of W_r; at most that of W. The released code recommends 128, for models of billions of
            parameters.
        update_every: Optimizer steps from one choice of entries to the next, by the weight of that moment; None: the
            first choice stays. An entry that stays keeps its change and its averages in the optimizer, and a new one
            starts at zero. An entry that leaves gets its pretrained value back. (In the released code it keeps its
            change, so that more and more weights change.) Each choice decomposes every adapted weight.

    Raises:
        UsageError: If an argument is outside its range, or a layer is not linear or is quantized. Under FSDP, which
            shards the weights, when training starts with ``update_every``.

    Source:
        Liu et al. 2025 (arXiv:2506.00772), and the released code.
    """

    changed: float = 0.05
    filter_rank: int = 128
    update_every: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("filter_rank", self.filter_rank, at_least=1)
        require_range("update_every", self.update_every, at_least=1)

    def scores(self, weight: Tensor) -> Tensor:
        """|W_r|."""
        return rank_reduced(weight, self.filter_rank).abs()

    @property
    def moves_entries(self) -> bool:
        """Whether entries are chosen more than once."""
        return self.update_every is not None

    def check(self, adapters: Sequence[DeltaLinear], run: Run) -> list[str]:
        """Refuse sharded weights, which cannot be decomposed, and an optimizer whose averages cannot move."""
        for adapter in adapters if self.update_every is not None else ():
            weight = adapter.base.weight
            if type(weight) not in (nn.Parameter, Tensor) or weight.shape != adapter.weight_shape:
                raise UsageError(
                    "update_every decomposes whole weights, which FSDP shards. Use a single device or ddp, or leave "
                    "update_every out: the first choice of entries then stays."
                )
        return super().check(adapters, run)

    def after_step(self, adapters: Sequence[DeltaLinear], step: Step, observed: Any) -> None:
        """Choose the entries anew, if it is time: not after the last step, which would leave new ones untrained."""
        if self.update_every is not None and step.index % self.update_every == 0 and step.index != step.total:
            for adapter in adapters:
                weight = changed_weight(adapter.base.weight, adapter.values, adapter.indices, adapter.values.dtype)
                sources = adapter.move(highest(self.scores(weight), adapter.size))
                move_entries(step.optimizer, adapter.values, sources)
        super().after_step(adapters, step, observed)

    def settled_after(self, total: int) -> int:
        """The step of the last choice."""
        return 0 if self.update_every is None else (total - 1) // self.update_every * self.update_every


def rank_reduced(weight: Tensor, rank: int) -> Tensor:
    """The nearest matrix of a rank, float32 or better.

    Args:
        weight: A matrix.
        rank: The rank; if the matrix has a smaller one, it is the result.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    left, values, right = torch.linalg.svd(wide, full_matrices=False)
    reduced: Tensor = (left[:, :rank] * values[:rank]) @ right[:rank]
    return reduced
