"""Gradients of entries that may be trained next, summed over some steps; no dense gradient waits for a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lit_sparse.adapters.delta import DeltaLinear


class Candidates:
    """As many entries of a weight as are trained, with their gradients: a watcher for :meth:`DeltaLinear.watch`.

    The first backward pass chooses those with the largest gradient. Their places and sums are in buffers of the
    adapter, ``candidates`` and ``accumulated``, so that checkpoints have them.

    Args:
        adapter: One that :func:`make_room` prepared.
        anew: Whether the next gradient chooses the candidates; else they are those in the adapter, if there are any.
    """

    def __init__(self, adapter: DeltaLinear, anew: bool) -> None:
        self.adapter = adapter
        places = adapter.get_buffer("candidates")
        if anew:
            places.fill_(-1)
        self.fresh = anew or bool(places[0] < 0)
        """Whether no optimizer step was taken yet that saw the candidates."""
        self.seen: Tensor | None = None
        """Their gradients since the last step, in this process; None if there was no backward pass."""

    def __call__(self, gradient: Tensor) -> None:
        """See the gradient of a backward pass, which may be overwritten."""
        gradient, places = gradient.flatten(), self.adapter.get_buffer("candidates")
        if self.fresh and self.seen is None:
            # Here, layer by layer, and not at the step, when this gradient is gone.
            gradient = _mean(gradient)
            places.copy_(gradient.abs().topk(len(places), sorted=False).indices)
        found = gradient.index_select(0, places).to(self.adapter.values.dtype)
        self.seen = found if self.seen is None else self.seen.add_(found)

    def add(self, gradient: Tensor) -> None:
        """Add the gradients of a step that was taken."""
        accumulated = self.adapter.get_buffer("accumulated")
        accumulated.copy_(gradient if self.fresh else accumulated + gradient)
        self.fresh = False


def make_room(adapter: DeltaLinear) -> None:
    """Give an adapter the buffers of its candidates; the places are -1 until they are chosen."""
    adapter.register_buffer("candidates", torch.full_like(adapter.indices, -1))
    adapter.register_buffer("accumulated", torch.zeros_like(adapter.values, requires_grad=False))


def take_gradients(adapters: Sequence[DeltaLinear]) -> list[tuple[Candidates, Tensor]]:
    """The gradients of a step, in the mean over all processes, of the candidates that had any; they start anew."""
    watching = [a.watcher for a in adapters if isinstance(a.watcher, Candidates)]
    reached = [(candidates, candidates.seen) for candidates in watching if candidates.seen is not None]
    for candidates in watching:
        candidates.seen = None
    if not reached:
        return []
    means = _mean(torch.cat([seen for _, seen in reached])).split([len(seen) for _, seen in reached])
    return [(candidates, mean) for (candidates, _), mean in zip(reached, means, strict=True)]


def _mean(values: Tensor) -> Tensor:
    """The mean over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values
