"""Take dead ranks out of the model while it trains, so that steps become cheaper."""

from __future__ import annotations

from collections.abc import Mapping
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
from lit_sparse.adapters.optimizer_state import require_cuttable_after_a_step
from lit_sparse.adapters.statistics import live_ranks_of_all
from lit_sparse.errors import UsageError
from lit_sparse.methods.stepping import holder


class CompactRanks(Callback):
    """Every ``every_n_steps`` optimizer steps, take out the ranks that were dead all the time.

    A rank is dead while its gate, its row of A or its row of Bᵀ is zero. One whose gate was zero after every step since
    the last look has found no use and goes; one that only passed by zero stays. Rows are read at the looks only, which
    costs less: without gates, a rank goes when it was dead at two looks in a row. An adapter whose B was zero at every
    look has learned nothing yet and stays whole. See :func:`~lit_sparse.compact` for what is cut with a rank. Steps
    become cheaper as ranks die, and checkpoints smaller; they resume as any other. All processes take out the same
    ranks, and then average smaller gradients.

    Args:
        every_n_steps: Optimizer steps between two looks, each of which waits once for the device; also the steps that a
            gate must have been zero. A tenth of a short run, or some hundred steps.

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
        self._seen: dict[str, Tensor] = {}
        """By layer and rank, not zero: the sum of |gate| since the last look; without gates, 1 if live at that look."""
        self._learned: dict[str, bool] = {}
        """Whether B was not zero at some look, by layer."""

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
        fits = {name: len(seen) for name, seen in self._seen.items()} == {
            name: len(adapter.lora_A) for name, adapter in self._adapters.items()
        }
        if self._step == 0 or not fits:
            self._learned = dict.fromkeys(self._adapters, False)
            self._begin(dict.fromkeys(self._adapters, 1.0))
        self._seen = {name: seen.to(self._adapters[name].lora_A) for name, seen in self._seen.items()}

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
        gates = {name: a.gate.detach() for name, a in self._adapters.items() if a.gate is not None}
        if gates:
            torch._foreach_add_([self._seen[name] for name in gates], torch._foreach_abs(list(gates.values())))
        if self._step % self.every_n_steps == 0:
            self._compact(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Say so when no rank was taken out, as where a method leaves an entry in every row."""
        if all(adapter.rank == adapter.max_rank for adapter in self._adapters.values()):
            rank_zero_info("CompactRanks took no rank out: none stayed dead from one look to the next.")

    def state_dict(self) -> dict[str, Any]:
        """What was seen since the last look, and which adapters have learned something."""
        return {"seen": dict(self._seen), "learned": dict(self._learned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with that."""
        self._seen, self._learned = state_dict.get("seen", {}), state_dict.get("learned", {})  # older files have others

    def _begin(self, live: Mapping[str, Tensor | float]) -> None:
        """Begin anew after a look at which these ranks were live."""
        for name, adapter in self._adapters.items():
            self._seen[name] = adapter.lora_A.new_zeros(len(adapter.lora_A))
            if adapter.gate is None:
                self._seen[name] += live[name] if self._learned[name] else 1.0

    def _live(self) -> dict[str, Tensor]:
        ranks = [len(adapter.lora_A) for adapter in self._adapters.values()]
        return dict(zip(self._adapters, live_ranks_of_all(list(self._adapters.values())).split(ranks), strict=True))

    def _compact(self, trainer: Trainer) -> None:
        before = sum(len(adapter.lora_A) for adapter in self._adapters.values())
        nonzero = torch.stack([adapter.lora_B_t.any() for adapter in self._adapters.values()]).tolist()
        self._learned = {n: self._learned[n] or found for n, found in zip(self._adapters, nonzero, strict=True)}
        kept = {name: live | (self._seen[name] != 0) for name, live in self._live().items() if self._learned[name]}
        keep_ranks(self._adapters, kept, holder(trainer.optimizers, self._adapters))
        self._begin(self._live())
        after = sum(len(adapter.lora_A) for adapter in self._adapters.values())
        if after < before:
            rank_zero_info(f"Step {self._step}: dead ranks taken out: {before - after}; {after} remain.")
