"""Check while training that all processes hold the same adapters."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, distributed

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import TrainingError, UsageError
from lit_sparse.strategies.replicas import is_distributed


class VerifyReplicas(Callback):
    """Compare the adapters of all processes every so many steps, and stop where they differ, naming the layer.

    Gates and masks are decided in each process from gradients that all share, so that they cannot differ unless
    something is wrong: with the hardware, with gradients that were not synchronized, or with code that changes
    parameters in one process alone. From there on such a run is several runs, which average their gradients.

    What is compared is a hash of the bits of every parameter and buffer of an adapter: gates, A, B, sensitivities.

    Args:
        every_n_steps: Optimizer steps between two comparisons, each of which copies the adapters to the CPU: some
            hundred.

    Raises:
        UsageError: If ``every_n_steps`` < 1.
        TrainingError: While training, in every process, when adapters differ.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps must be at least 1; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare what training starts from."""
        self._step = trainer.global_step
        self._compare(trainer, pl_module)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Compare after a step of the optimizer; batches that only accumulate end at the same step."""
        if trainer.global_step != self._step:
            self._step = trainer.global_step
            if self._step % self.every_n_steps == 0:
                self._compare(trainer, pl_module)

    def _compare(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not is_distributed():
            return
        own = {name: _hashes(adapter) for name, adapter in adapters_in(pl_module)}
        everywhere: list[dict[str, dict[str, str]]] = [{}] * trainer.world_size
        distributed.all_gather_object(everywhere, own)
        for rank, other in enumerate(everywhere):
            for layer, hashes in everywhere[0].items():
                parts = [part for part, value in hashes.items() if other.get(layer, {}).get(part) != value]
                if parts:
                    raise TrainingError(
                        f"At step {self._step} process {rank} holds another {', '.join(parts)} of {layer!r} than "
                        "process 0, and perhaps of more layers. They must be bit for bit the same: go back to a "
                        "checkpoint, and look for code that changes parameters in one process alone, or for a "
                        "machine with faults."
                    )


def _hashes(adapter: LowRankAdapter) -> dict[str, str]:
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in adapter.named_parameters(recurse=False)}
    tensors.update(adapter.named_buffers(recurse=False))
    return {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in tensors.items()}


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().tobytes()
