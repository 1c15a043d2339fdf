"""Check while training that all processes hold the same adapters."""

from __future__ import annotations

import hashlib

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.processes import is_distributed
from lit_sparse.callbacks.support import StepCallback
from lit_sparse.errors import TrainingError


class VerifyReplicas(StepCallback):
    """Compare the adapters of all processes regularly, and stop training where they differ.

    Every process computes gates and masks itself, from gradients that all processes share. They differ only if
    something is wrong: faulty hardware, gradients that were not synchronized, or code that changes parameters in one
    process alone. The processes then train different models and still average their gradients.

    The comparison takes a hash of the bits of every parameter and buffer of an adapter: gates, A, B, sensitivities.

    Args:
        every_n_steps: Optimizer steps between two comparisons, such as 500. Each copies the adapters to the CPU.

    Raises:
        UsageError: If ``every_n_steps`` < 1.
        TrainingError: While training, in every process, when adapters differ.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the adapters that training starts with."""
        super().on_train_start(trainer, pl_module)
        self._compare(trainer, pl_module)

    def after_step(self, trainer: Trainer, pl_module: LightningModule, is_due: bool) -> None:
        """Compare if it is time."""
        if is_due:
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
                        f"At step {self._step}, {', '.join(parts)} of {layer!r} in process {rank} differ from those "
                        "in process 0. Resume from an earlier checkpoint, and look for code that changes parameters in "
                        "one process alone or for faulty hardware."
                    )


def _hashes(adapter: Adapter) -> dict[str, str]:
    tensors: dict[str, Tensor] = {name: p.detach() for name, p in adapter.named_parameters(recurse=False)}
    tensors.update(adapter.named_buffers(recurse=False))
    bits = {name: tensor.cpu().contiguous().flatten().view(torch.uint8) for name, tensor in tensors.items()}
    return {name: hashlib.sha256(part.numpy().tobytes()).hexdigest() for name, part in bits.items()}
