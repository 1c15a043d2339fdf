"""Stop training when the loss or a gradient is NaN or infinite, before it reaches a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, distributed
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_sparse.adapters.processes import is_distributed
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import TrainingError

_NEVER = 2**62  # the step of an event that has not happened
_ADVICE = (
    ("The training loss", "Lower the learning rate, clip gradients, or look for broken rows in the data."),
    (
        "A gradient",
        "Look for an operation without a finite derivative, such as the square root of 0, or lower the learning rate.",
    ),
)


class FiniteLoss(Callback):
    """Raise :class:`~lit_sparse.errors.TrainingError` when a training loss or a gradient is NaN or infinite.

    On a CPU both are read before the optimizer's step, so that the weights stay good. An accelerator would have to wait
    at every step for that. There the callback remembers the first bad step on the device, and reads it every
    ``log_every_n_steps`` batches, at the end of a validation or an epoch, and before every checkpoint (with a
    ``ModelCheckpoint`` that saves weights only, of which callbacks are not told, after every batch). From then on it
    refuses every save. Several processes stop together, whichever of them had the bad loss.

    Gradients are read before they are clipped; infinite ones are accepted if the Trainer clips by value. Under a
    gradient scaler, which skips bad steps itself, gradients are not read.
    """

    def __init__(self) -> None:
        self._first_bad: Tensor | None = None
        """In this process, the steps at which the loss and a gradient were first not finite."""
        self._stopped: str | None = None
        self._reads_every_batch = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier run."""
        self._first_bad, self._stopped = torch.full((2,), _NEVER, device=pl_module.device), None
        self._reads_every_batch = any(c.save_weights_only for c in callbacks_of(trainer, ModelCheckpoint))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:  # noqa: ARG002
        """Check the loss, unless it is scaled."""
        if _scaler(trainer) is None:
            self._check_loss(trainer, loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:  # noqa: ARG002
        """Check all gradients at once, by their norm."""
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        gradients = [p.grad for p in parameters if p.grad is not None and not p.grad.is_sparse]
        if not gradients or _scaler(trainer) is not None:
            return
        norm = get_total_norm(gradients)
        by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
        # All processes have the same gradients here, and stop together.
        self._note(trainer, 1, norm.isnan() if by_value else ~norm.isfinite(), self._reading_is_free(norm))

    def on_train_batch_end(self, trainer: Trainer, _: Any, outputs: Any, __: Any, batch_idx: int) -> None:
        """Check a loss that was scaled before; read the first bad step if it is time."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if _scaler(trainer) is not None and isinstance(loss, Tensor):
            self._check_loss(trainer, loss)
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if self._reads_every_batch or (batch_idx + 1) % every == 0:
            self.require_finite(trainer)

    def require_finite(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        """Wait for the device, and stop if any process had a bad loss or gradient so far.

        Raises:
            TrainingError: In that case, at every call.
        """
        if self._first_bad is None:  # no training yet
            return
        first = self._first_bad.clone()
        if is_distributed() and self._stopped is None:
            distributed.all_reduce(first, distributed.ReduceOp.MIN)
        self._stop_if_bad(trainer, first)

    # A checkpoint may follow each of these.
    on_validation_end = on_train_epoch_end = on_train_end = on_save_checkpoint = require_finite

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        """Keep callbacks from saving bad weights now, without waiting for the other processes."""
        if self._reads_every_batch and self._first_bad is not None:
            self._stop_if_bad(trainer, self._first_bad)

    @staticmethod
    def _reading_is_free(tensor: Tensor) -> bool:
        return tensor.device.type == "cpu"

    def _check_loss(self, trainer: Trainer, loss: Tensor) -> None:
        # A process that stopped for its own loss would leave the others waiting for its gradients.
        self._note(trainer, 0, ~loss.detach().isfinite(), self._reading_is_free(loss) and not is_distributed())

    def _note(self, trainer: Trainer, which: int, bad: Tensor, read: bool) -> None:
        """Remember this step if ``bad`` is true, for the loss (0) or the gradients (1)."""
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
        steps = first_bad.tolist()
        if min(steps) == _NEVER:
            return
        subject, advice = _ADVICE[steps.index(min(steps))]
        saved = callbacks_of(trainer, Checkpoint)
        paths = (getattr(c, "last_model_path", "") or getattr(c, "best_model_path", "") for c in saved)
        kept = next((f"the last good checkpoint is {path}" for path in paths if path), "no checkpoint was written yet")
        self._stopped = (
            f"{subject} became NaN or infinite at optimizer step {min(steps)} (epoch {trainer.current_epoch}); "
            f"{kept}. {advice}"
        )
        raise TrainingError(self._stopped)


def _scaler(trainer: Trainer) -> Any:
    return getattr(trainer.precision_plugin, "scaler", None)
