"""SoRA's sparsifying schedule: raise the threshold from stage to stage, and keep the best model of each."""

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
from lit_sparse.callbacks.sparsify import Sparsify, total_steps
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.figures.canvas import save
from lit_sparse.figures.stages import stage_figure
from lit_sparse.functional import threshold_stages
from lit_sparse.strategies.support import root_gathered

_MATPLOTLIB = RequirementCache("matplotlib")


class ThresholdStages(Callback):
    """Raise the threshold ξ from stage to stage of one run, and plot the metric over the remaining parameters.

    The first stage trains with the smallest threshold, which replaces the method's own. Each later stage continues with
    the next threshold. For modules of this library, the learning rate warms up and decays again in every stage. After
    each stage the folder contains:

    - ``stage-<n>.ckpt``, the checkpoint of the stage's best validation;
    - ``stages.csv``, with a row per stage: threshold; parameters, mean rank and metric at the best validation; and the
      module's metrics on the training rows at the end of the stage (``train_loss`` …);
    - with matplotlib ``stages.png``, the metric over the remaining parameters.

    Args:
        first: ξ of the first stage, at least 0.
        last: ξ of the last stage, above ``first``.
        count: Number of stages, at least 2.
        monitor: Validation metric that selects the best model of a stage, such as ``val_accuracy``.
        first_epochs: Epochs of the first stage.
        epochs: Epochs of every later stage. The Trainer's ``max_epochs`` must be
            first_epochs + (count - 1) · epochs.
        mode: Whether the ``max`` or the ``min`` of the metric is best.
        spacing: ``linear``, ``log_linear`` or ``exp_linear``, see :func:`~lit_sparse.functional.threshold_stages`.
        folder: Folder for the files; None: ``stages`` in the logger's folder.

    Raises:
        UsageError: If an argument is outside its range, ``max_epochs`` does not fit, the method has no ``threshold``
            or no longer uses it in the last stage (``refit``), or the monitored metric is not logged.

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
        require_range("count", count, at_least=2)
        require_range("first_epochs", first_epochs, at_least=1)
        require_range("epochs", epochs, at_least=1)
        require_choice("mode", mode, ("max", "min"))
        self.thresholds = threshold_stages(first, last, count, spacing)
        self.monitor, self.mode = monitor, mode
        self.first_epochs, self.epochs = first_epochs, epochs
        self.folder = folder
        self.rows: list[dict[str, float]] = []
        """The rows of ``stages.csv``."""
        self._best: dict[str, float] | None = None

    def shares(self) -> list[float]:
        """Share of the run that each stage takes."""
        lengths = self._lengths()
        return [length / sum(lengths) for length in lengths]

    def _lengths(self) -> list[int]:
        return [self.first_epochs] + [self.epochs] * (len(self.thresholds) - 1)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a run of another length, and one without a folder to write to."""
        if stage != "fit":
            return
        if trainer.max_epochs != sum(self._lengths()):
            raise UsageError(
                f"The stages take {self._lengths()} epochs: set the Trainer's max_epochs to {sum(self._lengths())}; "
                f"got {trainer.max_epochs}."
            )
        if self.folder is None and not trainer.loggers:
            raise UsageError("ThresholdStages needs a folder to write to: set folder, or give the Trainer a logger.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the first threshold, which a method without one refuses, and find the folder."""
        sparsify = next(iter(callbacks_of(trainer, Sparsify)), None)
        if sparsify is None:
            raise UsageError("ThresholdStages sets the threshold of a method, but the Trainer has no Sparsify.")
        self._method = sparsify.method
        self._method.set_threshold(self.thresholds[0])
        self._current = 0
        sparsify.last_stage = sum(self.shares()[:-1])
        folder = self.folder or Path(trainer.log_dir or ".") / "stages"  # in every process: log_dir is broadcast
        self._folder = Path(folder)
        if any("threshold" in adapter.overrides for _, adapter in adapters_in(pl_module)):
            raise UsageError("ThresholdStages sets one threshold for all layers: remove threshold from overrides.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the threshold of the stage, also after a resume in the middle of an epoch."""
        if trainer.global_step == 0:
            self.rows, self._best = [], None  # this callback may be in its second run
        total = total_steps(trainer)
        stay, begins = self._method.ranks_stay_after(total), round(sum(self.shares()[:-1]) * (total or 0))
        if stay is not None and stay <= begins:
            raise UsageError(
                f"The method pulls at gates until step {stay} of {total}, and the last stage begins at step {begins}. "
                "Lower refit, or raise epochs."
            )
        self._set_threshold(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Set the threshold of the stage."""
        self._set_threshold(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the model if it is the best of its stage."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor not in trainer.callback_metrics:
            raise UsageError(
                f"ThresholdStages monitors {self.monitor!r}, which is not logged. Metrics are "
                f"{sorted(trainer.callback_metrics)}."
            )
        # All processes must agree whether to save a checkpoint, but a metric that was not reduced may differ.
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
                f"Stage {stage + 1} ended without a validation: lower the Trainer's check_val_every_n_epoch."
            )
        batches, data = trainer.train_dataloader or (), getattr(trainer, "datamodule", None)
        with root_gathered(trainer.strategy.model):
            trained = measured(pl_module, batches, data, sharded=True)
        self.rows.append({**self._best, **{f"train_{name}": value for name, value in trained.items()}})
        if trainer.is_global_zero:
            self._write()

    def state_dict(self) -> dict[str, Any]:
        """Rows of the finished stages, and the best validation of the current one."""
        return {"rows": [dict(row) for row in self.rows], "best": dict(self._best) if self._best else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them."""
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
