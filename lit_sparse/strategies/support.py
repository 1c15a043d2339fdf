"""Which strategies of the Trainer keep sparse updates exact, and what they need for it."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError
from lit_sparse.strategies.sharded import ReplicatedAdapters

REPLACED: dict[type[Strategy], str] = {
    FSDPStrategy: "lit_sparse.SparseFSDPStrategy",
    ModelParallelStrategy: "lit_sparse.SparseFSDP2Strategy",
}
"""Lightning's strategies that would not keep adapters equal in all processes, and ours in their place."""


def require_exact(strategy: Strategy) -> None:
    """Refuse a strategy under which processes would zero different entries, or none at all.

    Raises:
        UsageError: Naming the reason, and the strategy to use instead.
    """
    if isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy too
        raise UsageError(
            "Sparse updates do not work under DeepSpeed: its engine takes the steps on flat float32 copies of its own "
            "(stage 1 and 2 a part of them in each process, stage 3 of the weights too) and overwrites what was zeroed "
            "in the adapters. Use strategy ddp, or fsdp2 to shard the frozen backbone, with cpu_offload if need be."
        )
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ReplicatedAdapters):
        return
    for kind, instead in REPLACED.items():
        if isinstance(strategy, kind):
            raise UsageError(
                f"Under {type(strategy).__name__} rows and columns of adapters are spread over processes, or not "
                f"synchronized where it leaves them out. Use {instead}, which shards the frozen backbone only."
            )
    raise UsageError(
        f"Sparse updates are not known to work under {type(strategy).__name__}. Use a single device, ddp, or "
        f"{' or '.join(REPLACED.values())}."
    )


def keep_buffers_local(model: nn.Module | None, adapters: Iterable[tuple[str, LowRankAdapter]]) -> None:
    """Spare DDP sending what methods remember, such as sensitivities, from process 0 before every forward pass.

    Every process computes them alike, from synchronized gradients; they are as large as the adapters.

    Args:
        model: What the strategy made of the module; nothing happens unless it is DDP's.
        adapters: Those in the module, with their names in it.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    own = {f"{name}.{buffer}" for name, a in adapters for buffer, _ in a.named_buffers(recurse=False)}
    # Torch has a static method that sets this for a module, but only before it is wrapped, by the Trainer.
    model.parameters_to_ignore.update(own)
    model._assign_modules_buffers()
