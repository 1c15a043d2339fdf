"""Leave a SLURM job that is about to end between two batches, where it can go on exactly."""

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

from lit_sparse.strategies.replicas import is_distributed

_PERIOD = 2.0
"""Seconds between two times that processes ask each other: short beside any notice that a scheduler gives."""

Handler = Callable[[int, FrameType | None], Any]


class SlurmRequeue(Callback):
    """Save and requeue a SLURM job at its signal, when all processes are between the same two batches.

    Lightning does so at once, in the middle of a batch, and each process where the signal happens to reach it: what is
    resumed then is not the run that was interrupted. This callback holds Lightning's handler back until the batch is
    over, asks the other processes (every two seconds or so, in one collective of two numbers on the CPU), lets the
    handler write ``hpc_ckpt_….ckpt`` into the Trainer's ``default_root_dir`` and call ``scontrol requeue``, and ends
    the process. The requeued job, the same command with ``ckpt_path: last``, goes on from there. It does nothing
    outside of SLURM and where ``SLURMEnvironment(auto_requeue=False)`` is set.

    The notice (``#SBATCH --signal=SIGUSR1@120`` for two minutes) must be longer than a batch, and than a validation
    where one can come. :class:`~lit_sparse.SparseModule` brings this callback.
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
        """Come last, so that what other callbacks do after a batch is in the checkpoint."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        trainer.callbacks = [*(c for c in callbacks if c is not self), self]  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Take the place of Lightning's handler, which it set just before."""
        environment = trainer._accelerator_connector.cluster_environment
        if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        self._signal = environment.requeue_signal or signal.SIGUSR1
        handler = signal.getsignal(self._signal)
        if not callable(handler):  # training in another thread, where handlers cannot be set
            return
        self._requeue, self._received = handler, False
        self._batches, self._asked_at, self._ask_next = 0, (0, time.monotonic()), 1
        if is_distributed() and self._group is None:
            self._group = distributed.new_group(backend="gloo")
        signal.signal(self._signal, self._note)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Save, requeue and end, if any process was told to.

        Raises:
            SystemExit: To end the process, with the status that a shell reports for the signal.
        """
        if self._requeue is None or self._signal is None:
            return
        self._batches += 1
        if not self._agreed():
            return
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # requeueing sends it to processes that are leaving anyway
        rank_zero_info(f"SLURM ends the job: saving after step {trainer.global_step} and requeueing.")
        self._requeue(self._signal, None)
        if self._group is not None:
            distributed.barrier(self._group)
        raise SystemExit(128 + self._signal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Give the signal back."""
        if self._requeue is not None and self._signal is not None:
            signal.signal(self._signal, self._requeue)
            self._requeue = None

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = True

    def _agreed(self) -> bool:
        """Whether any process has received the signal: all of them find the same, after the same batch."""
        if self._group is None:
            return self._received
        if self._batches < self._ask_next:
            return False
        batches, seconds = self._batches - self._asked_at[0], time.monotonic() - self._asked_at[1]
        told = torch.tensor([int(self._received), max(1, int(_PERIOD * batches / max(seconds, 1e-3)))])
        distributed.all_reduce(told, distributed.ReduceOp.MAX, group=self._group)
        received, pause = told.tolist()
        self._asked_at, self._ask_next = (self._batches, time.monotonic()), self._batches + pause
        return bool(received)
