"""Which strategies of the Trainer keep sparse updates exact."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from lit_sparse.adapters.base import Adapter
from lit_sparse.errors import UsageError
from lit_sparse.strategies.sharded import ReplicatedAdapters

REPLACED: dict[type[Strategy], str] = {
    FSDPStrategy: "lit_sparse.SparseFSDPStrategy",
    ModelParallelStrategy: "lit_sparse.SparseFSDP2Strategy",
}
"""Lightning's strategies that do not keep adapters equal in all processes → our replacement."""


def require_exact(strategy: Strategy) -> None:
    """Refuse a strategy under which processes would zero different entries, or none.

    Raises:
        UsageError: With the strategy to use instead.
    """
    if isinstance(strategy, DeepSpeedStrategy):  # which is a DDPStrategy too
        raise UsageError(
            "Sparse updates do not work under DeepSpeed: its engine steps on its own float32 copies of the weights and "
            "overwrites the zeros in the adapters. Use strategy ddp, or fsdp2 to shard the frozen backbone, with "
            "cpu_offload if memory is short."
        )
    if isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ReplicatedAdapters):
        return
    for kind, instead in REPLACED.items():
        if isinstance(strategy, kind):
            raise UsageError(
                f"{type(strategy).__name__} splits rows and columns of adapters among processes, or does not "
                f"synchronize them. Use {instead}, which shards the frozen backbone only."
            )
    raise UsageError(
        f"Sparse updates are not tested under {type(strategy).__name__}. Use a single device, ddp, or "
        f"{' or '.join(REPLACED.values())}."
    )


def root_gathered(model: nn.Module | None) -> AbstractContextManager[None]:
    """Let a module be called outside of the Trainer's steps, under any strategy.

    FSDP gathers weights outside of the blocks, such as embeddings, only when its wrapper is called.

    Args:
        model: The module as the strategy wrapped it.
    """
    if isinstance(model, FullyShardedDataParallel):
        whole: AbstractContextManager[None] = FullyShardedDataParallel.summon_full_params(
            model, recurse=False, writeback=False
        )
        return whole
    return nullcontext()


def keep_buffers_local(model: nn.Module | None, adapters: Iterable[tuple[str, Adapter]]) -> None:
    """Keep DDP from broadcasting the buffers of adapters, such as sensitivities, before every forward pass.

    Every process computes the same buffers from synchronized gradients; they are as large as the adapters.

    Args:
        model: The module as the strategy wrapped it; nothing happens unless it is wrapped by DDP.
        adapters: The adapters with their names in the module.
    """
    if not isinstance(model, DistributedDataParallel):
        return
    own = {f"{name}.{buffer}" for name, a in adapters for buffer, _ in a.named_buffers(recurse=False)}
    # Torch's static method for this works only before the Trainer wraps the module.
    model.parameters_to_ignore.update(own)
    model._assign_modules_buffers()
