"""Save and requeue a SLURM job between two batches, so that it resumes exactly."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import distributed

from lit_sparse.adapters.processes import is_distributed
from lit_sparse.callbacks.support import move_last

_PERIOD = 2.0
"""Seconds between two collectives: short compared with the notice that a scheduler gives."""

Handler = Callable[[int, FrameType | None], Any]


class SlurmRequeue(Callback):
    """Save and requeue a SLURM job at its signal, with all processes between the same two batches.

    Lightning's own handler acts at once, in the middle of a batch and in each process at another place, so that the
    resumed run differs from the interrupted one. This callback waits until the batch is over and the processes agree
    (about every two seconds, in one collective of two numbers on the CPU). Lightning's handler then writes
    ``hpc_ckpt_….ckpt`` into the Trainer's ``default_root_dir`` and calls ``scontrol requeue``, and the process ends.
    The requeued job, the same command with ``ckpt_path: last``, resumes from that file. Outside of SLURM, or with
    ``SLURMEnvironment(auto_requeue=False)``, the callback does nothing.

    The notice (``#SBATCH --signal=SIGUSR1@120`` for two minutes) must be longer than a batch and than a validation.
    :class:`~lit_sparse.SparseModule` brings this callback.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._requeue: Handler | None = None
        self._received = False
        self._group: Any = None
        self._batches = 0
        self._asked_at = (0, 0.0)
        self._ask_next = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Run after the other callbacks, so that the checkpoint includes their work on the batch."""
        move_last(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Replace Lightning's signal handler, which was set just before."""
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        self._signal = environment.requeue_signal or signal.SIGUSR1
        handler = signal.getsignal(self._signal)
        if not callable(handler):  # Lightning sets none when training runs in another thread
            return
        self._requeue, self._received = handler, False
        self._batches, self._asked_at, self._ask_next = 0, (0, time.monotonic()), 1
        if is_distributed() and self._group is None:
            self._group = distributed.new_group(backend="gloo")
        signal.signal(self._signal, self._note)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        """Save, requeue and exit if any process received the signal.

        Raises:
            SystemExit: With the status that a shell reports for the signal.
        """
        if self._requeue is None or self._signal is None:
            return
        self._batches += 1
        if not self._agreed():
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing sends it to processes that exit anyway
        rank_zero_info(f"SLURM ends the job: saving after step {trainer.global_step} and requeueing.")
        self._requeue(self._signal, None)
        if self._group is not None:
            distributed.barrier(self._group)
        raise SystemExit(128 + self._signal)

    def on_train_end(self, *_: Any) -> None:
        """Restore Lightning's handler."""
        if self._requeue is not None and self._signal is not None:
            signal.signal(self._signal, self._requeue)
            self._requeue = None

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = True

    def _agreed(self) -> bool:
        """Whether any process has received the signal. All processes get the same answer after the same batch."""
        if self._group is None:
            return self._received
        if self._batches < self._ask_next:
            return False
        batches, seconds = self._batches - self._asked_at[0], time.monotonic() - self._asked_at[1]
        answer = torch.tensor([int(self._received), max(1, int(_PERIOD * batches / max(seconds, 1e-3)))])
        distributed.all_reduce(answer, distributed.ReduceOp.MAX, group=self._group)
        received, pause = answer.tolist()
        self._asked_at, self._ask_next = (self._batches, time.monotonic()), self._batches + pause
        return bool(received)
