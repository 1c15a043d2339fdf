"""Checkpoints for sparse training: ``last`` is the end of the run, ``best`` has its final sparsity."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_sparse.callbacks.run_end import Interrupted, save_end
from lit_sparse.callbacks.sparsify import progress_of
from lit_sparse.errors import UsageError, require_choice


class SparseCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` for runs in which adapters become sparse.

    - ``last.ckpt`` is written at every save, whether or not the monitored metric improved. It is written again at the
      end of the run: after ``max_steps``, ``max_time`` or ``EarlyStopping``, and in a single process after Ctrl-C or
      SIGTERM between two batches. Lightning's own class rewrites it only together with a better checkpoint.
    - With ``monitor``, "best" is chosen among the validated states whose sparsity is final. RoseLoRA's masks and the
      ranks of a ``budget`` are final once their schedule has ended (``end``). Thresholds shrink the gates of SoRA and
      GatedRoseLoRA at every step until ``refit`` begins. Without ``refit`` only the end of the run is final, or the
      last stage of :class:`~lit_sparse.ThresholdStages`. HardConcreteLoRA without a ``budget`` is final at the end of
      the run. SpIEL, and LIFT with ``update_every``, are final after their last choice of entries. LoRA, SHiRA and
      LIFT without ``update_every`` have no schedule: all their states are final. If no validated state was final,
      "best" is the last checkpoint, and a warning says so.

    Files hold the metrics of the validation of their step, for the model card of an export.

    If ``last.ckpt`` belongs to another run, the file is named ``last-v1.ckpt``, as in Lightning.

    Args:
        dirpath: Folder for the checkpoints; None: ``checkpoints`` in the logger's folder.
        save_last: Keep ``last.ckpt``.
        best_of: ``final``: choose "best" as above. ``all``: choose it among all validated states, whatever their
            sparsity.
        options: Further arguments of ``ModelCheckpoint``: ``monitor``, ``mode``, ``filename``, ``save_top_k`` …

    Raises:
        UsageError: If ``save_last`` is ``"link"``, ``filename`` is ``last``, or ``best_of`` is unknown.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        save_last: bool = True,
        best_of: Literal["final", "all"] = "final",
        **options: Any,
    ) -> None:
        if not isinstance(save_last, bool):
            raise UsageError(f"save_last must be true or false; got {save_last!r}.")
        require_choice("best_of", best_of, ("final", "all"))
        if options.get("filename") == self.CHECKPOINT_NAME_LAST:
            raise UsageError("filename 'last' is reserved for the last state of the run: choose another filename.")
        super().__init__(dirpath, save_last=save_last, **options)
        self.best_of = best_of
        self._validated_at: int | None = None  # step of the last validation, which gave the monitored metric
        self._validated_final = True  # whether the sparsity was final then
        self._metrics: dict[str, float] = {}  # of that validation

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget validations of an earlier run."""
        super().on_train_start(trainer, pl_module)
        self._validated_at, self._validated_final, self._metrics = None, True, {}
        if trainer.global_step == 0:
            self._last_global_step_saved = 0  # this callback may be in its second run

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, and save ``last`` even if Lightning defers the choice of the best to a validation."""
        self._metrics = {}  # those of an earlier step
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            saved = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved  # so that a validation after this step still chooses the best
        self._defer_save_until_validation |= waited

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time; choose the best again if this step was saved before it was validated."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated_at, self._validated_final = trainer.global_step, _is_final(trainer)
            named = trainer.callback_metrics.items()
            self._metrics = {name: float(value) for name, value in named if name.startswith("val_")}
            saved_before = self._last_global_step_saved == trainer.global_step and not self._every_n_epochs
            if saved_before and self.monitor is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the last state, unless it is saved already."""
        save_end(self, trainer)
        if self.monitor is None or self.best_k_models or self.save_top_k == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.save_last:
            self.best_model_path = self.last_model_path
        else:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        rank_zero_warn(
            f"No state with final sparsity was validated by {self.monitor!r}. The last checkpoint counts as the best: "
            f"{self.best_model_path}."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """In a single process, save the state at Ctrl-C or SIGTERM between two batches."""
        between = isinstance(exception, Interrupted | SIGTERMException) and trainer.training
        if between and trainer.world_size == 1:
            save_end(self, trainer)
        super().on_exception(trainer, pl_module, exception)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's state, and the metrics of the state that is saved; none if it was not validated."""
        return {**super().state_dict(), "metrics": self._metrics}

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the state is kept: its metric is among the best, and its sparsity is final."""
        return self._may_be_best(trainer) and super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_top_k == -1 and not self._may_be_best(trainer):  # all states are kept, this one not as the best
            self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(monitor_candidates, trainer))
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # Lightning then saves the last checkpoint too

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is not None:  # record the score of this state, not that of the last best one
            validated = self._validated_at == trainer.global_step
            self.current_score = monitor_candidates.get(self.monitor) if validated else None
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _may_be_best(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.best_of == "all":
            return True
        return self._validated_final and _is_final(trainer)


def _is_final(trainer: Trainer) -> bool:
    """Whether adapters have the sparsity of the run's end; always without a :class:`~lit_sparse.Sparsify`."""
    progress = progress_of(trainer)
    return progress is None or progress.final
