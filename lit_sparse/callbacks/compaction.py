"""Take ranks at zero out of the model while it trains, so that steps become cheaper."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.adapters.compaction import compact
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import UsageError
from lit_sparse.methods.stepping import holder


class CompactRanks(Callback):
    """Every ``every_n_steps`` optimizer steps, take the ranks whose gate is zero out of the model and the optimizer.

    See :func:`~lit_sparse.compact`. Steps become cheaper as ranks die, and checkpoints smaller; they resume as any
    other. A rank at zero could have come back, one that was taken out cannot: compact seldom, or after gates have
    settled.

    Args:
        every_n_steps: Optimizer steps between two looks, each of which waits once for the device.

    Raises:
        UsageError: If ``every_n_steps`` < 1, or when training starts: if no adapter has gates, there are several
            processes, whose buffers DDP and FSDP lay out once, or weights are averaged, whose average keeps its shape.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps must be at least 1; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._looked_at = 0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot change its size."""
        if not any(adapter.gate is not None for _, adapter in adapters_in(pl_module)):
            raise UsageError(
                "CompactRanks takes out ranks whose gate is zero, and no adapter has gates. Use SoRA or GatedRoseLoRA, "
                "or leave CompactRanks out."
            )
        if trainer.world_size > 1:
            raise UsageError(
                f"CompactRanks works in one process, and there are {trainer.world_size}: DDP and FSDP lay out their "
                "buffers for the sizes at the start. Compact after training, by lit_sparse.compact."
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:
            raise UsageError(
                f"CompactRanks changes the shapes that {type(averaging[0]).__name__} averages. Leave one of them out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Begin to count."""
        self._looked_at = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Compact after a step of the optimizer; batches that only accumulate end at the same step."""
        if trainer.global_step == self._looked_at or trainer.global_step % self.every_n_steps:
            return
        self._looked_at = trainer.global_step
        adapters = dict(adapters_in(pl_module))
        before = sum(adapter.copies * adapter.rank for adapter in adapters.values())
        compact(pl_module, holder(trainer.optimizers, adapters))
        after = sum(adapter.copies * adapter.rank for adapter in adapters.values())
        if after < before:
            rank_zero_info(f"Step {trainer.global_step}: {before - after} ranks at zero taken out, {after} remain.")
