"""Run a method around every optimizer step, exactly once per step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import Run, SparseMethod, Step

_NOTHING = object()


class Sparsify(Callback):
    """Let ``method`` act on the adapters of any LightningModule while it trains.

    The method observes gradients that are final but not clipped (``on_before_optimizer_step``), and changes
    adapters right after the optimizer did, through a hook on the optimizer. ``on_train_batch_end`` would be
    wrong for both: it also fires on accumulation batches, and the learning rate has moved on by then. A step that a
    gradient scaler skips counts for nothing.

    :class:`~lit_sparse.SparseModule` brings its own; a module of yours needs one in ``Trainer(callbacks=…)``.

    Args:
        method: The method whose adapters were injected into the module.

    Raises:
        UsageError: When training starts, if the module holds no adapters, holds those of another method, there are
            two ``Sparsify``, or one optimizer does not hold all trained adapter parameters.
    """

    def __init__(self, method: SparseMethod) -> None:
        self.method = method
        self.steps_taken = 0
        self._adapters: list[LowRankLinear] = []
        self._optimizer: Optimizer | None = None
        self._group_of: Mapping[nn.Parameter, int] = {}
        self._total: int | None = None
        self._hook: torch.utils.hooks.RemovableHandle | None = None
        self._observed: Any = _NOTHING

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse a second ``Sparsify``: every step would be pruned twice."""
        count = sum(isinstance(callback, Sparsify) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if count > 1:
            raise UsageError(f"The Trainer has {count} Sparsify callbacks; each adapter takes one. Remove the others.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters by type, and check that method and optimizer fit them."""
        named = dict(adapters_in(pl_module))
        if not named:
            raise UsageError(
                f"Sparsify found no adapter in {type(pl_module).__name__}. Call lit_sparse.inject(model, method) on "
                "the backbone in the module's __init__ or configure_model."
            )
        for name, adapter in named.items():
            found = self.method.mismatch(adapter)
            if found is not None:
                raise UsageError(
                    f"The adapter at {name!r} has {found}: it is not one of {self.method!r}. Give Sparsify and "
                    "inject the same method."
                )
        self._adapters = list(named.values())
        self._optimizer = _holder(trainer.optimizers, named)
        self._group_of = {p: index for index, group in enumerate(self._optimizer.param_groups) for p in group["params"]}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Let the method check the run, and begin to follow the optimizer's steps."""
        if self._optimizer is None:
            raise RuntimeError("on_train_start came without on_fit_start.")
        if trainer.global_step == 0:
            self.steps_taken = 0  # the same callback in a second run
        total = trainer.estimated_stepping_batches
        self._total = None if total == float("inf") else int(total)
        run = Run(self.steps_taken, self._total, self._optimizer, lambda p: self._learning_rates(trainer, p))
        for warning in self.method.check(self._adapters, run):
            rank_zero_warn(warning)
        self._observed = _NOTHING
        self._hook = self._optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def on_before_optimizer_step(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,  # noqa: ARG002
        optimizer: Optimizer,
    ) -> None:
        """Observe: gradients are unscaled and not yet clipped, weights are those that produced them."""
        if optimizer is self._optimizer:
            self._observed = self.method.before_step(self._adapters, self._step(optimizer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Stop following the optimizer, and shout when nothing was ever pruned."""
        self._release()
        shortfall = self.method.shortfall(self._adapters)
        if shortfall is not None:
            rank_zero_warn(shortfall)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Stop following the optimizer."""
        self._release()

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken; everything else a method remembers lies in the adapters' buffers."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self.steps_taken = state_dict["steps_taken"]

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        # A fused optimizer is stepped by the gradient scaler even when it skips, and told so by this attribute;
        # reading it waits for the GPU, as the scaler does itself for other optimizers.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return
        if self._observed is _NOTHING:
            raise UsageError(
                f"{type(optimizer).__name__} was stepped behind Lightning's back, so gradients were not observed. With "
                "manual optimization, step what self.optimizers() returns."
            )
        step = self._step(optimizer)
        observed, self._observed = self._observed, _NOTHING
        self.steps_taken = step.index
        self.method.after_step(self._adapters, step, observed)

    def _step(self, optimizer: Optimizer) -> Step:
        return Step(self.steps_taken + 1, self._total, optimizer, self._group_of)

    def _learning_rates(self, trainer: Trainer, parameter: nn.Parameter) -> list[float]:
        """The lr of ``parameter`` at every step: exact for a LambdaLR stepped with the optimizer, else constant."""
        if self._optimizer is None or self._total is None:
            raise RuntimeError("The run has no optimizer or no end.")
        index = self._group_of[parameter]
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            stepwise = config.interval == "step" and config.frequency == 1
            if isinstance(scheduler, LambdaLR) and scheduler.optimizer is self._optimizer and stepwise:
                base, factor = scheduler.base_lrs[index], scheduler.lr_lambdas[index]
                return [float(base * factor(step)) for step in range(self._total)]
        group = self._optimizer.param_groups[index]
        return [float(group.get("initial_lr", group["lr"]))] * self._total

    def _release(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _holder(optimizers: list[Optimizer], adapters: Mapping[str, LowRankLinear]) -> Optimizer:
    """The one optimizer that holds every trained parameter of the adapters."""
    trained = {
        parameter: f"{name}.{own}"
        for name, adapter in adapters.items()
        for own, parameter in adapter.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    holders = [o for o in optimizers if any(p in trained for group in o.param_groups for p in group["params"])]
    if len(holders) > 1:
        raise UsageError(
            f"{len(holders)} optimizers hold adapter parameters. Put gates, A and B into one optimizer; groups of it "
            "may have their own learning rates."
        )
    held = {p for o in holders for group in o.param_groups for p in group["params"]}
    missing = [name for parameter, name in trained.items() if parameter not in held]
    if missing:
        raise UsageError(
            f"No optimizer holds {len(missing)} of {len(trained)} adapter parameters, the first is {missing[0]!r}. In "
            "configure_optimizers, give the optimizer every parameter with requires_grad, after inject."
        )
    return holders[0]
