"""The order of training rows: shuffled, with rows of like length side by side."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DistributedSampler

_BATCHES_SORTED_TOGETHER = 50  # as many as transformers takes: little padding is left, and much shuffling


class LengthGroupedSampler(DistributedSampler[int]):
    """Shuffles rows, then sorts runs of 50 batches by length, so that batches need little padding.

    The order is a function of ``seed`` and the epoch alone. The sampler of the same name in transformers
    draws from the global generator, which differs between processes and cannot be set back to mid-run.

    The sampler shards itself: rank ``r`` takes the rows ``r``, ``r + num_replicas``, … of one common order,
    so in a step all ranks hold rows of like length. It is a ``DistributedSampler`` because that is how
    Lightning tells that it must not shard a sampler a second time, whatever ``use_distributed_sampler``
    says; Lightning also calls :meth:`set_epoch`. The longest row of all comes first: what fits into memory
    in the first step, fits in every step.

    Args:
        lengths: Length of each row, in tokens.
        batch_size: Rows per batch and rank.
        num_replicas: Number of processes that share the rows; 1 is a run in a single process.
        rank: Number of this process, from 0.
        seed: Seed of the order; epoch ``e`` shuffles with ``seed + e``, as in torch's ``DistributedSampler``.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        # The dataset is only asked for its length.
        super().__init__(lengths, num_replicas, rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.lengths = list(lengths)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[int]:
        order = self._common_order()
        # Every rank must take equally many steps; the row repeated is the last and seldom a long one.
        order += order[-1:] * (self.total_size - len(order))
        return iter(order[self.rank :: self.num_replicas])

    def _common_order(self) -> list[int]:
        """The order of all rows before ranks take their share."""
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
