"""Let a method act around every optimizer step, in whatever loop the steps are taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.fabric import is_wrapped
from lightning.fabric.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.placement import require_one_device
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.methods.step import Run, Step

_NOTHING = object()


class SparseSteps:
    """Let ``method`` act on the adapters of a model in a training loop of your own, in Fabric or plain PyTorch.

    Under the Trainer :class:`~lit_sparse.Sparsify` does this for you. Make one after ``fabric.setup`` and call
    :meth:`observe` before every optimizer step; the rest happens right after it, through a hook on the optimizer::

        steps = ls.SparseSteps(method, model, optimizer, total_steps=len(batches))
        for batch in batches:
            fabric.backward(model(**batch).loss)
            steps.observe()
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
        steps.finish()

    It has ``state_dict`` and ``load_state_dict`` for ``fabric.save`` and ``fabric.load``, as model and optimizer have.
    Everything else that a method remembers is in buffers of the adapters. Steps that a gradient scaler skips do not
    count.

    Args:
        method: The method whose adapters were injected into the model.
        model: Model with the adapters; wrapped by Fabric or not.
        optimizer: The optimizer of all trained adapter parameters; wrapped by Fabric or not.
        total_steps: Optimizer steps of the whole run, fewer than batches when gradients accumulate; None for a run
            without end.
        lr_scheduler: The scheduler that is stepped after every optimizer step, if any. A ``LambdaLR`` tells the
            method the learning rates to come, for its warnings.
        steps_taken: Optimizer steps that were taken before, in a resumed run.
        alone: Whether every process, if there are several, trains a model of its own.

    Raises:
        UsageError: If ``total_steps`` < 1; if the model holds no adapters, adapters of another method, adapters on
            several devices or only frozen ones; if the optimizer lacks an adapter parameter or evaluates other weights
            than it trains; or if the method cannot work in such a run.
    """

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        optimizer: Optimizer,
        total_steps: int | None,
        lr_scheduler: LRScheduler | None = None,
        steps_taken: int = 0,
        alone: bool = False,
    ) -> None:
        require_range("total_steps", total_steps, at_least=1)
        adapters = adapters_of(method, model)
        require_one_device(type(model).__name__, [p for a in adapters.values() for p in a.parameters(recurse=False)])
        self.method = method
        self.optimizer = adapter_optimizer([_unwrapped(optimizer)], adapters)
        require_trained_weights(method, self.optimizer)
        self.steps_taken = steps_taken
        self._adapters = list(adapters.values())
        self._total, self._alone = total_steps, alone
        self._lr_scheduler = lr_scheduler
        self._group_of = {p: i for i, group in enumerate(self.optimizer.param_groups) for p in group["params"]}
        self._observed: Any = _NOTHING
        run = Run(steps_taken, total_steps, self.optimizer, self._learning_rates)
        for warning in method.check(self._adapters, run):
            rank_zero_warn(warning)
        # A step_pre_hook could not observe: gradients may be clipped by then, or be computed by the closure.
        self._hook = self.optimizer.register_step_post_hook(self._after_step)
        method.prepare(self._adapters, self._step(self.optimizer))

    @torch.no_grad()
    def observe(self) -> None:
        """Call once before every optimizer step, when gradients are complete, unscaled and not yet clipped."""
        self._add_penalty()
        self._observed = self.method.before_step(self._adapters, self._step(self.optimizer))

    def _add_penalty(self) -> None:
        with torch.enable_grad():
            penalty = self.method.penalty(self._adapters)
        if penalty is None or not penalty.requires_grad:  # as where the user froze what it depends on
            return
        trained = [p for adapter in self._adapters for p in adapter.parameters(recurse=False) if p.requires_grad]
        gradients = torch.autograd.grad(penalty, trained, allow_unused=True)
        added = [(p, gradient) for p, gradient in zip(trained, gradients, strict=True) if gradient is not None]
        there = [(p.grad, gradient) for p, gradient in added if p.grad is not None]
        if there:
            torch._foreach_add_([grad for grad, _ in there], [gradient for _, gradient in there])
        for parameter, gradient in added:
            parameter.grad = gradient if parameter.grad is None else parameter.grad

    def finish(self) -> None:
        """Call at the end of training: stop following the optimizer, and warn if nothing was pruned."""
        self.release()
        shortfall = self.method.shortfall(self._adapters)
        if shortfall is not None:
            rank_zero_warn(shortfall)

    def release(self) -> None:
        """Stop following the optimizer."""
        self._hook.remove()
        self.method.release(self._adapters)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken."""
        return {"steps_taken": self.steps_taken}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting where the checkpoint was."""
        self.steps_taken = state_dict["steps_taken"]
        self.method.prepare(self._adapters, self._step(self.optimizer))

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ARG002
        # A gradient scaler steps a fused optimizer even when it skips, and sets this attribute. Reading it waits for
        # the GPU, as the scaler itself does for other optimizers.
        skipped = getattr(optimizer, "found_inf", None)
        if skipped is not None and bool(skipped):
            return
        if self._observed is _NOTHING:
            raise UsageError(
                f"{type(optimizer).__name__} was stepped, but gradients were not observed. In a loop of your own, call "
                "observe() before every step. Under the Trainer, step the optimizer that self.optimizers() returns, "
                "and run tuners before training."
            )
        if getattr(optimizer, "grad_scale", None) is not None:
            raise UsageError(
                f"{type(optimizer).__name__} is fused and unscales gradients within its step, so observe() saw them "
                "scaled. Call scaler.unscale_(optimizer) before observe()."
            )
        step = self._step(optimizer)
        observed, self._observed = self._observed, _NOTHING
        self.steps_taken = step.index
        self.method.after_step(self._adapters, step, observed)

    def _step(self, optimizer: Optimizer) -> Step:
        return Step(self.steps_taken + 1, self._total, optimizer, self._group_of, self._alone)

    def _learning_rates(self, parameter: nn.Parameter) -> list[float]:
        """The lr of ``parameter`` at every step: exact for a LambdaLR stepped with the optimizer, else constant."""
        if self._total is None:
            raise RuntimeError("The run has no end.")
        index = self._group_of[parameter]
        if isinstance(self._lr_scheduler, LambdaLR):
            base, factor = self._lr_scheduler.base_lrs[index], self._lr_scheduler.lr_lambdas[index]
            return [float(base * factor(step)) for step in range(self._total)]
        group = self.optimizer.param_groups[index]
        return [float(group.get("initial_lr", group["lr"]))] * self._total


def adapters_of(method: Method, model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by name, found by type.

    Raises:
        UsageError: If there are none, or those of another method.
    """
    bare = _unwrapped(model)
    adapters = dict(adapters_in(bare))
    if not adapters:
        raise UsageError(
            f"Sparsify found no adapter in {type(bare).__name__}. Call lit_sparse.inject(model, method) on "
            "the backbone, in a LightningModule in __init__ or configure_model."
        )
    for name, adapter in adapters.items():
        found = method.mismatch(adapter)
        if found is not None:
            raise UsageError(
                f"The adapter at {name!r} has {found}: it is not one of {method!r}. Train with the method that was "
                "given to inject."
            )
    return adapters


def adapter_optimizer(optimizers: Sequence[Optimizer], adapters: Mapping[str, Adapter]) -> Optimizer:
    """The one optimizer that holds every trained parameter of the adapters.

    Raises:
        UsageError: If there is nothing to train in the adapters, several optimizers hold them, or one lacks some.
    """
    trained = {
        parameter: f"{name}.{own}"
        for name, adapter in adapters.items()
        for own, parameter in adapter.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    if not trained:
        raise UsageError(
            f"All {len(adapters)} adapters are frozen: no parameter of theirs has requires_grad, so the method has "
            "nothing to train. Unfreeze them, or train without Sparsify or SparseSteps."
        )
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


def require_trained_weights(method: Method, optimizer: Optimizer) -> None:
    """Refuse a schedule-free optimizer, whose ``eval()`` swaps in averaged weights that the method never zeroed.

    Raises:
        UsageError: If ``method`` changes weights after a step and the optimizer has a mode for evaluation.
    """
    prunes = type(method).after_step is not Method.after_step
    if prunes and all(callable(getattr(optimizer, mode, None)) for mode in ("train", "eval")):
        raise UsageError(
            f"{type(optimizer).__name__} evaluates an average of the weights it trains (its eval() swaps them), and "
            f"the average has none of the zeros of {type(method).__name__}. Use an optimizer that evaluates what it "
            "trains, such as AdamW."
        )


def _unwrapped(wrapped: Any) -> Any:
    """Undo Fabric's wrapping: hooks run on the inner optimizer only, and the inner module has the user's names."""
    if not is_wrapped(wrapped):
        return wrapped
    return wrapped.module if isinstance(wrapped, nn.Module) else wrapped.optimizer
