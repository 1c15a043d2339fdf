"""Checkpoints that are what they are called: ``last`` is the end of the run, ``best`` is as sparse as it."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_sparse.callbacks.run_end import Interrupted, save_end
from lit_sparse.callbacks.sparsify import Sparsify
from lit_sparse.errors import UsageError


class SparseCheckpoint(ModelCheckpoint):
    """Lightning's ``ModelCheckpoint`` for runs in which adapters become sparse.

    - ``last.ckpt`` is written at every occasion to save, whether or not the monitored metric improved, and again at the
      end of the run, however it ends: by ``max_steps``, ``max_time`` or ``EarlyStopping``, or in a single process by
      Ctrl-C or SIGTERM between two batches. Lightning's own rewrites it only together with a better checkpoint.
    - With ``monitor``, "best" is chosen among the validated states whose sparsity is final. The masks of RoseLoRA are
      final from the step at which their schedule ends (``end``). The gates of SoRA and GatedRoseLoRA are pulled towards
      zero at every step, so that only the state at the end of the run is final, or with
      :class:`~lit_sparse.ThresholdStages` the last stage. LoRA has no schedule: all its states are final. Where no
      validated state was final, "best" is the last checkpoint, and a line at the end of the run says so.

    Where ``last.ckpt`` exists already and belongs to another run, the name is ``last-v1.ckpt``, as Lightning's.

    Args:
        dirpath: Folder for the checkpoints; None: ``checkpoints`` in the logger's folder.
        save_last: Keep ``last.ckpt``.
        best_of: ``final``: choose "best" as above. ``all``: among all validated states, also those that are not as
            sparse as the run's end.
        options: The other arguments of ``ModelCheckpoint``: ``monitor``, ``mode``, ``filename``, ``save_top_k`` …

    Raises:
        UsageError: If ``save_last`` is ``"link"``, ``filename`` is ``last``, or ``best_of`` is something else.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        save_last: bool = True,
        best_of: Literal["final", "all"] = "final",
        **options: Any,
    ) -> None:
        if not isinstance(save_last, bool):
            raise UsageError(f"save_last is true or false: last.ckpt is a file, not a link; got {save_last!r}.")
        if best_of not in ("final", "all"):
            raise UsageError(f"best_of must be 'final' or 'all'; got {best_of!r}.")
        if options.get("filename") == self.CHECKPOINT_NAME_LAST:
            raise UsageError("filename 'last' is the name of the run's last state: give the best another name.")
        super().__init__(dirpath, save_last=save_last, **options)
        self.best_of = best_of
        self._validated_at: int | None = None  # the step of the last validation, from which the metric is,
        self._validated_final = True  # and whether the sparsity was final then

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch for validations."""
        super().on_train_start(trainer, pl_module)
        self._validated_at, self._validated_final = None, True
        if trainer.global_step == 0:
            self._last_global_step_saved = 0  # the same callback in a second run

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time; ``last`` too where Lightning waits for the next validation to choose the best."""
        waited, self._defer_save_until_validation = self._defer_save_until_validation, False
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._defer_save_until_validation and not self._should_skip_saving_checkpoint(trainer):
            saved = self._last_global_step_saved
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = saved  # so that the validation after this step still chooses
        self._defer_save_until_validation |= waited

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if it is time; choose anew if this step was saved before it was validated."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._validated_at, self._validated_final = trainer.global_step, _is_final(trainer)
            saved_before = self._last_global_step_saved == trainer.global_step and not self._every_n_epochs
            if saved_before and self.monitor is not None and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Save the state that the run ends with, unless it is saved already."""
        save_end(self, trainer)
        if self.monitor is None or self.best_k_models or self.save_top_k == 0 or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.save_last:
            self.best_model_path = self.last_model_path
        else:
            self._save_none_monitor_checkpoint(trainer, self._monitor_candidates(trainer))
        rank_zero_warn(
            f"No state was validated by {self.monitor!r} once its sparsity was final: the best checkpoint is the last, "
            f"{self.best_model_path}."
        )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state at Ctrl-C or SIGTERM between two batches of a single process."""
        between = isinstance(exception, Interrupted | SIGTERMException) and trainer.training
        if between and trainer.world_size == 1:
            save_end(self, trainer)
        super().on_exception(trainer, pl_module, exception)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether the state is to be kept: it is among the best, and its sparsity is final."""
        return self._may_be_best(trainer) and super().check_monitor_top_k(trainer, current)

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        super()._save_topk_checkpoint(trainer, monitor_candidates)
        if self.save_top_k == -1 and not self._may_be_best(trainer):  # kept, as all are, but not to choose from
            self._save_checkpoint(trainer, self._get_metric_interpolated_filepath_name(monitor_candidates, trainer))
        if self.save_last:
            self._last_global_step_saved = trainer.global_step  # then Lightning goes on to save the last

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if self.monitor is not None:  # the score of this state, not of the last that was among the best
            validated = self._validated_at == trainer.global_step
            self.current_score = monitor_candidates.get(self.monitor) if validated else None
        super()._save_last_checkpoint(trainer, monitor_candidates)

    def _may_be_best(self, trainer: Trainer) -> bool:
        if self.monitor is None or self.best_of == "all":
            return True
        return self._validated_final and _is_final(trainer)


def _is_final(trainer: Trainer) -> bool:
    """Whether adapters are as sparse as in the end; without a :class:`~lit_sparse.Sparsify` always."""
    sparsify = next((c for c in trainer.callbacks if isinstance(c, Sparsify)), None)  # type: ignore[attr-defined]
    progress = None if sparsify is None else sparsify.progress(trainer.global_step)
    return progress is None or progress.final
