"""Take dead ranks out of the model while it trains, so that steps become cheaper."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import keep_ranks
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.optimizer_state import require_cuttable_after_a_step
from lit_sparse.adapters.statistics import live_ranks_of_all
from lit_sparse.errors import UsageError
from lit_sparse.methods.stepping import holder


class CompactRanks(Callback):
    """Every ``every_n_steps`` optimizer steps, take out the ranks that were dead all the time.

    A rank is dead while its gate, its row of A or its row of Bᵀ is zero. One that was dead after every step since the
    last look has found no use and goes; one that only passed by zero stays. An adapter none of whose ranks was ever
    live has learned nothing yet and stays whole. See :func:`~lit_sparse.compact` for what is cut with a rank. Steps
    become cheaper as ranks die, and checkpoints smaller; they resume as any other. All processes take out the same
    ranks, and then average smaller gradients.

    Args:
        every_n_steps: Optimizer steps between two looks, each of which waits once for the device; also the steps that a
            rank must have been dead. A tenth of a short run, or some hundred steps.

    Raises:
        UsageError: If ``every_n_steps`` < 1, or when training starts: under DDP, which lays out its buffers once, if
            weights are averaged, whose average keeps its shape, or if the optimizer keeps a state that cannot be cut,
            such as quantized moments or the history of LBFGS.
    """

    def __init__(self, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise UsageError(f"every_n_steps must be at least 1; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._step = 0
        self._adapters: dict[str, LowRankAdapter] = {}
        self._live = torch.empty(0, dtype=torch.bool)
        """Which ranks were live after a step since the last look, in the order of the adapters."""
        self._learned = torch.empty(0, dtype=torch.bool)
        """Which adapters had a live rank at some look."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot change its size."""
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
        adapters = dict(adapters_in(pl_module))
        if not adapters:
            raise UsageError(f"{type(pl_module).__name__} holds no adapter to compact. Inject a method first.")
        parameters = [p for adapter in adapters.values() for p in adapter.parameters(recurse=False)]
        require_cuttable_after_a_step(holder(trainer.optimizers, adapters), parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to watch, or go on where a checkpoint was."""
        self._step = trainer.global_step
        self._adapters = dict(adapters_in(pl_module))
        device = next(iter(self._adapters.values())).lora_A.device
        if self._step == 0 or self._live.numel() != sum(self._ranks()) or self._learned.numel() != len(self._adapters):
            self._live = torch.zeros(sum(self._ranks()), dtype=torch.bool)
            self._learned = torch.zeros(len(self._adapters), dtype=torch.bool)
        self._live, self._learned = self._live.to(device), self._learned.to(device)

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
        self._live |= live_ranks_of_all(list(self._adapters.values()))
        if self._step % self.every_n_steps == 0:
            self._compact(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Say so when no rank was taken out, as where a method leaves an entry in every row."""
        if all(adapter.rank == adapter.max_rank for adapter in self._adapters.values()):
            rank_zero_info(f"CompactRanks took no rank out: none was dead at {self.every_n_steps} steps in a row.")

    def state_dict(self) -> dict[str, Any]:
        """Which ranks were live since the last look, and which adapters ever were."""
        return {"live": self._live, "learned": self._learned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that."""
        self._live, self._learned = state_dict["live"], state_dict["learned"]

    def _ranks(self) -> list[int]:
        return [adapter.copies * adapter.rank for adapter in self._adapters.values()]

    def _compact(self, trainer: Trainer) -> None:
        before, seen = self._ranks(), self._live.split(self._ranks())
        self._learned |= torch.stack([live.any() for live in seen])
        live = {name: part | ~learned for name, part, learned in zip(self._adapters, seen, self._learned, strict=True)}
        keep_ranks(self._adapters, live, holder(trainer.optimizers, self._adapters))
        after = self._ranks()
        self._live = self._live.new_zeros(sum(after))
        if sum(after) < sum(before):
            rank_zero_info(f"Step {self._step}: dead ranks taken out: {sum(before) - sum(after)}; {sum(after)} remain.")
