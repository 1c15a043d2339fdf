"""Gradients of entries that may be trained next, summed over some steps; no dense gradient waits for a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.processes import is_distributed


class Candidates:
    """As many entries of a weight as are trained, with their gradients: a watcher for :meth:`DeltaLinear.watch`.

    The first backward pass chooses those with the largest gradient. All of it is in buffers of the adapter, so that
    checkpoints have it and processes have the same: the places in ``candidates``, the sums of the steps in
    ``accumulated``, and in ``pending`` what belongs to a step that was not yet taken. If ``zero_grad`` drops the
    gradients of that step, they are dropped here too. A gradient scaler multiplies all of them: if it changes its
    factor within a window, some steps count more than others.

    Args:
        adapter: One that :func:`make_room` prepared.
        first: Whether the next optimizer step is the first of those that are summed.
        resumed: Whether the adapter may have candidates of a run that goes on. To look waits for the device, once.
        alone: Whether other processes train models of their own, if there are any.
    """

    def __init__(self, adapter: DeltaLinear, first: bool, resumed: bool, alone: bool) -> None:
        self._places, self._sums, self._pending = (adapter.get_buffer(name) for name in _BUFFERS)
        self._first, self._resumed, self._alone = first, resumed, alone
        self.chosen = False
        """Whether there are candidates; else the next gradient chooses them."""
        self.fresh = True
        """Whether no step was taken yet with these candidates."""
        if not resumed:
            self._places.fill_(-1)

    def resume(self) -> None:
        """Find what a checkpoint brought, once: it may have been loaded after this was made."""
        if self._resumed:
            self._resumed = False
            self.chosen = bool(self._places[0] >= 0) and (not self._first or bool(self._pending.any()))
            self.fresh = self._first or not self.chosen
            if not self.chosen:
                self._places.fill_(-1)
                self._pending.zero_()

    def __call__(self, gradient: Tensor, dropped: bool) -> None:
        """See the gradient of a backward pass, which may be overwritten, and whether earlier ones were dropped."""
        self.resume()
        if dropped:
            self._drop()
        gradient = gradient.flatten()
        if not self.chosen:
            gradient = self._mean(gradient)
            self._places.copy_(gradient.abs().topk(len(self._places), sorted=False).indices)
        found = gradient.index_select(0, self._places).to(self._pending.dtype)
        self._pending += self._mean(found) if self.chosen else found
        self.chosen = True

    def take(self) -> Tensor:
        """The gradients of a step that may be taken. If it is skipped, the next step begins as this one did."""
        gradient = self._pending.clone()
        self._drop()
        return gradient

    def add(self, gradient: Tensor) -> None:
        """Add the gradients of a step that was taken."""
        self._sums.copy_(gradient if self.fresh else self._sums + gradient)
        self.fresh, self.chosen = False, True

    def _drop(self) -> None:
        """Begin the step again."""
        self._pending.zero_()
        self.chosen = not self.fresh

    def _mean(self, values: Tensor) -> Tensor:
        """The mean over the processes, in place."""
        # In the backward pass, layer by layer: at the step, the gradient that chooses would be gone.
        if not self._alone and is_distributed():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        return values


_BUFFERS = ("candidates", "accumulated", "pending")


def make_room(adapter: DeltaLinear) -> None:
    """Give an adapter the buffers of its candidates; the places are -1 until they are chosen."""
    adapter.register_buffer("candidates", torch.full_like(adapter.indices, -1))
    for name in ("accumulated", "pending"):
        adapter.register_buffer(name, torch.zeros_like(adapter.values, requires_grad=False))


def take_gradients(adapters: Sequence[DeltaLinear]) -> list[tuple[Candidates, Tensor]]:
    """The gradients of a step at the candidates of all adapters that have any."""
    watching = [adapter.watcher for adapter in adapters if isinstance(adapter.watcher, Candidates)]
    for candidates in watching:
        candidates.resume()
    return [(candidates, candidates.take()) for candidates in watching if candidates.chosen]
