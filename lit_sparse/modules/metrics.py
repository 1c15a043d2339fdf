"""The metrics of sequence classification, from torchmetrics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef

from lit_sparse.errors import UsageError

REGRESSION = ("pearson", "spearman")
CLASSIFICATION = ("accuracy", "f1", "matthews")


def build_metrics(names: Sequence[str], num_labels: int) -> dict[str, Metric]:
    """Make metrics by their names.

    Args:
        names: ``accuracy``, ``f1`` (of class 1 with two classes, macro average with more), ``matthews`` (0 where only
            one class is predicted or true); ``pearson``, ``spearman`` for regression.
        num_labels: Number of classes; 1 for regression.

    Raises:
        UsageError: If a name is unknown, or is not for this kind of task.
    """
    known = REGRESSION if num_labels == 1 else CLASSIFICATION
    unfit = [name for name in names if name not in known]
    if unfit:
        kind = "regression (one label)" if num_labels == 1 else f"classification with {num_labels} labels"
        raise UsageError(f"metrics {unfit} do not exist for {kind}; there are {list(known)}.")
    return {name: _metric(name, num_labels) for name in names}


def predictions(logits: Tensor, num_labels: int) -> Tensor:
    """The class numbers that metrics compare with labels; for regression the values."""
    return logits.float().squeeze(-1) if num_labels == 1 else logits.argmax(-1)


def _metric(name: str, num_labels: int) -> Metric:
    if name == "accuracy":
        return MulticlassAccuracy(num_labels, average="micro")
    if name == "f1":
        return BinaryF1Score() if num_labels == 2 else MulticlassF1Score(num_labels, average="macro")
    if name == "matthews":
        return _Matthews(num_labels)
    if name == "pearson":
        return PearsonCorrCoef()
    return SpearmanCorrCoef()


class _Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation that is 0 where only one class is predicted or true, as in GLUE.

    With two classes torchmetrics gives another number there: 0.037 for a model that calls all of CoLA acceptable.
    """

    def compute(self) -> Tensor:
        rows, columns = (self.confmat.sum(dim).count_nonzero() for dim in (1, 0))
        return super().compute() * ((rows > 1) & (columns > 1))
