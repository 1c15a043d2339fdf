"""Run a method around every optimizer step, exactly once per step."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.callbacks.averaging import Pair, copy_zeros, keep_averages_sparse
from lit_sparse.callbacks.run_end import finish_plain_checkpoints
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.progress import Progress, warn_if_nothing_is_left
from lit_sparse.methods.stepping import SparseSteps, adapters_of, holder, require_trained_weights
from lit_sparse.strategies.support import keep_buffers_local, require_exact


class Sparsify(Callback):
    """Let ``method`` act on the adapters of any LightningModule while it trains.

    The method observes gradients that are final but not clipped (``on_before_optimizer_step``), and changes
    adapters right after the optimizer did, through a hook on the optimizer. ``on_train_batch_end`` would be
    wrong for both: it also fires on accumulation batches, and the learning rate has moved on by then. A step that a
    gradient scaler skips counts for nothing. Without the Trainer, :class:`~lit_sparse.SparseSteps` does the same.

    :class:`~lit_sparse.SparseModule` brings its own; a module of yours needs one in ``Trainer(callbacks=…)``.

    Manual optimization works when the step is taken by what ``self.optimizers()`` returns. Schedules over shares of
    the run then count one step for every batch: give ``begin`` and ``end`` as numbers of steps where you take fewer.

    ``WeightAveraging`` and ``EMAWeightAveraging`` average what is not zero: a weight at zero has the average zero,
    after every step. ``StochasticWeightAveraging`` and schedule-free optimizers are refused. A run that
    ``EarlyStopping`` ends has gone only part of the way of a schedule over shares of the run.

    Args:
        method: The method whose adapters were injected into the module.

    Raises:
        UsageError: At set-up, under a strategy that would not keep adapters equal in all processes, such as DeepSpeed.
            When training starts, if the module holds no adapters, holds those of another method, there are
            two ``Sparsify`` or a ``StochasticWeightAveraging``, one optimizer does not hold all trained adapter
            parameters, or it evaluates other weights than those it trains.
    """

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self._steps: SparseSteps | None = None
        self._steps_before = 0
        self._averages: list[Pair] = []
        self._propagated = False
        """Whether the current batch had a backward pass; its ``training_step`` may have returned None instead."""
        self._total: int | None = 0  # of no run yet
        self._ended = False
        self.last_stage = 1.0
        """The share of the run after which its thresholds rise no more, where they rise in stages."""

    @property
    def steps_taken(self) -> int:
        """Optimizer steps since the start of the run, those before it was resumed included."""
        return self._steps_before if self._steps is None else self._steps.steps_taken

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
        """Refuse a second ``Sparsify``, by which every step would be pruned twice, and what is not exact."""
        require_exact(trainer.strategy)
        self.last_stage = 1.0  # unless ThresholdStages says otherwise
        count = sum(isinstance(callback, Sparsify) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise UsageError(f"The Trainer has {count} Sparsify callbacks; each adapter takes one. Remove the others.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that method, optimizer and the other callbacks fit the adapters."""
        adapters = adapters_of(self.method, pl_module)
        require_trained_weights(self.method, holder(trainer.optimizers, adapters))
        self._averages = keep_averages_sparse(trainer.callbacks, pl_module)  # type: ignore[attr-defined]
        keep_buffers_local(trainer.strategy.model, adapters.items())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the method check the run, and begin to follow the optimizer's steps."""
        if trainer.global_step == 0:
            self._steps_before = 0  # the same callback in a second run
        optimizer = holder(trainer.optimizers, adapters_of(self.method, pl_module))
        scheduler, self._total, self._ended = _stepwise_scheduler(trainer, optimizer), total_steps(trainer), False
        self._steps = SparseSteps(self.method, pl_module, optimizer, self._total, scheduler, self._steps_before)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """A new batch has had no backward pass yet."""
        self._propagated = False

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Note the backward pass."""
        self._propagated = True

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Observe: gradients are unscaled and not yet clipped, weights are those that produced them."""
        if self._steps is None or optimizer is not self._steps.optimizer:
            return
        # A fused optimizer unscales within its step, which is too late for the method. Where Lightning will skip the
        # step, because training_step returned None, the scaler must not be told that gradients are unscaled.
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        steps = self._propagated or not pl_module.automatic_optimization
        if scaler is not None and steps and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)
        self._steps.observe()

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ARG002
        """Keep averages as sparse as the weights, before they are validated or saved."""
        copy_zeros(self._averages)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop following the optimizer, shout when nothing was ever pruned, and see that ``last`` is the last state."""
        self._ended = not trainer.should_stop  # by no time limit, EarlyStopping or the like
        steps = self._release()
        if steps is not None:
            steps.finish()
            if self._steps_before > 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                warn_if_nothing_is_left([adapter for _, adapter in adapters_in(pl_module)])
        finish_plain_checkpoints(trainer, self.progress(trainer.global_step))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Stop following the optimizer."""
        self._release()

    def on_save_checkpoint(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
    ) -> None:
        """Record how far the run is."""
        progress = self.progress(trainer.global_step)
        if progress is not None:
            adapters = [adapter for _, adapter in adapters_in(pl_module)]
            checkpoint["callbacks"][self.state_key]["progress"] = progress.record(adapters)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken; everything else a method remembers lies in the adapters' buffers."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self._steps_before = state_dict["steps_taken"]

    def _release(self) -> SparseSteps | None:
        steps, self._steps_before, self._steps = self._steps, self.steps_taken, None
        if steps is not None:
            steps.release()
        return steps


def total_steps(trainer: Trainer) -> int | None:
    """Optimizer steps of the whole run, None when it has no end.

    The Trainer's own ``estimated_stepping_batches`` knows nothing of a ``GradientAccumulationScheduler``: it takes
    the factor of the moment for that of all epochs. And it says -1 for data without length and without ``max_steps``.
    """
    total: float = trainer.estimated_stepping_batches
    if total < 0 or total == math.inf:
        return None
    batches: float = trainer.num_training_batches
    if trainer.max_epochs in (None, -1) or batches == math.inf:
        return int(total)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            factors = [callback.get_accumulate_grad_batches(epoch) for epoch in range(trainer.max_epochs)]
            total = sum(math.ceil(batches / factor) for factor in factors)
            return int(total) if trainer.max_steps == -1 else min(int(total), trainer.max_steps)
    return int(total)


def _stepwise_scheduler(trainer: Trainer, optimizer: Optimizer) -> LRScheduler | None:
    """The scheduler that moves the learning rate of ``optimizer`` at every step."""
    for config in trainer.lr_scheduler_configs:
        stepwise = config.interval == "step" and config.frequency == 1
        if stepwise and isinstance(config.scheduler, LRScheduler) and config.scheduler.optimizer is optimizer:
            return config.scheduler
    return None
