"""Average what a module measures over a set, apart from the Trainer's own evaluation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lit_sparse.errors import UsageError

Figures = dict[str, tuple[Tensor, Tensor]]
"""Name to sum and count, both scalars; their ratio over a set is the figure."""


@torch.no_grad()
def measured(
    module: LightningModule, batches: Iterable[Any], data: Any = None, shares_of: Trainer | None = None
) -> dict[str, float]:
    """The figures of a set, without dropout and gradients.

    A figure by token brings its exponential too, as ``perplexity``. Every process measures all batches that it is
    given.

    Args:
        module: What measures: a module with ``measure(batch, data)``, which returns :data:`Figures`, as classifiers and
            language models of this library; or any whose output has a ``.loss``, which is averaged by rows.
        batches: As its ``validation_step`` takes them.
        data: The data module that they are from.
        shares_of: A Trainer each of whose processes is given its share of the batches: figures are those of all. None:
            every process is given the same, or there is one.

    Raises:
        UsageError: If there is no batch, or nothing in the batches that counts.
    """
    measure = getattr(module, "measure", None)
    sums: dict[str, list[Tensor]] = {}
    was_training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        for batch in batches:
            moved = module.transfer_batch_to_device(batch, module.device, 0)
            found = measure(moved, data) if measure is not None else _loss(module, moved)
            for name, pair in found.items():
                old = sums.get(name, [torch.zeros((), device=value.device) for value in pair])
                sums[name] = [a + b for a, b in zip(old, pair, strict=True)]
    finally:
        for part, training in was_training.items():
            part.training = training
    if not sums or any(not count for _, count in sums.values()):
        raise UsageError(f"There is nothing to measure {type(module).__name__} by: no batches, or none with labels.")
    if shares_of is not None:
        add = shares_of.strategy.reduce
        sums = {name: [add(value, reduce_op="sum") for value in pair] for name, pair in sums.items()}
    figures = {name: float(total / count) for name, (total, count) in sums.items()}
    if "token_accuracy" in figures:
        figures["perplexity"] = math.exp(min(figures["loss"], 700.0))  # e⁷⁰⁰ is the end of floating point
    return figures


def _loss(module: LightningModule, batch: Any) -> Figures:
    loss = module(**batch).loss
    count = next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)
    rows = torch.tensor(float(count), device=loss.device)
    return {"loss": (loss * rows, rows)}
