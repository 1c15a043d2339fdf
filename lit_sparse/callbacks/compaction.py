"""Take ranks at zero out of the model while it trains, so that steps become cheaper."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import keep_ranks
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.errors import UsageError
from lit_sparse.methods.stepping import holder


class CompactRanks(Callback):
    """Every ``every_n_steps`` optimizer steps, take the ranks out of the model that were at zero all the time.

    That is, those whose gate was zero after each of the steps since the last look. A gate that only passes by zero
    comes back, and its rank would be lost; one that stays there has found no use. See :func:`~lit_sparse.compact` for
    what goes. Steps become cheaper as ranks die, and checkpoints smaller; they resume as any other. All processes take
    out the same ranks, and then average smaller gradients.

    Args:
        every_n_steps: Optimizer steps between two looks, each of which waits once for the device; also the steps that a
            gate must have been at zero. A tenth of a short run, or some hundred steps.

    Raises:
        UsageError: If ``every_n_steps`` < 1, or when training starts: if no adapter has gates, under DDP, which lays
            out its buffers once, or if weights are averaged, whose average keeps its shape.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps must be at least 1; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._step = 0
        self._adapters: dict[str, LowRankAdapter] = {}
        self._moved: dict[str, Tensor] = {}
        """Sums of |gate| since the last look, by layer: zero where the gate never was another."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot change its size."""
        if not any(adapter.gate is not None for _, adapter in adapters_in(pl_module)):
            raise UsageError(
                "CompactRanks takes out ranks whose gate is zero, and no adapter has gates. Use SoRA or GatedRoseLoRA, "
                "or leave CompactRanks out."
            )
        if isinstance(trainer.strategy, DDPStrategy):
            raise UsageError(
                "CompactRanks does not work under DDP, which lays out its buffers for the sizes at the start. Use "
                "SparseFSDP2Strategy or SparseFSDPStrategy (in the command line fsdp2, fsdp), or compact after "
                "training, by lit_sparse.compact."
            )
        averaging = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
        if averaging:
            raise UsageError(
                f"CompactRanks changes the shapes that {type(averaging[0]).__name__} averages. Leave one of them out."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, or go on where a checkpoint was."""
        self._step = trainer.global_step
        self._adapters = dict(adapters_in(pl_module))
        gates = {name: a.gate.detach() for name, a in self._adapters.items() if a.gate is not None}
        fits = {name: sums.shape for name, sums in self._moved.items()} == {name: g.shape for name, g in gates.items()}
        if trainer.global_step == 0 or not fits:
            self._moved = {name: torch.zeros_like(gate) for name, gate in gates.items()}
        self._moved = {name: sums.to(gates[name]) for name, sums in self._moved.items()}

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Watch after a step of the optimizer; batches that only accumulate end at the same step."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        gates = [self._adapters[name].gate.detach() for name in self._moved]  # type: ignore[union-attr]
        torch._foreach_add_(list(self._moved.values()), torch._foreach_abs(gates))
        if self._step % self.every_n_steps == 0:
            self._compact(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Which gates moved since the last look."""
        return {"moved": dict(self._moved)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that."""
        self._moved = state_dict["moved"]

    def _compact(self, trainer: Trainer) -> None:
        before = sum(adapter.copies * adapter.rank for adapter in self._adapters.values())
        live = {name: sums != 0 for name, sums in self._moved.items()}
        keep_ranks(self._adapters, live, holder(trainer.optimizers, self._adapters))
        after = sum(adapter.copies * adapter.rank for adapter in self._adapters.values())
        for name in self._moved:
            self._moved[name] = torch.zeros_like(self._adapters[name].gate)  # type: ignore[arg-type]
        if after < before:
            rank_zero_info(f"Step {self._step}: {before - after} ranks at zero taken out, {after} remain.")
