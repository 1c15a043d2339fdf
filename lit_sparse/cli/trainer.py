"""The Trainer of the command line, and the file of its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.cli import SaveConfigCallback
from rich.progress import BarColumn, TimeRemainingColumn
from rich.table import Column

from lit_sparse.adapters.injection import inject
from lit_sparse.callbacks.checkpoint_files import is_remote
from lit_sparse.editing.data import EditingData
from lit_sparse.editing.editor import Editor
from lit_sparse.editing.measuring import text_table
from lit_sparse.errors import UsageError
from lit_sparse.methods.method import Method
from lit_sparse.modules.base import SparseModule
from lit_sparse.reporting.dry_run import describe
from lit_sparse.verbosity import show

_BESIDE_METRICS = 33  # columns of a terminal for the epoch, the bar, batches and time


class SparseTrainer(Trainer):
    """Lightning's Trainer with two more commands, ``inspect`` and ``edit``."""

    def inspect(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,  # noqa: ARG002
    ) -> None:
        """List the layers that a configuration would adapt; ``inspect SOURCE`` lists stored adapters instead.

        No weights are loaded and nothing is trained.

        Args:
            model: A module that has adapters after ``configure_model``.
            datamodule: Its data, read only if the module takes the number of labels from it.
            ckpt_path: Must be None; the configurations that ``fit`` writes contain it.
            weights_only: Ignored, likewise.
        """
        if ckpt_path is not None:
            raise UsageError("inspect with a configuration reads no checkpoint: omit ckpt_path, or give inspect FILE.")
        self.strategy.connect(model)
        model.trainer = self
        if datamodule is not None:
            self.datamodule = datamodule
            datamodule.trainer = self
            if getattr(model, "num_labels", 0) is None:
                datamodule.prepare_data()
                datamodule.setup("fit")
        with torch.device("meta"):
            model.configure_model()
        if isinstance(model, Editor):
            # An Editor injects adapters for each edit only.
            if not isinstance(model.method, Method):
                raise UsageError(f"inspect lists adapters, but {type(model.method).__name__} uses none.")
            with torch.device("meta"):
                inject(model.model, model.method)
        backbone = model.model if isinstance(model, SparseModule | Editor) else None
        method = getattr(model, "method", None)
        text = describe(backbone or model, method if isinstance(method, Method) else None)
        sys.stdout.write(text + "\n")

    def edit(self, model: Editor, datamodule: EditingData) -> None:
        """Edit facts by the requests of a file, and measure each; ``edit fact`` edits one fact.

        Args:
            model: The editor.
            datamodule: The requests.
        """
        self.test(model, datamodule, verbose=False)
        if self.is_global_zero:
            sys.stdout.write(f"{text_table(model.summary)}\n")
            show(f"Wrote {model.output}.")


class OneLineBar(RichProgressBar):
    """Lightning's progress bar without the speed and the number of the run, so that the metrics stay on its line."""

    def __init__(self) -> None:
        super().__init__(theme=RichProgressBarTheme(metrics_format=".3g"))

    def configure_columns(self, trainer: Trainer) -> list[Any]:
        """Description, bar, batches and the time that remains; the metrics come after them."""
        description, _, batches, *_ = super().configure_columns(trainer)
        return [description, BarColumn(bar_width=8), batches, TimeRemainingColumn(compact=True)]

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """All but the number of the run."""
        metrics: dict[str, Any] = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    def _get_train_description(self, current_epoch: int) -> str:
        if self.trainer.max_epochs == -1:  # only max_steps ends the run: there is no last epoch to show
            return f"Epoch {current_epoch}".ljust(len(self.validation_description))
        text: str = super()._get_train_description(current_epoch)
        return text

    def _init_progress(self, trainer: Trainer) -> None:
        super()._init_progress(trainer)
        if self.progress is not None:  # Lightning adds the column of the metrics itself, and lets it wrap
            room = max(20, self.progress.console.width - _BESIDE_METRICS)
            column = Column(no_wrap=True, overflow="ellipsis", max_width=room)
            self.progress.columns[-1]._table_column = column  # type: ignore[union-attr]


class SaveRunConfig(SaveConfigCallback):
    """Save the configuration of a run beside its logs, replacing that of an earlier run but never a user's own file.

    Without a logger it is saved in the current folder. If that has a ``config.yaml`` of the user's, the name is
    ``run_config.yaml``.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the name, and save."""
        folder = trainer.log_dir  # in all processes: it is broadcast
        if trainer.is_global_zero and folder is not None and not is_remote(folder):
            file = Path(folder) / self.config_filename
            given = [Path(str(path)).resolve() for path in self.config.get("config") or []]
            # Lightning's files begin with a comment that names it.
            if file.is_file() and (file.resolve() in given or not file.read_bytes().startswith(b"# lightning")):
                self.config_filename = "run_config.yaml"
        super().setup(trainer, pl_module, stage)
