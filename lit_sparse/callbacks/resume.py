"""Exact resume: a run that was killed ends as if it had not been."""

from __future__ import annotations

import logging
import random
import signal
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor, distributed, nn

from lit_sparse.adapters.naming import clean_name
from lit_sparse.adapters.processes import is_distributed
from lit_sparse.callbacks.checkpoint_files import WholeFiles, furthest_first, is_remote, last_checkpoint, read_lightly
from lit_sparse.callbacks.run_end import Interrupted
from lit_sparse.callbacks.support import move_last
from lit_sparse.errors import UsageError
from lit_sparse.foreign_errors import is_lost_process
from lit_sparse.strategies.replicas import average_gradients

_log = logging.getLogger(__name__)

RANDOM_STATES = "random_states"
"""Checkpoint entry with the states of the random number generators of every process."""
GRADIENTS = "gradients"
"""Checkpoint entry with gradients that are still accumulating, by parameter name."""


class ExactResume(Callback):
    """Save with each checkpoint what a resumed run needs to continue exactly.

    - Checkpoints contain the states of the random number generators (torch on CPU and GPU, numpy, Python) of every
      process, and the gradients so far if an optimizer step is half accumulated.
    - A new checkpoint is written beside the old file and then replaces it, so that one of them survives if the process
      is killed. Checksums are verified before a file is read. A damaged file named ``last…`` is replaced by the newest
      undamaged checkpoint of its folder, with a warning; any other damaged file is an error.
    - Ctrl-C stops a single process between two batches. If one of several processes fails, the others log that.

    With a data loader that saves its position (those of this package, or torchdata's ``StatefulDataLoader``), a resumed
    run on a CPU equals the uninterrupted one bit for bit, also from the middle of an epoch. Random numbers drawn in
    worker processes differ. :class:`~lit_sparse.SparseModule` brings this callback.

    Raises:
        UsageError: If a checkpoint to read is damaged, processes read different ones, or a folder for checkpoints
            cannot be written to.
    """

    def __init__(self) -> None:
        self._states: list[dict[str, Any]] | None = None
        self._gradients: dict[str, Tensor] = {}
        self._interrupt: Any = None
        """The handler of Ctrl-C before training."""
        self._interrupted = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Run after the other callbacks, and use :class:`WholeFiles` unless the user has a checkpoint plugin."""
        move_last(trainer, self)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeFiles()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Test now, not after an epoch, whether the folders for checkpoints can be written to."""
        for folder in _checkpoint_folders(trainer) if trainer.is_global_zero else ():
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UsageError(
                    f"Checkpoints cannot be written to {folder!r} ({error.strerror}). Set dirpath of ModelCheckpoint "
                    "to another folder."
                ) from error

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the states of all processes; every process calls this."""
        checkpoint[RANDOM_STATES] = _of_all_processes(_random_state())
        if _is_accumulating(trainer):
            checkpoint[GRADIENTS] = _gradients(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Keep them until training starts."""
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._states = checkpoint.get(RANDOM_STATES) if fitting else None
        self._gradients = checkpoint.get(GRADIENTS, {}) if fitting else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore them, as the last thing before training continues."""
        steps = _of_all_processes(trainer.global_step)
        if len(set(steps)) > 1:
            raise UsageError(
                f"The processes resumed at different steps, {steps}, because they found different checkpoints. Keep "
                "checkpoints on a file system that all nodes share, or set ckpt_path to one file."
            )
        states, self._states = self._states, None
        gradients, self._gradients = self._gradients, {}
        parameters = {clean_name(name): parameter for name, parameter in pl_module.named_parameters()}
        for name, gradient in gradients.items():
            parameters[name].grad = gradient.to(parameters[name])
        self._hold_interrupts(trainer)
        if states is None:
            return
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"The checkpoint was written by {len(states)} processes and is resumed by {trainer.world_size}: random "
                "numbers, such as dropout, differ from the uninterrupted run."
            )
            return
        _set_random_state(states[trainer.global_rank])

    def on_train_batch_end(self, *_: Any) -> None:
        """Stop if Ctrl-C was pressed during the batch."""
        if self._interrupted:
            raise Interrupted

    def on_train_end(self, *_: Any) -> None:
        """Restore the handler of Ctrl-C."""
        self._release_interrupts()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Log how to resume an interrupted run, and that another process is gone."""
        self._release_interrupts()
        interrupted = isinstance(exception, KeyboardInterrupt | SIGTERMException)
        if interrupted and trainer.state.fn == TrainerFn.FITTING and trainer.is_global_zero:
            _log.warning("Interrupted at optimizer step %d. %s", trainer.global_step, _how_to_resume(trainer))
        if is_distributed() and is_lost_process(exception):
            _log.error(
                "Process %d of %d lost another process, which was killed or failed; see the output of that process. "
                "Start again with ckpt_path 'last' to resume from the last checkpoint.",
                trainer.global_rank,
                trainer.world_size,
            )

    def _hold_interrupts(self, trainer: Trainer) -> None:
        """Delay Ctrl-C to the end of a batch, if a single process trains in the main thread."""
        self._interrupted = False
        if trainer.world_size > 1 or threading.current_thread() is not threading.main_thread():
            return

        def note(signum: int, frame: FrameType | None) -> None:  # noqa: ARG001
            if self._interrupted or not trainer.training:
                self._release_interrupts()
                raise KeyboardInterrupt
            self._interrupted = True
            _log.warning("Stopping after this batch; press Ctrl-C again to stop at once.")

        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._interrupt = signal.signal(signal.SIGINT, note)

    def _release_interrupts(self) -> None:
        if self._interrupt is not None:
            signal.signal(signal.SIGINT, self._interrupt)
            self._interrupt = None


def _checkpoint_folders(trainer: Trainer) -> list[str]:
    """Local folders that checkpoint callbacks write to."""
    folders = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    return [str(folder) for folder in folders if folder is not None and not is_remote(folder)]


def _how_to_resume(trainer: Trainer) -> str:
    found = [last_checkpoint(folder) for folder in _checkpoint_folders(trainer)]
    furthest = next(iter(furthest_first(file for file in found if file is not None)), None)
    if furthest is None:
        return "No checkpoint was written yet."
    step = read_lightly(furthest).get("global_step", "unknown")
    return f"The last checkpoint is {furthest} of step {step}: resume with fit --ckpt_path."


def _is_accumulating(trainer: Trainer) -> bool:
    """Whether the next batch adds to the gradients so far."""
    batches = trainer.fit_loop.epoch_loop.batch_progress
    return not batches.is_last_batch and batches.current.ready % trainer.accumulate_grad_batches != 0


@torch.no_grad()
def _gradients(module: LightningModule) -> dict[str, Tensor]:
    """Gradients of all trained parameters, averaged over processes, each of which accumulated its own."""
    copies: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            copy = copies[clean_name(name)] = nn.Parameter(parameter.detach())
            copy.grad = None if parameter.grad is None else parameter.grad.clone()
    average_gradients(list(copies.values()))
    return {name: copy.grad for name, copy in copies.items() if copy.grad is not None}


def _random_state() -> dict[str, Any]:
    """States of all generators as plain values and tensors, for ``weights_only`` loading."""
    numpy_state: dict[str, Any] = np.random.get_state(legacy=False)
    keys = torch.from_numpy(numpy_state["state"]["key"].astype(np.int64))
    state = {
        "torch": torch.get_rng_state(),
        "numpy": {**numpy_state, "state": {**numpy_state["state"], "key": keys}},
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    inner = state["numpy"]["state"]
    key = inner["key"].cpu().numpy().astype(np.uint32)
    np.random.set_state({**state["numpy"], "state": {**inner, "key": key}})
    random.setstate(state["python"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _of_all_processes(value: Any) -> list[Any]:
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values
