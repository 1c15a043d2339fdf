"""Stop when the loss is no longer a number, before it reaches a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from lit_sparse.errors import TrainingError


class FiniteLoss(Callback):
    """Raise :class:`~lit_sparse.errors.TrainingError` when a training loss is NaN or infinite.

    On a CPU the loss is read before it is propagated, so that the weights stay good. On an accelerator that
    would make every step wait for the device: there the first bad step is remembered on the device, and looked
    at every ``log_every_n_steps`` batches and before every checkpoint, so that no checkpoint with
    damaged weights is written.
    """

    def __init__(self) -> None:
        self._bad_step: Tensor | None = None

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:  # noqa: ARG002
        """Look at the loss, or remember on the device that it was bad."""
        if self._reading_is_free(loss):
            if not bool(torch.isfinite(loss)):
                self._stop(trainer, trainer.global_step, f"{float(loss)}")
            return
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, device=loss.device)
        first = ~torch.isfinite(loss.detach()) & (self._bad_step < 0)
        self._bad_step = torch.where(first, trainer.global_step, self._bad_step)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Look at what was remembered."""
        if (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self._look(trainer)

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],  # noqa: ARG002
    ) -> None:
        """Look before a file is written."""
        self._look(trainer)

    @staticmethod
    def _reading_is_free(loss: Tensor) -> bool:
        return loss.device.type == "cpu"

    def _look(self, trainer: Trainer) -> None:
        if self._bad_step is not None and int(self._bad_step) >= 0:
            self._stop(trainer, int(self._bad_step), "not finite")

    def _stop(self, trainer: Trainer, step: int, value: str) -> None:
        self._bad_step = None
        paths = [
            getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint)
        ]
        kept = next((f"the last good checkpoint is {path}" for path in paths if path), "no checkpoint was written yet")
        raise TrainingError(
            f"The training loss became {value} at optimizer step {step} (epoch {trainer.current_epoch}); {kept}. Lower "
            "the learning rate, clip gradients, or look for broken rows in the data."
        )
