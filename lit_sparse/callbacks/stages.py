"""SoRA's sparsifying schedule: train on with larger and larger thresholds, and keep the best model of each stage."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.imports import RequirementCache

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.statistics import sparsity_of
from lit_sparse.callbacks.measuring import measured
from lit_sparse.callbacks.sparsify import Sparsify
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import save
from lit_sparse.figures.stages import stage_figure
from lit_sparse.functional import threshold_stages

_MATPLOTLIB = RequirementCache("matplotlib")


class ThresholdStages(Callback):
    """Raise the threshold ξ from stage to stage of one run, and draw the metric over what remains.

    The first stage trains with the smallest threshold, each later one goes on from there with the next. In every stage
    the learning rate of a module of this library warms up and decays anew. In the folder, after each stage:
    ``stage-<n>.ckpt``, the checkpoint of its best validation, and ``stages.csv`` with a row for each: threshold, the
    parameters, ranks and metric at that best validation, and the figures of the module on the training rows at the
    stage's end (``train_loss`` …); and with matplotlib ``stages.png``, the metric over the remaining parameters. The
    method's own threshold gives way to that of the first stage.

    Args:
        first: ξ of the first stage, at least 0.
        last: ξ of the last stage, above ``first``.
        count: Number of stages, at least 2.
        monitor: Validation metric that says which model of a stage is best, such as ``val_accuracy``.
        first_epochs: Epochs of the first stage.
        epochs: Epochs of every later stage. The Trainer's ``max_epochs`` must be
            first_epochs + (count - 1) · epochs.
        mode: Whether the ``max`` or the ``min`` of the metric is best.
        spacing: ``linear``, ``log_linear`` or ``exp_linear``, as :func:`~lit_sparse.functional.threshold_stages`.
        folder: Where to write; None: ``stages`` in the logger's folder.

    Raises:
        UsageError: If an argument is outside its range, the run's epochs do not fit, the method has no ``threshold``,
            or the monitored metric is not logged.

    Source:
        Ding et al. 2023 (SoRA, arXiv:2311.11696), Algorithm 1 and the section on memorization and generalization.
    """

    def __init__(
        self,
        first: float,
        last: float,
        count: int,
        monitor: str,
        first_epochs: int,
        epochs: int,
        mode: Literal["max", "min"] = "max",
        spacing: Literal["linear", "log_linear", "exp_linear"] = "linear",
        folder: str | None = None,
    ) -> None:
        if count < 2:
            raise UsageError(f"count is the number of stages, at least 2; got {count}.")
        if min(first_epochs, epochs) < 1:
            raise UsageError(f"first_epochs and epochs are at least 1; got {first_epochs} and {epochs}.")
        if mode not in ("max", "min"):
            raise UsageError(f"mode must be 'max' or 'min'; got {mode!r}.")
        self.thresholds = threshold_stages(first, last, count, spacing)
        self.monitor, self.mode = monitor, mode
        self.first_epochs, self.epochs = first_epochs, epochs
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        """What ``stages.csv`` holds."""
        self._best: dict[str, float] | None = None

    def shares(self) -> list[float]:
        """The share of the run that each stage takes."""
        lengths = [self.first_epochs] + [self.epochs] * (len(self.thresholds) - 1)
        return [length / sum(lengths) for length in lengths]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a run of another length, and one without loggers that does not say where to write."""
        if stage != "fit":
            return
        wanted = self.first_epochs + (len(self.thresholds) - 1) * self.epochs
        if trainer.max_epochs != wanted:
            raise UsageError(
                f"ThresholdStages has {len(self.thresholds)} stages of {self.first_epochs} and then {self.epochs} "
                f"epochs, {wanted} in all, and the Trainer's max_epochs is {trainer.max_epochs}: make them equal."
            )
        if self.folder is None and not trainer.loggers:
            raise UsageError("ThresholdStages needs a folder to write to: give folder, or the Trainer a logger.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first threshold, which a method without one refuses, and find the folder."""
        sparsify = next((c for c in trainer.callbacks if isinstance(c, Sparsify)), None)  # type: ignore[attr-defined]
        if sparsify is None:
            raise UsageError("ThresholdStages sets the threshold of a method, and the Trainer has no Sparsify.")
        self._method = sparsify.method
        self._method.set_threshold(self.thresholds[0])
        self._current = 0
        sparsify.last_stage = sum(self.shares()[:-1])
        folder = self.folder or Path(trainer.log_dir or ".") / "stages"  # on every process: log_dir is broadcast
        self._folder = Path(folder)
        if any("threshold" in adapter.overrides for _, adapter in adapters_in(pl_module)):
            raise UsageError("ThresholdStages sets one threshold for all layers: leave it out of overrides.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the threshold of the stage, be it resumed in the middle of an epoch."""
        if trainer.global_step == 0:
            self.rows, self._best = [], None  # the same callback in a second run
        self._set_threshold(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the threshold of the stage."""
        self._set_threshold(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the model if it is the best of its stage."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise UsageError(
                f"ThresholdStages monitors {self.monitor!r}, which is not logged; there are "
                f"{sorted(trainer.callback_metrics)}."
            )
        # Whether a checkpoint is saved all processes must agree on, though a metric that was not reduced may differ.
        value = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        stage = self._stage(trainer.current_epoch)
        best = self._best
        if best is not None and best["stage"] == stage + 1 and not self._better(value, best[self.monitor]):
            return
        left = sparsity_of([adapter for _, adapter in adapters_in(pl_module)])
        self._best = {
            "stage": stage + 1,
            "threshold": self.thresholds[stage],
            "epoch": trainer.current_epoch,
            "remaining_parameters": int(left["remaining_parameters"]),
            "mean_rank": float(left["mean_rank"]),
            self.monitor: value,
        }
        trainer.save_checkpoint(self._folder / f"stage-{stage + 1}.ckpt")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a stage, write its row."""
        stage = self._stage(trainer.current_epoch)
        if self._stage(trainer.current_epoch + 1) == stage and trainer.current_epoch + 1 < (trainer.max_epochs or 0):
            return
        if self._best is None or self._best["stage"] != stage + 1:
            raise UsageError(
                f"Stage {stage + 1} ended without a validation: set the Trainer's check_val_every_n_epoch."
            )
        batches, data = trainer.train_dataloader or (), getattr(trainer, "datamodule", None)
        trained = measured(pl_module, batches, data, sharded=True)
        self.rows.append({**self._best, **{f"train_{name}": value for name, value in trained.items()}})
        if trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """The stages that are over, and the best validation of the one that is not."""
        return {"rows": [dict(row) for row in self.rows], "best": dict(self._best) if self._best else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with them."""
        self.rows, self._best = list(state_dict["rows"]), state_dict["best"]

    def _set_threshold(self, trainer: Trainer) -> None:
        stage = self._stage(trainer.current_epoch)
        if stage != self._current:
            self._current = stage
            self._method.set_threshold(self.thresholds[stage])
            rank_zero_info(f"Stage {stage + 1} of {len(self.thresholds)}: threshold {self.thresholds[stage]:g}.")

    def _stage(self, epoch: int) -> int:
        if epoch < self.first_epochs:
            return 0
        return min(1 + (epoch - self.first_epochs) // self.epochs, len(self.thresholds) - 1)

    def _better(self, value: float, than: float) -> bool:
        return math.isnan(than) or (value > than if self.mode == "max" else value < than)

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "stages.csv").open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(self.rows[0]))
            writer.writeheader()
            writer.writerows(self.rows)
        if _MATPLOTLIB:
            save(stage_figure(self.rows, self.monitor), self._folder / "stages.png")
