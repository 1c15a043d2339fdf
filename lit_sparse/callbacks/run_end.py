"""What is done for checkpoints when a run ends, whichever callback keeps them."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.callbacks.checkpoint_files import read_lightly
from lit_sparse.methods.progress import Progress


class Interrupted(KeyboardInterrupt):
    """Ctrl-C between two batches, where a checkpoint can be saved from which the run goes on exactly."""


def save_end(callback: ModelCheckpoint, trainer: Trainer) -> None:
    """Save the state of now as a callback's last checkpoint, unless this step is saved already.

    Args:
        callback: Without a metric its newest file is saved too; with ``save_last="link"`` a file to link to.
        trainer: In all processes, at the same step.
    """
    if callback._should_skip_saving_checkpoint(trainer):
        return
    candidates = callback._monitor_candidates(trainer)
    if callback.save_last == "link":
        callback._save_checkpoint(trainer, callback._get_metric_interpolated_filepath_name(candidates, trainer))
    elif callback.monitor is None:
        callback._save_topk_checkpoint(trainer, candidates)
    callback.current_score = None  # that of a state before
    callback._save_last_checkpoint(trainer, candidates)


def finish_plain_checkpoints(trainer: Trainer, progress: Progress | None) -> None:
    """Bring the files of Lightning's own ``ModelCheckpoint`` to the end of the run, and warn of a best that is dense.

    Args:
        trainer: Whose callbacks are looked through.
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
                f"The best checkpoint by {callback.monitor!r} is of {found}: {best}. Use lit_sparse.SparseCheckpoint, "
                "which chooses among the states whose sparsity is final."
            )
