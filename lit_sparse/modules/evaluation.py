"""One evaluation loop behind validation, test and :class:`~lit_sparse.ForgettingProbe`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_sparse.callbacks.measuring import Mean, Metrics, measure_loss, results


class EvaluationLoop(LightningModule):
    """Validates and tests a module by its own metrics: sub-classes override ``make_metrics`` and ``measure``.

    A single validation set logs ``val_loss`` and so on. Several sets log ``val_matched_loss`` and so on by the
    ``validation_names`` of the data module, or ``val_0_loss`` where it names none. Test sets log ``test_loss``, by
    ``test_names``.
    """

    def make_metrics(self) -> Metrics:
        """New metrics of one data set, by the names that they are logged by."""
        return {"loss": Mean()}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics with a batch.

        Args:
            batch: A batch of the set, on the module's device.
            metrics: The metrics of the set, as :meth:`make_metrics` made them.
            data: The data module that the batch comes from, if there is one.
            name: The data module's name for the set; "" if it has none.
        """
        measure_loss(self, batch, metrics)

    def on_validation_epoch_start(self) -> None:
        """Make the metrics of each validation set."""
        self._start_sets("validation", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Make the metrics of each test set."""
        self._start_sets("test", len(self.trainer.num_test_batches))

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Update the metrics of a validation or test set."""
        self.measure(batch, self._metrics[dataloader_idx], self._data, self._set_names[dataloader_idx])

    test_step = validation_step

    def _log_loss(self, loss: Tensor) -> None:
        """Log the loss of a training step. The bar shows it when loggers are written to, on a CPU after every batch."""
        self.log("train_loss", loss.detach())
        # Lightning reads what the bar shows after every batch, and would wait for a device each time.
        trainer: Any = self._trainer
        if trainer is None:
            return
        if loss.device.type == "cpu" or trainer.global_step % max(1, trainer.log_every_n_steps) == 0:
            self.log("loss", loss.detach().cpu(), prog_bar=True, logger=False)

    # Metrics are those of all processes already; without sync_dist Lightning warns.
    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation sets."""
        self.log_dict(self._results("val"), prog_bar=True, sync_dist=True)

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test sets."""
        self.log_dict(self._results("test"), prog_bar=True, sync_dist=True)

    def _start_sets(self, stage: str, count: int) -> None:
        names = tuple(getattr(self._data, f"{stage}_names", ()))
        self._set_names = names if len(names) == count else ("",) * count
        # Made anew for every epoch: metrics that were reset in validate's inference mode could not be updated in fit.
        self._metrics = [
            {name: metric.to(self.device) for name, metric in self.make_metrics().items()} for _ in range(count)
        ]

    def _results(self, stage: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for number, (name, metrics) in enumerate(zip(self._set_names, self._metrics, strict=True)):
            middle = name or (str(number) if len(self._metrics) > 1 else "")
            prefix = f"{stage}_{middle}_" if middle else f"{stage}_"
            found.update({f"{prefix}{metric}": value for metric, value in results(metrics).items()})
        return found

    @property
    def _data(self) -> Any:
        """The Trainer's data module; None without one."""
        return getattr(self._trainer, "datamodule", None)
