"""The metrics of sequence classification, from torchmetrics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelF1Score,
)
from torchmetrics.regression import PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.utilities.data import dim_zero_cat

from lit_sparse.errors import UsageError

Kinds = Mapping[str, Callable[[int], Metric]]

THRESHOLD = 0.5
"""Of several labels, those whose probability is above this are predicted."""

# Name → what makes the metric of a number of labels. torchmetrics checks labels by waiting for the device at every
# batch; the loss refuses them before.
REGRESSION: Kinds = {"pearson": lambda _: PearsonCorrCoef(), "spearman": lambda _: SpearmanCorrCoef()}
CLASSIFICATION: Kinds = {
    "accuracy": lambda n: MulticlassAccuracy(n, average="micro", validate_args=False),
    "f1": lambda n: (
        BinaryF1Score(validate_args=False) if n == 2 else MulticlassF1Score(n, average="macro", validate_args=False)
    ),
    "matthews": lambda n: _Matthews(n, validate_args=False),
}
MULTI_LABEL: Kinds = {
    "accuracy": lambda n: MultilabelAccuracy(n, threshold=THRESHOLD, average="micro", validate_args=False),
    "f1_macro": lambda n: MultilabelF1Score(n, threshold=THRESHOLD, average="macro", validate_args=False),
    "f1_micro": lambda n: MultilabelF1Score(n, threshold=THRESHOLD, average="micro", validate_args=False),
    "auroc": lambda n: _Auroc(n, average="none", validate_args=False),
}


def build_metrics(names: Sequence[str], num_labels: int, multi_label: bool = False) -> dict[str, Metric]:
    """Make metrics by their names.

    Args:
        names: ``accuracy``, ``f1`` (of class 1 with two classes, macro average with more), ``matthews`` (0 where only
            one class is predicted or true); ``pearson``, ``spearman`` for regression. With several labels per row:
            ``accuracy`` (share of right decisions, over all rows and labels), ``f1_macro`` (mean over the labels; 0
            for one that is neither predicted nor true), ``f1_micro`` (over all decisions), ``auroc`` (mean over the
            labels that some rows have and others have not; it keeps the probabilities of all rows).
        num_labels: Number of classes; 1 for regression.
        multi_label: Whether a row has any number of labels.

    Raises:
        UsageError: If a name is unknown, or is not for this kind of task.
    """
    known = MULTI_LABEL if multi_label else REGRESSION if num_labels == 1 else CLASSIFICATION
    unfit = [name for name in names if name not in known]
    if unfit:
        kind = "regression (one label)" if num_labels == 1 else f"classification with {num_labels} labels"
        kind += ", any number of them per row" if multi_label else ""
        raise UsageError(f"metrics {unfit} do not exist for {kind}; there are {list(known)}.")
    return {name: known[name](num_labels) for name in names}


def predictions(logits: Tensor, num_labels: int, multi_label: bool = False) -> Tensor:
    """What metrics compare with labels: class numbers; the values for regression; probabilities of several labels."""
    if multi_label:
        return logits.float().sigmoid()
    return logits.float().squeeze(-1) if num_labels == 1 else logits.argmax(-1)


class _Auroc(MultilabelAUROC):
    """The mean over the labels for which there is such an area; torchmetrics counts the others as 0."""

    def compute(self) -> Tensor:  # type: ignore[override]
        share = dim_zero_cat(self.target).float().mean(0)
        defined = (share > 0) & (share < 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No (positive|negative) samples")
            return super().compute()[defined].mean()


class _Matthews(MulticlassMatthewsCorrCoef):
    """Matthews' correlation that is 0 where only one class is predicted or true, as in GLUE.

    With two classes torchmetrics gives another number there: 0.037 for a model that calls all of CoLA acceptable.
    """

    def compute(self) -> Tensor:
        rows, columns = (self.confmat.sum(dim).count_nonzero() for dim in (1, 0))
        return super().compute() * ((rows > 1) & (columns > 1))
