"""Take dead ranks out of adapters, and out of the optimizer that trains them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.optimizer_state import keep_rows, require_cuttable
from lit_sparse.adapters.statistics import live_ranks
from lit_sparse.errors import UsageError


@torch.no_grad()
def compact(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Take every dead rank out of A, B, gate and the buffers that belong to them, in place.

    A rank is dead when its gate, its row of A or its row of Bᵀ is zero
    (:func:`~lit_sparse.adapters.statistics.live_ranks`), so the model computes what it did, with less memory and time.
    A rank that is taken out cannot come back, as one at zero may. An adapter may be left with rank 0; if all would be,
    the first keeps one rank, so that there is something to differentiate. Experts of one weight keep equally many
    ranks, as many as the largest needs.

    Call it between a step of the optimizer and the next forward pass. Parameters stay the same objects, so that
    optimizers, schedulers, gradient scalers, hooks and lists of parameters go on with them, and a loss may be kept.
    Their gradients are dropped. Graphs that are still to be differentiated and copies, such as an ``AveragedModel``,
    keep the old shapes. Not for a model under DDP, which lays out buffers for the sizes at the start.

    Args:
        model: Model with adapters.
        optimizer: The optimizer of a run that goes on: its state is cut alike.

    Returns:
        Full layer name to rank that is left.

    Raises:
        UsageError: If there is no adapter in ``model``, all of them are as they were injected, or ``optimizer`` keeps
            a state that cannot be cut: moments have the parameter's shape and Adafactor's factors a part of it, but
            quantized moments and the history of LBFGS belong to no rank. Nothing is changed then.
    """
    adapters = dict(adapters_in(model))
    if not adapters:
        raise UsageError(f"{type(model).__name__} holds no adapter to compact. Inject a method first.")
    if not torch.stack([adapter.lora_B_t.any() for adapter in adapters.values()]).any():
        raise UsageError("Every lora_B is zero, as before training, so that no rank would be left. Train first.")
    keep_ranks(adapters, {name: live_ranks(adapter) for name, adapter in adapters.items()}, optimizer)
    return {name: adapter.rank for name, adapter in adapters.items()}


@torch.no_grad()
def keep_ranks(
    adapters: Mapping[str, LowRankAdapter], live: Mapping[str, Tensor], optimizer: Optimizer | None = None
) -> None:
    """Take all ranks out but those that are live; the rest as :func:`compact`.

    Args:
        adapters: Of one model, by name.
        live: For each adapter to compact a mask, shape ``(copies · rank,)``; the other ranks must contribute nothing.
        optimizer: The optimizer of a run that goes on.
    """
    counts = {name: int(n) for name, n in zip(live, _largest(adapters, live), strict=True)}  # the one host sync
    if counts and not any(counts.values()) and len(counts) == len(adapters):
        counts[next(iter(counts))] = 1
    shrinking = {name: rank for name, rank in counts.items() if rank < adapters[name].rank}
    if optimizer is not None:
        require_cuttable(optimizer, (p for name in shrinking for p in adapters[name].parameters(recurse=False)))
    for name, rank in shrinking.items():
        adapter = adapters[name]
        _keep(adapter, _chosen(live[name].view(adapter.copies, -1), rank), optimizer)


def shrink(adapter: LowRankAdapter, rank: int) -> None:
    """Cut a new adapter to ``rank`` ranks, for the values of a compacted one to be loaded into it."""
    places = torch.arange(adapter.lora_A.shape[0], device=adapter.lora_A.device)
    _keep(adapter, places.view(adapter.copies, -1)[:, :rank].flatten(), None)


def _largest(adapters: Mapping[str, LowRankAdapter], live: Mapping[str, Tensor]) -> list[float]:
    """Number of live ranks of each adapter; of several copies the largest."""
    counts = [mask.view(adapters[name].copies, -1).sum(1).max() for name, mask in live.items()]
    return torch.stack(counts).tolist() if counts else []


def _chosen(live: Tensor, rank: int) -> Tensor:
    """Places of the live ranks of each copy, in their order, filled up with dead ones to ``rank``."""
    order = live.int().argsort(dim=1, descending=True, stable=True)[:, :rank].sort(dim=1).values
    return (order + torch.arange(live.shape[0], device=live.device).unsqueeze(1) * live.shape[1]).flatten()


def _keep(adapter: LowRankAdapter, places: Tensor, optimizer: Optimizer | None) -> None:
    """Keep these rows of everything that has a row for each rank."""
    rows = adapter.lora_A.shape[0]
    for parameter in list(adapter._parameters.values()):
        if parameter is not None:
            if optimizer is not None:
                keep_rows(optimizer, parameter, places)
            kept = parameter.data[places]
            # Any living graph, such as that of a kept loss, keeps the node that accumulates gradients of the old shape.
            # Torch drops it when the dtype changes, as it must for .half(), and makes a new one.
            parameter.data = torch.empty(0, dtype=torch.float16, device=parameter.device)
            parameter.data = kept
            parameter.grad = None
    for name, buffer in list(adapter._buffers.items()):
        if buffer is not None and buffer.ndim and buffer.shape[0] == rows:
            adapter._buffers[name] = buffer[places]
