"""Stop when the loss or a gradient is no longer a number, before it reaches a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_sparse.errors import TrainingError
from lit_sparse.strategies.replicas import is_distributed

_NEVER = 2**62
"""The step of what has not happened."""


class FiniteLoss(Callback):
    """Raise :class:`~lit_sparse.errors.TrainingError` when a training loss or a gradient is NaN or infinite.

    On a CPU both are read before the optimizer's step, so that the weights stay good. On an accelerator that would make
    every step wait for the device: there the first bad step is remembered on the device, and read every
    ``log_every_n_steps`` batches, at the end of a validation or an epoch, and before every checkpoint (after every
    batch where a ``ModelCheckpoint`` saves weights only, of which callbacks are not told). From then on every save is
    refused. Several processes stop together, whichever of them had the bad loss.

    Gradients are read before they are clipped. Where the Trainer clips by value an infinite one is no reason to stop.
    Under a gradient scaler, which skips the step instead, gradients are not read.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None
        """Steps at which the loss and a gradient were first not finite, in this process."""
        self._stopped: str | None = None
        self._always_look = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._first_bad, self._stopped = torch.full((2,), _NEVER, device=pl_module.device), None
        self._always_look = any(isinstance(c, ModelCheckpoint) and c.save_weights_only for c in _checkpoints(trainer))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:  # noqa: ARG002
        """Look at the loss, unless it is scaled."""
        if _scaler(trainer) is None:
            self._look_at_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Look at all gradients at once, by their norm."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if not gradients or _scaler(trainer) is not None:
            return
        norm = get_total_norm(gradients)
        by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
        # All processes have the same gradients here, and stop together.
        self._note(trainer, 1, norm.isnan() if by_value else ~norm.isfinite(), self._reading_is_free(norm))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,
    ) -> None:
        """Look at a loss that was scaled before, and at what was remembered."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if _scaler(trainer) is not None and isinstance(loss, Tensor):
            self._look_at_loss(trainer, loss)
        if self._always_look or (batch_idx + 1) % max(1, trainer.log_every_n_steps) == 0:  # type: ignore[attr-defined]
            self.require_finite(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Look before a validation's checkpoint."""
        self.require_finite(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Look before an epoch's checkpoint."""
        self.require_finite(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Look at the end, which no checkpoint need follow."""
        self.require_finite(trainer)

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        checkpoint: dict[str, Any],  # noqa: ARG002
    ) -> None:
        """Look before a file is written."""
        self.require_finite(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Keep callbacks that save weights only from saving bad ones now; other processes may be elsewhere."""
        if self._always_look and self._first_bad is not None:
            self._stop_if_bad(trainer, self._first_bad)

    def require_finite(self, trainer: Trainer) -> None:
        """Wait for the device, and stop if a step so far had a bad loss or gradient in any process.

        Raises:
            TrainingError: If so, each time that this is called.
        """
        if self._first_bad is None:  # no training yet
            return
        first = self._first_bad.clone()
        if is_distributed() and self._stopped is None:
            distributed.all_reduce(first, distributed.ReduceOp.MIN)
        self._stop_if_bad(trainer, first)

    @staticmethod
    def _reading_is_free(tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _look_at_loss(self, trainer: Trainer, loss: Tensor) -> None:
        # A process that stopped for its own loss would leave the others waiting for its gradients.
        self._note(trainer, 0, ~loss.detach().isfinite(), self._reading_is_free(loss) and not is_distributed())

    def _note(self, trainer: Trainer, which: int, bad: Tensor, read: bool) -> None:
        """Remember the step of what is ``bad``, of the loss (0) or the gradients (1)."""
        assert self._first_bad is not None  # noqa: S101 - training has started
        if read and not bool(bad):
            return
        step = torch.where(bad, trainer.global_step, _NEVER).to(self._first_bad.device)
        self._first_bad[which] = torch.minimum(self._first_bad[which], step)
        if read:
            self._stop_if_bad(trainer, self._first_bad)

    def _stop_if_bad(self, trainer: Trainer, first_bad: Tensor) -> None:
        if self._stopped is not None:
            raise TrainingError(self._stopped)
        loss, gradient = first_bad.tolist()
        if min(loss, gradient) == _NEVER:
            return
        what, mend = (
            ("The training loss", "Lower the learning rate, clip gradients, or look for broken rows in the data.")
            if loss <= gradient
            else (
                "A gradient",
                "Look for an operation without a finite derivative, such as the square root of 0, or lower the "
                "learning rate.",
            )
        )
        paths = (getattr(c, "last_model_path", "") or getattr(c, "best_model_path", "") for c in _checkpoints(trainer))
        kept = next((f"the last good checkpoint is {path}" for path in paths if path), "no checkpoint was written yet")
        self._stopped = (
            f"{what} became NaN or infinite at optimizer step {min(loss, gradient)} (epoch {trainer.current_epoch}); "
            f"{kept}. {mend}"
        )
        raise TrainingError(self._stopped)


def _checkpoints(trainer: Trainer) -> list[Checkpoint]:
    return [c for c in trainer.callbacks if isinstance(c, Checkpoint)]  # type: ignore[attr-defined]


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
