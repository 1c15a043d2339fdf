"""The processes of a run: whether there are several, and what they exchange before training starts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed


def is_distributed() -> bool:
    """Whether there is a process group."""
    return distributed.is_available() and distributed.is_initialized()


def together(values: Tensor, device: torch.device, collective: Callable[[Tensor], Any]) -> Tensor:
    """What a collective makes of the values of all processes, sent from ``device``, in main memory."""
    if not is_distributed():
        return values
    sent = values.to(device).contiguous()
    collective(sent)
    return sent.cpu()


def of_first(values: Tensor, device: torch.device) -> Tensor:
    """The values of the first process, in main memory where there are several."""
    return together(values, device, lambda sent: distributed.broadcast(sent, src=0))


def all_have(value: Any, device: torch.device) -> bool:
    """Whether no process has None."""
    present = torch.tensor([value is not None], dtype=torch.int32)
    return bool(together(present, device, lambda sent: distributed.all_reduce(sent, distributed.ReduceOp.MIN)))


def rows_of_all(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after the other. Each may have another number of them."""
    if not is_distributed():
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(distributed.get_world_size())]
    distributed.all_gather(counts, count)
    padded = rows.new_zeros(int(max(counts)), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(parts, padded)
    return torch.cat([part[:own] for part, own in zip(parts, torch.cat(counts).tolist(), strict=True)])
