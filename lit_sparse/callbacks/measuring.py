"""Measure a module on a data set, apart from the Trainer's own evaluation."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torchmetrics import Metric

from lit_sparse.adapters.modes import in_mode
from lit_sparse.errors import UsageError

Metrics = dict[str, Metric]
"""Metrics of one data set, by the names under which they are logged."""


class Mean(Metric):
    """A mean over a data set: the sum of the values by their count. A NaN among the values stays.

    torchmetrics' ``MeanMetric`` (1.9) ignores the weights where it keeps NaN, and elsewhere waits for the device.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, count: Tensor | int) -> None:
        """Add the sum of some values, and their count."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The mean; NaN without values."""
        return self.total / self.count


def measure_loss(module: LightningModule, batch: Any, metrics: Metrics) -> None:
    """Update the ``loss`` by the mean loss of a batch, which the module takes as keyword arguments."""
    rows = next((value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.ndim), 1)
    metrics["loss"].update(module(**batch).loss * rows, rows)


def results(metrics: Metrics) -> dict[str, Tensor]:
    """The values of all metrics that were updated; a metric with several values has a name for each."""
    found: dict[str, Tensor] = {}
    for name, metric in metrics.items():
        if metric.update_called:
            value = metric.compute()
            found.update(value if isinstance(value, dict) else {name: value})
    return found


@torch.no_grad()
def measured(
    module: LightningModule, batches: Iterable[Any], data: Any = None, sharded: bool = False
) -> dict[str, float]:
    """The metrics of a module on a data set, in evaluation mode.

    Args:
        module: A module of this library is measured as in its validation. The loss of any other module is averaged over
            the rows; its output must have a ``.loss``.
        batches: Batches as its ``validation_step`` takes them.
        data: The data module that the batches come from.
        sharded: Whether each process is given its share of the batches. Then the metrics are those of all processes;
            else every process is given all batches.

    Raises:
        UsageError: If there is no batch, or nothing in the batches counts.
    """
    own: Any = module if hasattr(module, "make_metrics") else None
    metrics: Metrics = {"loss": Mean()} if own is None else own.make_metrics()
    for metric in metrics.values():
        metric.to(module.device)
    with in_mode(module, training=False):
        for batch in batches:
            moved = module.transfer_batch_to_device(batch, module.device, 0)
            if own is None:
                measure_loss(module, moved, metrics)
            else:
                own.measure(moved, metrics, data)
    updated = [metric for metric in metrics.values() if metric.update_called]
    if not updated or any(isinstance(metric, Mean) and not metric.count for metric in updated):
        raise UsageError(f"There is nothing to measure {type(module).__name__} by: no batches, or none with labels.")
    if not sharded:
        for metric in updated:
            metric.distributed_available_fn = _alone
    return {name: float(value) for name, value in results(metrics).items()}


def _alone() -> bool:
    return False
