"""Train a small change of a model's weights, and return the change apart from the model."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.injection import inject, take_out
from lit_sparse.adapters.modes import in_mode
from lit_sparse.editing.holding import HeldInputs, answers_of, price_of_adapters, price_of_weights
from lit_sparse.editing.objective import Objective
from lit_sparse.editing.starting import start_at_keys
from lit_sparse.editing.ultraedit import Solver, UltraEdit
from lit_sparse.editing.whole_weights import WholeWeights, changing
from lit_sparse.errors import UsageError
from lit_sparse.interchange.patches import Patch, patch_of
from lit_sparse.methods.method import Method
from lit_sparse.methods.stepping import SparseSteps
from lit_sparse.modules.optimization import make_optimizer, relative_groups


@dataclass(frozen=True)
class Trained:
    """A change that was trained.

    Args:
        patch: What to add to the model's weights.
        weights: Number of weight entries that could have changed.
        steps: Optimizer steps taken.
        loss: The last loss, in nats per token: the mean over the batches that took turns.
        seconds: Time of the steps alone.
        whole_seconds: Time of all, such as the reading of anchors.
    """

    patch: Patch
    weights: int
    steps: int
    loss: float
    seconds: float
    whole_seconds: float


@dataclass(frozen=True)
class _Making:
    """A change in the making.

    Args:
        weights: Number of weight entries that can change.
        step: Takes a step after a backward pass over the rows of a turn.
        patch: Gives the change so far.
        settled: Steps after which the method's sparsity is final.
        finish: Called at the end.
    """

    weights: int
    step: Callable[[int], None]
    patch: Callable[[], Patch]
    settled: int = 0
    finish: Callable[[], None] = lambda: None


def train(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    method: Method | WholeWeights,
    steps: int,
    optimizer: OptimizerCallable,
    stop_loss: float | None,
    held: HeldInputs | None = None,
    at_keys: bool = False,
) -> Trained:
    """Train a change on batches that take turns; afterwards the model is bit for bit what it was.

    Args:
        model: A causal language model without adapters.
        batches: The rows of each batch, as :class:`~lit_sparse.editing.objective.Objective` takes them.
        method: What is trained. It must not train a head.
        steps: Optimizer steps, at most.
        optimizer: Makes the optimizer from parameter groups.
        stop_loss: Training stops at this loss, in nats per token, as the mean over the last step of every batch, once
            the method's sparsity is final; None: never.
        held: The inputs of layers on the anchors, whose outputs are held; None: probabilities are, but for UltraEdit.
        at_keys: Whether A starts as :func:`~lit_sparse.editing.starting.start_at_keys` says.

    Raises:
        UsageError: If the method trains more than the weights of its target layers, cannot work in so few steps, or has
            layers that it cannot change.
        TrainingError: If values become NaN or infinite; by UltraEdit alone.
    """
    begin, training = time.perf_counter(), True
    if isinstance(method, UltraEdit):
        held = held or HeldInputs()  # it always holds outputs
        training = False  # for its release computes without dropout
        making = _solved(model, method, batches, held)
    elif isinstance(method, Method):
        making = _adapters(model, method, steps, optimizer, batches, held, at_keys)
    else:
        making = _fine_tuned(model, method, optimizer, batches, held)
    objectives = [Objective(model, batch if held is None else answers_of(batch)) for batch in batches]
    with torch.enable_grad(), in_mode(model, training=training), making as change:
        turn: deque[Tensor] = deque(maxlen=len(batches))
        start = time.perf_counter()
        taken = 0
        while taken < steps:
            loss, whole = objectives[taken % len(batches)](model)
            turn.append(loss.detach())
            # Reading losses waits for the device, so they are read only where training may stop.
            may_stop = taken + 1 >= change.settled + len(batches)
            if stop_loss is not None and may_stop and _mean(turn) <= stop_loss:
                break
            if not whole.requires_grad:
                raise UsageError(
                    f"The answers do not depend on the layers that {type(method).__name__} changes, for the model does "
                    "not call them: name others."
                )
            whole.sum().backward()
            change.step(taken % len(batches))
            taken += 1
        last = _mean(turn) + 0.0  # not -0.0; before reading the clock, which does not wait for the device
        seconds = time.perf_counter() - start
        change.finish()
        return Trained(change.patch(), change.weights, taken, last, seconds, time.perf_counter() - begin)


def _mean(losses: Iterable[Tensor]) -> float:
    return torch.stack(tuple(losses)).mean().item()


@contextmanager
def _adapters(
    model: nn.Module,
    method: Method,
    steps: int,
    optimizer: OptimizerCallable,
    batches: Sequence[Mapping[str, Tensor]],
    held: HeldInputs | None,
    at_keys: bool,
) -> Iterator[_Making]:
    """Inject the method's adapters, and take them out again."""
    adapters = inject(model, method)
    try:
        require_adapters_alone(model, method, adapters)
        if at_keys:
            start_at_keys(model, method, adapters, batches, held)
        made = make_optimizer(optimizer, relative_groups(model, method))
        sparse = SparseSteps(method, model, made, steps, alone=True)
        price = None if held is None else price_of_adapters(model, adapters, batches, held)

        def step(turn: int) -> None:
            if price is not None:
                price(turn)
            sparse.observe()
            made.step()
            made.zero_grad()

        weights = sum(adapter.weight.numel() for adapter in adapters.values())
        yield _Making(weights, step, lambda: patch_of(adapters), method.settled_after(steps), sparse.finish)
    finally:
        take_out(model)


def require_adapters_alone(model: nn.Module, method: Method, adapters: Mapping[str, Adapter]) -> None:
    """Refuse a method that also trains other parameters than those of its adapters."""
    own = {id(p) for adapter in adapters.values() for p in adapter.parameters(recurse=False)}
    outside = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]
    if outside:
        raise UsageError(
            f"An edit changes only adapted weights, but {method!r} also trains {outside[:3]}: set train_head to false."
        )


@contextmanager
def _fine_tuned(
    model: nn.Module,
    method: WholeWeights,
    optimizer: OptimizerCallable,
    batches: Sequence[Mapping[str, Tensor]],
    held: HeldInputs | None,
) -> Iterator[_Making]:
    with changing(model, method) as change:
        made = make_optimizer(optimizer, [{"params": list(change.weights.values())}])
        price = None if held is None else price_of_weights(model, change, batches, held)

        def step(turn: int) -> None:
            if price is not None:
                price(turn)
            made.step()
            made.zero_grad()
            torch.clear_autocast_cache()  # it keeps copies of weights in bfloat16 until the Trainer's step ends

        yield _Making(change.count, step, change.patch)


@contextmanager
def _solved(
    model: nn.Module, method: UltraEdit, batches: Sequence[Mapping[str, Tensor]], held: HeldInputs
) -> Iterator[_Making]:
    with changing(model, method) as change:
        solver = Solver(model, method, change, batches, held)
        with solver.watching():
            yield _Making(change.count, lambda _: solver.step(), change.patch)
