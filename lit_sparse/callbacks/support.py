"""What several callbacks need: find other callbacks, come first or last, act once per optimizer step."""

from __future__ import annotations

from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_sparse.errors import require_range

_Kind = TypeVar("_Kind", bound=Callback)


def callbacks_of(trainer: Trainer, kind: type[_Kind]) -> list[_Kind]:
    """The Trainer's callbacks of one class or its sub-classes."""
    return [callback for callback in trainer.callbacks if isinstance(callback, kind)]  # type: ignore[attr-defined]


def move_last(trainer: Trainer, callback: Callback) -> None:
    """Move a callback to the end of the Trainer's list, so that its hooks run after those of the others."""
    trainer.callbacks = [*(c for c in trainer.callbacks if c is not callback), callback]  # type: ignore[attr-defined]


def move_first(trainer: Trainer, callback: Callback) -> None:
    """Move a callback to the start of the Trainer's list, so that its hooks run before those of the others."""
    trainer.callbacks = [callback, *(c for c in trainer.callbacks if c is not callback)]  # type: ignore[attr-defined]


class StepCallback(Callback):
    """Base of callbacks that act after optimizer steps: several batches may accumulate gradients for one step.

    Args:
        every_n_steps: Optimizer steps between two actions, at least 1.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        require_range("every_n_steps", every_n_steps, at_least=1)
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Count from the step at which training starts."""
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Call :meth:`after_step` if the batch ended with an optimizer step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            every = self.every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
            self.after_step(trainer, pl_module, is_due=self._step % every == 0)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, is_due: bool) -> None:
        """Act after an optimizer step.

        Args:
            trainer: The Trainer.
            pl_module: The module in training.
            is_due: Whether the number of steps is a multiple of ``every_n_steps``, or of the Trainer's
                ``log_every_n_steps`` if that is None.
        """
        raise NotImplementedError
