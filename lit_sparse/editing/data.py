"""Edit requests, served to the processes of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, DistributedSampler

from lit_sparse.editing.requests import EditRequest, read_requests
from lit_sparse.errors import UsageError


class EditingData(LightningDataModule):
    """Edit requests from the usual files, unchanged, for an :class:`~lit_sparse.Editor`.

    Reads KnowEdit (WikiData recent and counterfact, ZsRE, WikiBio), ZsRE as MEND and EasyEdit have it, CounterFact,
    CKnowEdit, and EasyEdit's flat files, as JSON or JSON Lines; :func:`~lit_sparse.editing.requests.read_requests` says
    how. Every process of a run takes its share of the requests, none twice.

    Args:
        path: File of the requests.
        first: Number of the first request to take, from 0.
        limit: How many to take; None: all that are left. Choose settings on others than those you report.
        batch_size: Requests that are edited at once, by one change of the weights.

    Raises:
        UsageError: If the file cannot be read, a record is not what it should be, or none is left.
    """

    def __init__(self, path: str, first: int = 0, limit: int | None = None, batch_size: int = 1) -> None:
        super().__init__()
        if first < 0:
            raise UsageError(f"first is the number of the first request, from 0; got {first}.")
        if limit is not None and limit < 1:
            raise UsageError(f"limit counts requests, at least 1; got {limit}.")
        if batch_size < 1:
            raise UsageError(f"batch_size counts the requests that are edited at once, at least 1; got {batch_size}.")
        self.path = path
        self.first = first
        self.limit = limit
        self.batch_size = batch_size
        self.requests: list[EditRequest] = []
        """Those that were asked for; empty before ``setup``."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read the file, in every process: each knows all requests, and takes its share."""
        if self.requests:
            return
        found = read_requests(self.path)
        end = None if self.limit is None else self.first + self.limit
        self.requests = found[self.first : end]
        if not self.requests:
            raise UsageError(f"{self.path} has {len(found)} requests, and first is {self.first}: none is left.")

    @property
    def groups(self) -> list[list[EditRequest]]:
        """Requests that are edited at once; the same whatever the number of processes."""
        return [self.requests[i : i + self.batch_size] for i in range(0, len(self.requests), self.batch_size)]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Requests are texts, and stay where they are."""
        return batch

    def test_dataloader(self) -> DataLoader[Any]:
        """Groups of requests."""
        processes = 1 if self.trainer is None else self.trainer.world_size
        rank = 0 if self.trainer is None else self.trainer.global_rank
        groups: Any = self.groups
        if len(groups) < processes:  # one without a share would leave before the others have met
            raise UsageError(
                f"There are {len(groups)} edits to make of {len(self.requests)} requests, and {processes} processes: "
                "use fewer processes."
            )
        return DataLoader(groups, batch_size=None, sampler=Share(groups, processes, rank))


class Share(DistributedSampler[Any]):
    """Every process's share of some things, in order, none of them twice.

    It is a ``DistributedSampler`` because Lightning then leaves it alone; torch's own repeats things until shares are
    equally large.

    Args:
        things: To share.
        processes: How many share them.
        rank: Number of this process, from 0.
    """

    def __init__(self, things: Sequence[Any], processes: int, rank: int) -> None:
        super().__init__(things, processes, rank, shuffle=False)  # type: ignore[arg-type]
        self._own = range(rank, len(things), processes)

    def __iter__(self) -> Iterator[int]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)
