"""The order of training rows, and a data loader that can continue in the middle of an epoch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, DistributedSampler

_BATCHES_SORTED_TOGETHER = 50  # as in transformers: little padding, and still much shuffling


class RowSampler(DistributedSampler[Any]):
    """Shuffles rows, in an order that depends on ``seed`` and the epoch alone.

    Arguments are those of torch's ``DistributedSampler``.
    """

    first: int = 0
    """Number of rows of this process that the next pass leaves out, because they were served before."""

    def __iter__(self) -> Iterator[int]:
        first, self.first = self.first, 0
        return iter(self._order()[first:])

    def _order(self) -> list[int]:
        return list(super().__iter__())


class ResumableLoader(DataLoader[Any]):
    """A ``DataLoader`` whose position in the epoch is part of the Trainer's checkpoints.

    Resuming reads no row twice: the sampler, a :class:`RowSampler`, leaves out the rows that were served.
    """

    _epoch: int = 0  # of the current pass; the sampler may already have been told the next one
    _served: int = 0
    _position: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator runs this at the first batch, when the Trainer has told the sampler the epoch.
        position, self._position = self._position, None
        self._epoch, self._served = getattr(self.sampler, "epoch", 0), 0
        if position is not None and isinstance(self.sampler, RowSampler) and self._epoch == position["epoch"]:
            self._served = position["batches"]
            self.sampler.first = self._served * (self.batch_size or 1)
        for batch in super().__iter__():
            self._served += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were served."""
        return {"epoch": self._epoch, "batches": self._served, **self._division()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the state was taken; a finished epoch stays finished."""
        division = self._division()
        if any(state[name] != value for name, value in division.items()):
            before = {name: state[name] for name in division}
            rank_zero_warn(
                f"The checkpoint is of a run with {before}, and this one has {division}: the epoch continues with "
                "about as many rows as were left, but not with the same ones."
            )
        self._position = {"epoch": state["epoch"], "batches": state["batches"]}

    def _division(self) -> dict[str, int]:
        """Batch size and number of processes."""
        processes = self.sampler.num_replicas if isinstance(self.sampler, RowSampler) else 1
        return {"batch_size": self.batch_size or 1, "processes": processes}


class LengthGroupedSampler(RowSampler):
    """Shuffles rows, then sorts runs of 50 batches by length, so that batches need little padding.

    The order depends on ``seed`` and the epoch alone. The sampler of the same name in transformers draws from the
    global generator, which differs between processes and cannot be reset to the middle of a run.

    The sampler shards itself: rank ``r`` takes the rows ``r``, ``r + num_replicas``, … of one common order, so all
    ranks hold rows of similar length in each step. It is a ``DistributedSampler`` because Lightning does not shard
    those a second time, whatever ``use_distributed_sampler`` says, and calls :meth:`set_epoch`. The longest row comes
    first: if the first step fits into memory, every step does.

    Args:
        lengths: Length of each row, in tokens.
        batch_size: Rows per batch and rank.
        num_replicas: Number of processes that share the rows.
        rank: Number of this process, from 0.
        seed: Seed of the order; epoch ``e`` shuffles with ``seed + e``, as in torch's ``DistributedSampler``.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        # torch asks the data set only for its length.
        super().__init__(lengths, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = list(lengths)
        self.batch_size = batch_size

    def _order(self) -> list[int]:
        order = self._common_order()
        # Every rank must take equally many steps. The last row is repeated, which is seldom a long one.
        order += order[-1:] * (self.total_size - len(order))
        return order[self.rank :: self.num_replicas]

    def _common_order(self) -> list[int]:
        """The order of all rows, before each rank takes its share."""
        if not self.lengths:
            return []
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        run = _BATCHES_SORTED_TOGETHER * self.batch_size * self.num_replicas
        order: list[int] = []
        for start in range(0, len(shuffled), run):
            order += sorted(shuffled[start : start + run], key=self.lengths.__getitem__, reverse=True)
        longest = max(range(len(order)), key=lambda position: self.lengths[order[position]])
        order[0], order[longest] = order[longest], order[0]
        return order
