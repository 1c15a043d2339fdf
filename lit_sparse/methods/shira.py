"""SHiRA (Bhardwaj et al. 2024): a fixed sparse mask of the weights is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.methods.entries import Entries, by_chance, place
from lit_sparse.methods.gradients import mean_gradients
from lit_sparse.methods.step import Run

Mask = Literal["random", "magnitude", "gradient", "snip"]


@dataclass(eq=False, repr=False, kw_only=True)
class SHiRA(Entries):
    """Sparse high-rank adapters: of every adapted weight, a share of entries is trained, chosen once at the start.

    ``W = W0 + S``, where S has the support of a mask M ∈ {0, 1}ⁿˣᵐ with a share ``changed`` of ones. A step on S is a
    step on W with the gradient M ∘ ∂L/∂W. S starts at zero, and its rank is not bounded.

    Its other arguments are those of :class:`~lit_sparse.methods.entries.Entries` and :class:`~lit_sparse.Method`.

    Args:
        mask: What chooses the entries of each weight. ``magnitude``: the largest |W0| (SHiRA-WM). ``random``: chance
            (SHiRA-Rand). ``gradient``: the largest |G|, where G is the mean gradient of the frozen weight over some
            training batches (SHiRA-Grad). ``snip``: the largest |W0 ∘ G| (SHiRA-SNIP). The last two take their
            batches when training starts (:func:`~lit_sparse.start_from_batches`).
        start_batches: Batches, of each process, whose gradients are averaged for ``gradient`` and ``snip``.

    Raises:
        UsageError: If an argument is outside its range, or a layer is not linear or is quantized.

    Source:
        Bhardwaj et al. 2024 (arXiv:2406.13175), Sec. 3. Its masks by rows and columns (SHiRA-Struct) are left out.
    """

    mask: Mask = "magnitude"
    start_batches: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("mask", self.mask, ("random", "magnitude", "gradient", "snip"))
        require_range("start_batches", self.start_batches, at_least=1)

    def scores(self, weight: Tensor) -> Tensor | None:
        """Magnitudes, or random numbers."""
        if self.mask == "magnitude":
            return weight.abs()
        return by_chance(weight) if self.mask == "random" else None

    @property
    def batch_start(self) -> str | None:
        """The mask, if gradients choose it."""
        return f"mask {self.mask!r}" if self.mask in ("gradient", "snip") else None

    def has_started(self, adapters: Sequence[DeltaLinear]) -> bool:
        """Whether the mask was chosen: until then every adapter has the first entries of its weight."""
        partly = [adapter for adapter in adapters if adapter.size < adapter.in_features * adapter.out_features]
        return not partly or any(adapter.is_placed for adapter in partly)

    def start(
        self,
        model: nn.Module,
        adapters: Mapping[str, DeltaLinear],
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
    ) -> dict[str, int]:
        """Choose the entries by the mean gradient of each frozen weight; gives their numbers."""
        weights = [adapter.weight for adapter in adapters.values()]
        gradients = mean_gradients(model, weights, batches, loss, f"mask {self.mask!r}")
        for adapter in adapters.values():
            gradient = gradients[adapter.weight]
            place(adapter, (gradient * adapter.weight.detach().cpu() if self.mask == "snip" else gradient).abs())
        return {name: adapter.size for name, adapter in adapters.items()}

    def check(self, adapters: Sequence[DeltaLinear], run: Run) -> list[str]:
        """Check that gradients have chosen the mask, if they are to."""
        if self.batch_start and not run.done and not self.has_started(adapters):
            raise UsageError(
                f"{self.batch_start} takes gradients, and none were taken. In a training loop of your own, call "
                "lit_sparse.start_from_batches(model, method, batches) after inject, before the optimizer is made."
            )
        return super().check(adapters, run)
