"""Remove dead ranks from the model while it trains, so that steps become cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import keep_ranks
from lit_sparse.adapters.injection import low_rank_in
from lit_sparse.adapters.optimizer_state import require_cuttable_after_a_step
from lit_sparse.adapters.statistics import live_ranks_of_all
from lit_sparse.callbacks.sparsify import Sparsify
from lit_sparse.callbacks.support import StepCallback, callbacks_of
from lit_sparse.errors import UsageError
from lit_sparse.methods.stepping import adapter_optimizer


class CompactRanks(StepCallback):
    """Check the ranks every ``every_n_steps`` optimizer steps, and remove those that stayed dead since the last check.

    A rank is dead while its gate, its row of A or its row of Bᵀ is zero. A rank with a gate is removed if the gate was
    zero after every step since the last check. Without gates, a rank is removed if it was dead at two checks in a row,
    because reading all rows at every step would cost more. An adapter whose B was zero at every check has learned
    nothing yet and keeps all ranks.

    As soon as the method's choice of ranks stays (at the ``end`` of a ``budget``, or when ``refit`` begins), all ranks
    whose gates are zero are removed, without waiting for the next check.

    :func:`~lit_sparse.compact` describes which tensors are cut with a rank. Steps become cheaper and checkpoints
    smaller, and training resumes from them as usual. All processes remove the same ranks.

    Args:
        every_n_steps: Optimizer steps between two checks, such as 300, or a tenth of a short run. Each check waits
            once for the device.

    Raises:
        UsageError: If ``every_n_steps`` < 1. When training starts: under DDP or with weight averaging, which cannot
            change sizes, or if the optimizer keeps a state that cannot be cut, such as quantized moments or the history
            of LBFGS.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__(every_n_steps)
        self._adapters: dict[str, LowRankAdapter] = {}
        self._seen: dict[str, Tensor] = {}
        """By layer, for each rank: the sum of |gate| since the last check; without gates, 1 if live at that check."""
        self._learned: dict[str, bool] = {}
        """By layer, whether B was not zero at some check."""
        self._ranks_stay = False
        """Whether ranks at zero were removed for good at the last step."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a strategy, an average or an optimizer that cannot change its sizes."""
        if isinstance(trainer.strategy, DDPStrategy):
            raise UsageError(
                "CompactRanks does not work under DDP, whose buffers keep their sizes. Use strategy fsdp2 or fsdp, or "
                "lit_sparse.compact after training."
            )
        if averaging := callbacks_of(trainer, WeightAveraging):
            raise UsageError(
                f"CompactRanks changes the shapes that {type(averaging[0]).__name__} averages. Remove one of the two."
            )
        adapters = low_rank_in(pl_module, "CompactRanks removes ranks")
        if not adapters:
            raise UsageError(f"{type(pl_module).__name__} has no adapter to compact. Call lit_sparse.inject first.")
        parameters = [p for adapter in adapters.values() for p in adapter.parameters(recurse=False)]
        require_cuttable_after_a_step(adapter_optimizer(trainer.optimizers, adapters), parameters)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the record of the ranks, or continue that of the checkpoint."""
        super().on_train_start(trainer, pl_module)
        self._adapters = low_rank_in(pl_module, "CompactRanks removes ranks")
        fits = {name: len(seen) for name, seen in self._seen.items()} == {
            name: len(adapter.lora_A) for name, adapter in self._adapters.items()
        }
        if self._step == 0 or not fits:
            self._learned, self._ranks_stay = dict.fromkeys(self._adapters, False), False
            self._restart(dict.fromkeys(self._adapters, 1.0))
        self._seen = {name: seen.to(self._adapters[name].lora_A) for name, seen in self._seen.items()}

    def after_step(self, trainer: Trainer, pl_module: LightningModule, is_due: bool) -> None:  # noqa: ARG002
        """Add the gates to the record, and remove dead ranks if it is time.

        Once zeros stay, all ranks at zero are removed at the first step.
        """
        found = {name: adapter.effective_gate() for name, adapter in self._adapters.items()}
        gates = {name: gate.detach() for name, gate in found.items() if gate is not None}
        if gates:
            torch._foreach_add_([self._seen[name] for name in gates], torch._foreach_abs(list(gates.values())))
        stayed, self._ranks_stay = self._ranks_stay, any(s.ranks_stay for s in callbacks_of(trainer, Sparsify))
        if self._ranks_stay and not stayed:
            self._keep({name: gate != 0 for name, gate in gates.items()}, trainer)
        elif is_due:
            self._compact(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log that no rank was removed, for example because the method keeps an entry in every row."""
        if all(adapter.rank == adapter.max_rank for adapter in self._adapters.values()):
            rank_zero_info("CompactRanks removed no rank: none stayed dead from one check to the next.")

    def state_dict(self) -> dict[str, Any]:
        """The record of the ranks since the last check, which adapters have learned something, and if ranks stay."""
        return {"seen": dict(self._seen), "learned": dict(self._learned), "ranks_stay": self._ranks_stay}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; files of older versions lack some."""
        self._seen, self._learned = state_dict.get("seen", {}), state_dict.get("learned", {})
        self._ranks_stay = state_dict.get("ranks_stay", False)

    def _restart(self, live: Mapping[str, Tensor | float]) -> None:
        """Restart the record after a check that found these ranks live."""
        for name, adapter in self._adapters.items():
            self._seen[name] = adapter.lora_A.new_zeros(len(adapter.lora_A))
            if adapter.gate is None:
                self._seen[name] += live[name] if self._learned[name] else 1.0

    def _live(self) -> dict[str, Tensor]:
        ranks = [len(adapter.lora_A) for adapter in self._adapters.values()]
        return dict(zip(self._adapters, live_ranks_of_all(list(self._adapters.values())).split(ranks), strict=True))

    def _compact(self, trainer: Trainer) -> None:
        nonzero = torch.stack([adapter.lora_B_t.any() for adapter in self._adapters.values()]).tolist()
        self._learned = {n: self._learned[n] or found for n, found in zip(self._adapters, nonzero, strict=True)}
        kept = {name: live | (self._seen[name] != 0) for name, live in self._live().items() if self._learned[name]}
        self._keep(kept, trainer)

    def _keep(self, kept: Mapping[str, Tensor], trainer: Trainer) -> None:
        before = sum(len(adapter.lora_A) for adapter in self._adapters.values())
        first = all(adapter.rank == adapter.max_rank for adapter in self._adapters.values())
        keep_ranks(self._adapters, kept, adapter_optimizer(trainer.optimizers, self._adapters))
        self._restart(self._live())
        after = sum(len(adapter.lora_A) for adapter in self._adapters.values())
        if after < before:
            again = first and any(adapter.compiled for adapter in self._adapters.values())
            rank_zero_info(
                f"Step {self._step}: removed {before - after} dead ranks, {after} remain."
                + (" Blocks are compiled once more, for this and every other number of ranks." if again else "")
            )
