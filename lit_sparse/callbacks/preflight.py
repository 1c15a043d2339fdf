"""Refuse, before training, callbacks of Lightning's that would fail later."""

from __future__ import annotations

import difflib

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.utilities.parsing import lightning_hasattr

from lit_sparse.errors import UsageError, listed


class Preflight(Callback):
    """Refuses a search for a learning rate, and to monitor a validation metric that the module does not log.

    The short validation before training logs what every validation logs, so a misspelt name need not wait for the end
    of the first epoch. Metrics of training are only known later; Lightning looks for these at its first check.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a ``LearningRateFinder`` that is to set an attribute which the module does not have."""
        if any(_sets_what_is_not_there(callback, pl_module) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                f"LearningRateFinder sets one attribute lr of a module, but {type(pl_module).__name__} takes the rates "
                "of weights and gates from its optimizer. Take the callback out, and compare the losses of short runs "
                "with several values of the optimizer's lr."
            )

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what EarlyStopping and ModelCheckpoint monitor with what was logged."""
        if not type(pl_module).__module__.startswith("lit_sparse."):
            return  # a module of the user's own may leave metrics out of this validation
        # With several validation sets, callback_metrics are only filled by a whole validation.
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


def _sets_what_is_not_there(callback: Callback, module: LightningModule) -> bool:
    if not isinstance(callback, LearningRateFinder) or not callback._update_attr:
        return False
    names = [callback._attr_name] if callback._attr_name else ["lr", "learning_rate"]
    return not any(lightning_hasattr(module, name) for name in names)
