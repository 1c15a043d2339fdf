"""Refuse before training what Lightning's callbacks would refuse later."""

from __future__ import annotations

import difflib

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.parsing import lightning_hasattr

from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError, listed


class Preflight(Callback):
    """Refuse a search for an attribute that is missing, and callbacks that monitor a metric which is not logged.

    The sanity check before training logs all validation metrics, so a misspelt name is found before the first epoch.
    Lightning itself checks training metrics, once they exist.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a ``LearningRateFinder`` that would set an attribute which the module lacks."""
        for finder in callbacks_of(trainer, LearningRateFinder):
            names = [finder._attr_name] if finder._attr_name else ["lr", "learning_rate"]
            if finder._update_attr and not any(lightning_hasattr(pl_module, name) for name in names):
                raise UsageError(
                    f"LearningRateFinder sets the attribute {listed(names)}, which {type(pl_module).__name__} lacks. "
                    "Leave out its attr_name, or set update_attr to false."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Make the optimizer and its schedule again with the rate that a ``LearningRateFinder`` found.

        Lightning sets that rate in all groups, those of gates too, and the schedule would undo it at the first step.
        """
        if any(finder._update_attr for finder in callbacks_of(trainer, LearningRateFinder)):
            trainer.strategy.setup_optimizers(trainer)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the metrics that EarlyStopping and ModelCheckpoint monitor with those that were logged."""
        if not type(pl_module).__module__.startswith("lit_sparse."):
            return  # a user's module may log fewer metrics in the sanity check
        # With several validation sets, only a whole validation fills callback_metrics.
        results = [result.meta for result in (trainer._results or {}).values()]
        logged = sorted({*trainer.callback_metrics, *(meta.name for meta in results if meta.on_epoch)})
        for callback in [*trainer.early_stopping_callbacks, *trainer.checkpoint_callbacks]:
            monitor = getattr(callback, "monitor", None)
            if monitor is None or not monitor.startswith("val") or monitor in logged:
                continue
            close = difflib.get_close_matches(monitor, logged, n=1)
            raise UsageError(
                f"{type(callback).__name__} monitors {monitor!r}, but validation logs {listed(logged)} only."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
