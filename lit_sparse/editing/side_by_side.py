"""Train the changes of several edits at the same time, each as if it were alone."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import cast

import torch
import torch.nn.functional as F
from lightning.fabric.utilities import rank_zero_info
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn, optim

from lit_sparse.adapters.injection import inject, take_out
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.modes import in_mode
from lit_sparse.adapters.replacing import replace_modules
from lit_sparse.adapters.rowwise import CannotShareError, Routes, RowwiseLinear
from lit_sparse.data.padding import IGNORED
from lit_sparse.editing.holding import HeldInputs, answers_of, equal_rows, held_of, price_of_adapters
from lit_sparse.editing.objective import Objective
from lit_sparse.editing.starting import start_at_keys
from lit_sparse.editing.training import Trained, require_adapters_alone, train
from lit_sparse.editing.whole_weights import WholeWeights
from lit_sparse.interchange.patches import patch_of
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.method import Method
from lit_sparse.methods.stepping import SparseSteps
from lit_sparse.modules.optimization import make_optimizer, relative_groups

# Those that step every entry of a parameter by itself.
_BY_ENTRY = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam, optim.Adamax),
    *(optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Rprop, optim.ASGD),
)


@dataclass(frozen=True)
class _Many:
    """The adapters of several edits in a model."""

    layers: Mapping[str, RowwiseLinear]
    alone: Sequence[Mapping[str, LowRankLinear]]
    """The adapters of each edit, outside of the model."""

    def end(self, edit: int) -> None:
        """Keep the adapters of an edit as they are now."""
        for name, layer in self.layers.items():
            layer.copy_to(self.alone[edit][name], edit)


def train_each(
    model: nn.Module,
    edits: Sequence[Sequence[Mapping[str, Tensor]]],
    method: Method | WholeWeights,
    steps: int,
    optimizer: OptimizerCallable,
    stop_loss: float | None,
    seeds: Sequence[int],
    held: HeldInputs | None = None,
    at_keys: bool = False,
) -> Iterator[Trained]:
    """Train a change for each edit, as ``train`` does; side by side where the results are the same to rounding.

    A change is computed when it is asked for, for it may be as large as the model. The model must then be as it was at
    the start.

    Args:
        model: A causal language model without adapters.
        edits: The batches of each change, as for ``train``, padded on the right.
        method: As for ``train``.
        steps: As for ``train``.
        optimizer: As for ``train``.
        stop_loss: As for ``train``.
        seeds: The seed of each change.
        held: As for ``train``.
        at_keys: As for ``train``.

    Raises:
        UsageError: As ``train``.
    """
    half = 0
    if len(edits) > 1 and isinstance(method, Method):
        try:
            together = _side_by_side(
                model, [_whole(batches) for batches in edits], method, steps, optimizer, stop_loss, seeds, held, at_keys
            )
        except CannotShareError as error:
            rank_zero_info(f"Edits are trained one after another: {error}.")
        except torch.OutOfMemoryError:
            half = len(edits) // 2  # not tried in this block, which keeps the tensors of the failure alive
        else:
            for adapters, trained in together:
                yield replace(trained, patch=patch_of(adapters))
            return
    if half:
        rank_zero_info(f"The memory is too small for {len(edits)} edits side by side: trying {half}.")
        for part in (slice(half), slice(half, None)):
            yield from train_each(model, edits[part], method, steps, optimizer, stop_loss, seeds[part], held, at_keys)
        return
    for batches, seed in zip(edits, seeds, strict=True):
        torch.manual_seed(seed)
        yield train(model, batches, method, steps, optimizer, stop_loss, held, at_keys)


def _whole(batches: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    if len(batches) > 1:
        raise CannotShareError("the requests of an edit take turns")
    return batches[0]


def _side_by_side(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    method: Method,
    steps: int,
    optimizer: OptimizerCallable,
    stop_loss: float | None,
    seeds: Sequence[int],
    held: HeldInputs | None,
    at_keys: bool,
) -> list[tuple[Mapping[str, LowRankLinear], Trained]]:
    """Train a change on each batch, all in the same steps; afterwards the model is bit for bit what it was.

    Each change is that of :func:`~lit_sparse.editing.training.train` on its batch alone, to rounding. An edit that has
    reached ``stop_loss`` leaves the batch.

    Args:
        model: A causal language model without adapters.
        batches: For each edit ``input_ids``, ``attention_mask`` and ``labels``, padded on the right.
        method: What is trained.
        steps: Optimizer steps, at most.
        optimizer: Makes the optimizer from parameter groups.
        stop_loss: As for one edit.
        seeds: The seed of each edit, from which its adapters are drawn.
        held: As for one edit.
        at_keys: As for one edit.

    Returns:
        For each edit its adapters, outside of the model, and what else is known, without the patch.

    Raises:
        CannotShareError: If the result could differ from that of single edits: the method compares ranks, or adapts
            other than linear layers, the optimizer does not step each entry by itself, or the model draws random
            numbers or mixes the rows of a batch.
    """
    if not isinstance(method, SparseMethod):
        raise CannotShareError(f"{type(method).__name__} has no ranks")
    if not method.acts_by_rank:
        raise CannotShareError(f"{type(method).__name__} compares the ranks of all layers")
    begin = time.perf_counter()
    held_rows = [held_of(batch) for batch in batches] if held is not None else []
    if not all(equal_rows(held_rows[0], rows) for rows in held_rows):
        raise CannotShareError("each edit has anchors of its own")
    given, batches = batches, [answers_of(batch) for batch in batches] if held is not None else batches
    width = max(batch["labels"].shape[1] for batch in batches)
    names = dict.fromkeys(name for batch in batches for name in batch)
    rows = {name: torch.cat([_padded(batch, name, width) for batch in batches]) for name in names}
    sizes = torch.tensor([len(batch["labels"]) for batch in batches], device=rows["labels"].device)
    routes = Routes(torch.arange(len(batches), device=sizes.device).repeat_interleave(sizes))
    objective = Objective(model, rows, routes, len(batches))
    alone = _alone(model, method, seeds, given, held, at_keys)
    if held is not None:  # while the model takes rows of no edit
        held.of(model, {name: model.get_submodule(name) for name in alone[0]}, given[:1])
    with torch.enable_grad(), in_mode(model, training=True), _together(model, alone, routes) as many:
        price = None if held is None else price_of_adapters(model, many.layers, given[:1], held)
        made = make_optimizer(optimizer, relative_groups(model, method))
        if type(made) not in _BY_ENTRY:
            raise CannotShareError(f"{type(made).__name__} may not step each entry by itself")
        sparse = SparseSteps(method, model, made, steps)
        settled = method.settled_after(steps)
        weights = sum(layer.weight.numel() for layer in many.layers.values())
        ended: dict[int, Trained] = {}

        def end(edits: Iterable[int], taken: int, losses: Sequence[float]) -> None:
            for edit in edits:
                many.end(edit)
                ended[edit] = Trained({}, weights, taken, losses[edit] + 0.0, 0.0, 0.0)  # not -0.0

        start, random_state = time.perf_counter(), _random_state(sizes.device)
        for taken in range(steps):
            losses, whole = objective(model)
            if not taken and not torch.equal(random_state, _random_state(sizes.device)):
                raise CannotShareError("the model draws random numbers")
            # Reading losses waits for the device, so they are read only where training may stop.
            if stop_loss is not None and taken >= settled:
                now = losses.tolist()
                ready = [i for i, loss in enumerate(now) if i not in ended and loss <= stop_loss]
                end(ready, taken, now)
                if len(ended) == len(batches):
                    break
                if ready:
                    objective.leave_out(ready)
            whole.sum().backward()
            if price is not None:
                price(0)
            sparse.observe()
            made.step()
            made.zero_grad()
        last = losses.tolist()
        over = time.perf_counter()
        seconds, whole_seconds = (over - start) / len(batches), (over - begin) / len(batches)
        sparse.finish()
        end(set(range(len(batches))) - set(ended), steps, last)
    return [
        (many.alone[edit], replace(trained, seconds=seconds, whole_seconds=whole_seconds))
        for edit, trained in sorted(ended.items())
    ]


def _alone(
    model: nn.Module,
    method: SparseMethod,
    seeds: Sequence[int],
    batches: Sequence[Mapping[str, Tensor]],
    held: HeldInputs | None,
    at_keys: bool,
) -> list[Mapping[str, LowRankLinear]]:
    """The adapters of each edit, drawn by its seed, outside of the model."""
    if method.dropout:
        raise CannotShareError("the method has dropout")
    alone: list[Mapping[str, LowRankLinear]] = []
    for seed, batch in zip(seeds, batches, strict=True):
        torch.manual_seed(seed)
        adapters = inject(model, method)
        try:
            require_adapters_alone(model, method, adapters)
            if at_keys:
                start_at_keys(model, method, adapters, [batch], held)
        finally:
            take_out(model)
        others = {type(adapter).__name__ for adapter in adapters.values()} - {LowRankLinear.__name__}
        if others:
            raise CannotShareError(f"the method adapts layers as {sorted(others)}")
        alone.append(cast("dict[str, LowRankLinear]", adapters))
    return alone


@contextmanager
def _together(model: nn.Module, alone: Sequence[Mapping[str, LowRankLinear]], routes: Routes) -> Iterator[_Many]:
    """Put the adapters of all edits into the model, and take them out again."""
    layers = {name: RowwiseLinear([adapters[name] for adapters in alone], routes) for name in alone[0]}
    try:
        replace_modules(model, {layer.layer: layer for layer in layers.values()})
        for layer in layers.values():
            layer.train(layer.base.training)
        yield _Many(layers, alone)
    finally:
        take_out(model)


def _random_state(device: torch.device) -> Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    state: Tensor = torch.get_device_module(device).get_rng_state(device)
    return state


def _padded(batch: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    # An edit whose model wrote nothing has no anchors.
    tensor = batch[name] if name in batch else torch.zeros_like(batch["labels"], dtype=torch.float32)
    return F.pad(tensor, (0, width - tensor.shape[1]), value=IGNORED if name == "labels" else 0)
