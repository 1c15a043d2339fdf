"""Remove dead ranks from adapters, and from the optimizer that trains them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compiled import LEAST_RANKS, allow_other_ranks
from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.optimizer_state import keep_rows, require_cuttable
from lit_sparse.adapters.statistics import live_ranks
from lit_sparse.errors import UsageError


@torch.no_grad()
def compact(model: nn.Module, optimizer: Optimizer | None = None) -> dict[str, int]:
    """Remove every dead rank from A, B, gate and their buffers, in place.

    A rank is dead when its gate, its row of A or its row of Bᵀ is zero
    (:func:`~lit_sparse.adapters.statistics.live_ranks`), so that the model computes what it did before, with less
    memory and time. Unlike a rank at zero, a removed rank cannot come back. An adapter may end with rank 0. If all
    would, the first keeps one rank, so that there is something to differentiate. All experts of one weight keep as many
    ranks as the expert with the most live ranks. Compiled models keep at least two in every adapter
    (:func:`~lit_sparse.compile_blocks`).

    Call it between an optimizer step and the next forward pass. Parameters stay the same objects, so that optimizers,
    schedulers, gradient scalers, hooks and lists of parameters remain valid, and a loss may be kept. Gradients are
    dropped. Graphs that are still to be differentiated and copies, such as an ``AveragedModel``, keep the old shapes.
    It does not work under DDP, whose buffers have the sizes of the start.

    Args:
        model: Model with adapters.
        optimizer: The optimizer of a run that continues. Its state is cut, too.

    Returns:
        Full layer name to remaining rank.

    Raises:
        UsageError: If there is no adapter in ``model`` or one without ranks, none was trained, or the state of
            ``optimizer`` cannot be cut, such as quantized moments and the history of LBFGS. Nothing is changed then.
    """
    adapters = low_rank_in(model, "compact removes ranks")
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
    """Remove all ranks but the live ones, as :func:`compact` does.

    Args:
        adapters: Of one model, by name.
        live: A mask for each adapter to compact, shape ``(copies · rank,)``. Other ranks must contribute nothing.
        optimizer: The optimizer of a run that continues.
    """
    counts = {name: int(n) for name, n in zip(live, _largest(adapters, live), strict=True)}  # the one host sync
    if counts and not any(counts.values()) and len(counts) == len(adapters):
        counts[next(iter(counts))] = 1
    counts = {name: max(rank, LEAST_RANKS) if adapters[name].compiled else rank for name, rank in counts.items()}
    shrinking = {name: rank for name, rank in counts.items() if rank < adapters[name].rank}
    if optimizer is not None:
        require_cuttable(optimizer, (p for name in shrinking for p in adapters[name].parameters(recurse=False)))
    for name, rank in shrinking.items():
        adapter = adapters[name]
        _keep(adapter, _chosen(live[name].view(adapter.copies, -1), rank), optimizer)
    if shrinking:
        allow_other_ranks(adapters.values())


def shrink(adapter: LowRankAdapter, rank: int) -> None:
    """Cut an adapter to its first ``rank`` ranks (of each copy), to put other values into them."""
    places = torch.arange(adapter.lora_A.shape[0], device=adapter.lora_A.device)
    _keep(adapter, places.view(adapter.copies, -1)[:, :rank].flatten(), None)
    allow_other_ranks([adapter])


def replace_values(parameter: nn.Parameter, values: Tensor) -> None:
    """Give a parameter values of another shape, and no gradient."""
    # A graph that is still alive, such as that of a kept loss, holds a node that accumulates gradients of the
    # old shape. Torch drops that node when the dtype changes, as .half() needs, and makes a new one.
    parameter.data = torch.empty(0, dtype=torch.float16, device=parameter.device)
    parameter.data = values
    parameter.grad = None


def _largest(adapters: Mapping[str, LowRankAdapter], live: Mapping[str, Tensor]) -> list[float]:
    """Number of live ranks of each adapter, the maximum over its copies."""
    counts = [mask.view(adapters[name].copies, -1).sum(1).max() for name, mask in live.items()]
    return torch.stack(counts).tolist() if counts else []


def _chosen(live: Tensor, rank: int) -> Tensor:
    """Rows of the live ranks of each copy, in order, filled up with dead ranks to ``rank``."""
    order = live.int().argsort(dim=1, descending=True, stable=True)[:, :rank].sort(dim=1).values
    return (order + torch.arange(live.shape[0], device=live.device).unsqueeze(1) * live.shape[1]).flatten()


def _keep(adapter: LowRankAdapter, places: Tensor, optimizer: Optimizer | None) -> None:
    """Keep these rows of every tensor that has a row for each rank."""
    rows = adapter.lora_A.shape[0]
    for parameter in list(adapter._parameters.values()):
        if parameter is not None:
            if optimizer is not None:
                keep_rows(optimizer, parameter, places)
            replace_values(parameter, parameter.data[places])
    for name, buffer in list(adapter._buffers.items()):
        if buffer is not None and buffer.ndim and buffer.shape[0] == rows:
            adapter._buffers[name] = buffer[places]
