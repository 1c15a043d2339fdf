"""Save the last state of a run, for any checkpoint callback."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.callbacks.checkpoint_files import read_lightly
from lit_sparse.methods.progress import Progress


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between two batches, where a checkpoint can be saved that resumes exactly."""


def save_end(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Save the current state as a callback's last checkpoint, unless this step is saved already.

    Args:
        callback: Its newest file is saved too if it monitors no metric, or if ``save_last="link"`` needs a target.
        trainer: The Trainer; all processes call this at the same step.
    """
    if callback._should_skip_saving_checkpoint(trainer):
        return
    candidates = callback._monitor_candidates(trainer)
    if callback.save_last == "link":
        callback._save_checkpoint(trainer, callback._get_metric_interpolated_filepath_name(candidates, trainer))
    elif callback.monitor is None:
        callback._save_topk_checkpoint(trainer, candidates)
    callback.current_score = None  # it belongs to an earlier state
    callback._save_last_checkpoint(trainer, candidates)


def finish_plain_checkpoints(trainer: Trainer, progress: Progress | None) -> None:
    """Save the last state with Lightning's own ``ModelCheckpoint``, and warn if its best checkpoint is not final.

    Args:
        trainer: The Trainer with these callbacks.
        progress: How far the run came.
    """
    for callback in trainer.checkpoint_callbacks:
        if type(callback) is not ModelCheckpoint:
            continue
        save_end(callback, trainer)
        best = Path(callback.best_model_path)
        if callback.monitor is None or not trainer.is_global_zero or not best.is_file():
            continue
        found = Progress.in_checkpoint(read_lightly(best))
        if found is not None and progress is not None and not found.final and found.step < progress.step:
            rank_zero_warn(
                f"The best checkpoint by {callback.monitor!r} is of {found}: {best}. lit_sparse.SparseCheckpoint "
                "chooses the best among the states whose sparsity is final."
            )
