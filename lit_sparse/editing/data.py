"""Edit requests, served to the processes of a run."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader

from lit_sparse.editing.requests import EditRequest, read_requests
from lit_sparse.errors import UsageError, require_range


class EditingData(LightningDataModule):
    """Edit requests for an :class:`~lit_sparse.Editor`, read from published files as they are.

    The files may be KnowEdit's (WikiData recent and counterfact, ZsRE, WikiBio), ZsRE as in MEND and EasyEdit,
    CounterFact, CKnowEdit, or EasyEdit's flat files, as JSON or JSON Lines, or tables as CSV or TSV; see
    :func:`~lit_sparse.editing.requests.read_requests`. The processes of a run share the requests, and none is edited
    twice.

    Args:
        path: File of the requests.
        first: Number of the first request to use, from 0.
        limit: Number of requests to use; None: all that follow. Choose settings on requests that you do not report.
        batch_size: Number of requests that one change of the weights edits.
        side_by_side: Number of changes that are trained at the same time, each as if it were alone, to rounding. A step
            then reads the model's weights once for all of them, and needs memory for all their activations. Changes in
            sequence, and methods for which it is impossible, are trained one after another.

    Raises:
        UsageError: If an argument is outside its range, the file cannot be read, a record is wrong, or no request is
            left.
    """

    def __init__(
        self, path: str, first: int = 0, limit: int | None = None, batch_size: int = 1, side_by_side: int = 10
    ) -> None:
        super().__init__()
        require_range("first", first, at_least=0)
        require_range("limit", limit, at_least=1)
        require_range("batch_size", batch_size, at_least=1)
        require_range("side_by_side", side_by_side, at_least=1)
        self.path = path
        self.first = first
        self.limit = limit
        self.batch_size = batch_size
        self.side_by_side = side_by_side
        self.requests: list[EditRequest] = []
        """The requests to use; empty before ``setup``."""

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read the file; every process reads all requests."""
        found = read_requests(self.path)
        self.requests = found[self.first :][: self.limit]
        if not self.requests:
            raise UsageError(f"{self.path} has {len(found)} requests, and first is {self.first}: none is left.")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ARG002
        """Return the batch: requests are texts."""
        return batch

    def test_dataloader(self) -> DataLoader[Any]:
        """Lists of groups of requests: a change for each group, and the changes of a list side by side."""
        size = self.batch_size
        groups: Any = [self.requests[i : i + size] for i in range(0, len(self.requests), size)]
        processes, rank = (1, 0) if self.trainer is None else (self.trainer.world_size, self.trainer.global_rank)
        if len(groups) < processes:  # a process without a group would leave while the others wait for it
            raise UsageError(
                f"There are {len(groups)} edits to make of {len(self.requests)} requests, and {processes} processes: "
                "use fewer processes."
            )
        together = min(self.side_by_side, len(groups) // processes)
        lists: Any = [groups[i : i + together] for i in range(0, len(groups), together)]
        # It repeats no request, and Lightning keeps it, as it is a DistributedSampler.
        sampler = UnrepeatedDistributedSampler(lists, processes, rank, shuffle=False)
        return DataLoader(lists, batch_size=None, sampler=sampler)
