"""Run a method around every optimizer step, exactly once per step."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_sparse.adapters.factors import gate_record
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.callbacks.averaging import Pair, copy_zeros, keep_averages_sparse
from lit_sparse.callbacks.batch_start import start_run
from lit_sparse.callbacks.run_end import finish_plain_checkpoints
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError
from lit_sparse.methods.method import Method
from lit_sparse.methods.progress import Progress, warn_if_nothing_is_left
from lit_sparse.methods.stepping import SparseSteps, adapter_optimizer, adapters_of, require_trained_weights
from lit_sparse.strategies.support import keep_buffers_local, require_exact


class Sparsify(Callback):
    """Run a method on the adapters of any LightningModule while it trains.

    Before each optimizer step the method observes the gradients, complete and not yet clipped
    (``on_before_optimizer_step``). A hook on the optimizer lets it change the adapters right after the step.
    ``on_train_batch_end`` would be wrong for that: it also fires on accumulation batches, and the learning rate has
    changed by then. Steps that a gradient scaler skips do not count. Without the Trainer, use
    :class:`~lit_sparse.SparseSteps`.

    :class:`~lit_sparse.SparseModule` brings its own; your own modules need one in ``Trainer(callbacks=…)``.

    With manual optimization, step what ``self.optimizers()`` returns. A schedule over shares of the run then assumes
    one step per batch: if you take fewer, give ``begin`` and ``end`` as numbers of steps, and no ``refit``, which
    counts from the end of the run.

    ``WeightAveraging`` and ``EMAWeightAveraging`` keep zeros: a weight that is zero has the average zero.
    ``StochasticWeightAveraging`` and schedule-free optimizers are refused. If ``EarlyStopping`` ends a run, a schedule
    over shares of the run stays incomplete.

    Args:
        method: The method whose adapters were injected into the module.

    Raises:
        UsageError: At set-up, under a strategy that does not keep adapters equal in all processes, such as DeepSpeed,
            or with a second ``Sparsify``. When training starts, if the module has no adapters or those of another
            method, with ``StochasticWeightAveraging``, or if the optimizer lacks trained adapter parameters or
            evaluates other weights than those it trains.
    """

    def __init__(self, method: Method) -> None:
        self.method = method
        self._steps: SparseSteps | None = None
        self._steps_before = 0
        self._averages: list[Pair] = []
        self._propagated = False
        """Whether the current batch had a backward pass: ``training_step`` may return None instead of a loss."""
        self._total: int | None = 0  # before the first run
        self._ended = False
        self.last_stage = 1.0
        """Share of the run at which the last stage of :class:`~lit_sparse.ThresholdStages` begins; 1 without stages."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps since the start of the run, including those before a resume."""
        return self._steps_before if self._steps is None else self._steps.steps_taken

    @property
    def ranks_stay(self) -> bool:
        """Whether ranks whose gates are zero keep them at zero for the rest of the run."""
        after = self.method.ranks_stay_after(self._total)
        return after is not None and self.steps_taken >= after

    def progress(self, step: int) -> Progress | None:
        """How far the run is, None before the first one.

        Args:
            step: The Trainer's ``global_step``.
        """
        if self._total == 0:
            return None
        total = self._total
        at_end = self._ended or total is None or step >= total or step > round(self.last_stage * total)
        return Progress(step, total, self.method.is_final(self.steps_taken, total, at_end))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse strategies that do not keep adapters equal, and a second ``Sparsify``, which would prune twice."""
        require_exact(trainer.strategy)
        self.last_stage = 1.0  # ThresholdStages sets it later, in on_fit_start
        count = len(callbacks_of(trainer, Sparsify))
        if count > 1:
            raise UsageError(f"The Trainer has {count} Sparsify callbacks; each adapter takes one. Remove the others.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that method, optimizer and the other callbacks fit the adapters, and start these from gradients."""
        adapters = adapters_of(self.method, pl_module)
        start_run(trainer, pl_module, self.method)
        require_trained_weights(self.method, adapter_optimizer(trainer.optimizers, adapters))
        self._averages = keep_averages_sparse(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        if self._averages and self.method.moves_entries:
            raise UsageError(
                "WeightAveraging would average changes of different entries, which "
                f"{type(self.method).__name__} moves. Remove it, or let entries stay: SHiRA, or LIFT without "
                "update_every."
            )
        keep_buffers_local(trainer.strategy.model, adapters.items())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the method check the run, and start following the optimizer's steps."""
        if trainer.global_step == 0:
            self._steps_before = 0  # this callback may be in its second run
        optimizer = adapter_optimizer(trainer.optimizers, adapters_of(self.method, pl_module))
        scheduler, self._total, self._ended = _stepwise_scheduler(trainer, optimizer), total_steps(trainer), False
        self._steps = SparseSteps(self.method, pl_module, optimizer, self._total, scheduler, self._steps_before)
        goal = self.method.goal([adapter for _, adapter in adapters_in(pl_module)])
        if goal is not None:
            rank_zero_info(goal)

    def on_train_batch_start(self, *_: Any) -> None:
        """Note that the batch had no backward pass yet."""
        self._propagated = False

    def on_after_backward(self, *_: Any) -> None:
        """Note the backward pass."""
        self._propagated = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Let the method observe the gradients: unscaled, not yet clipped, with the weights that produced them."""
        if self._steps is None or optimizer is not self._steps.optimizer:
            return
        # A fused optimizer unscales within its step, too late for the method. If training_step returned None, Lightning
        # skips the step, and the scaler must not count gradients as unscaled.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        steps = self._propagated or not pl_module.automatic_optimization
        if scaler is not None and steps and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        self._steps.observe()

    def on_train_batch_end(self, *_: Any) -> None:
        """Keep averages as sparse as the weights, before they are validated or saved."""
        copy_zeros(self._averages)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop following the optimizer, warn if nothing was pruned, and save the last state."""
        self._ended = not trainer.should_stop  # a time limit or EarlyStopping ends a run before its schedule
        steps = self._release()
        if steps is not None:
            steps.finish()
            if self._steps_before > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                warn_if_nothing_is_left([adapter for _, adapter in adapters_in(pl_module)])
        finish_plain_checkpoints(trainer, self.progress(trainer.global_step))

    def on_exception(self, *_: Any) -> None:
        """Stop following the optimizer."""
        self._release()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Record the progress of the run, what is left of the adapters, and gates computed from parameters."""
        checkpoint["callbacks"][self.state_key] |= gate_record(pl_module, checkpoint["state_dict"])
        progress = self.progress(trainer.global_step)
        if progress is not None:
            adapters = [adapter for _, adapter in adapters_in(pl_module)]
            checkpoint["callbacks"][self.state_key]["progress"] = progress.record(adapters)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken; all other state of a method is in buffers of the adapters."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the count of the checkpoint."""
        self._steps_before = state_dict["steps_taken"]

    def _release(self) -> SparseSteps | None:
        steps, self._steps_before, self._steps = self._steps, self.steps_taken, None
        if steps is not None:
            steps.release()
        return steps


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, None for a run without end.

    ``Trainer.estimated_stepping_batches`` ignores a ``GradientAccumulationScheduler``: it uses the current factor for
    all epochs. It is -1 for data without length if ``max_steps`` is not set.
    """
    total: float = trainer.estimated_stepping_batches
    if total < 0 or total == math.inf:
        return None
    batches: float = trainer.num_training_batches
    if trainer.max_epochs in (None, -1) or batches == math.inf:
        return int(total)
    for scheduler in callbacks_of(trainer, GradientAccumulationScheduler):
        factors = [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
        total = sum(math.ceil(batches / factor) for factor in factors)
        return int(total) if trainer.max_steps == -1 else min(int(total), trainer.max_steps)
    return int(total)


def progress_of(trainer: Trainer) -> Progress | None:
    """How far the Trainer's run is by its :class:`Sparsify`; None without one or before the first run."""
    found = callbacks_of(trainer, Sparsify)
    return found[0].progress(trainer.global_step) if found else None


def _stepwise_scheduler(trainer: Trainer, optimizer: Optimizer) -> LRScheduler | None:
    """The scheduler that changes the learning rate of ``optimizer`` at every step."""
    for config in trainer.lr_scheduler_configs:
        stepwise = config.interval == "step" and config.frequency == 1
        if stepwise and isinstance(config.scheduler, LRScheduler) and config.scheduler.optimizer is optimizer:
            return config.scheduler
    return None
