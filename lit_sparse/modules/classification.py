"""Classify whole rows: texts, pairs of texts, images, sounds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_sparse.callbacks.measuring import Metrics
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.labels import LabelledModule
from lit_sparse.modules.metrics import CLASSIFICATION, REGRESSION, build_metrics, predictions


class Classification(LabelledModule):
    """One class, or with one label one number, for each row of a batch; sub-classes name the auto class.

    The number of labels, their names and the metrics come from the data module when it has them
    (``num_labels``, ``label_names``, ``metrics``), so that a configuration says them once. Metrics are logged as
    ``val_accuracy`` and so on; with several validation sets as ``val_matched_accuracy`` …

    Args:
        metrics: Among accuracy, f1, matthews; for regression pearson, spearman. None: the data module's, else
            accuracy, or both for regression.
        options: Further arguments of :class:`~lit_sparse.modules.labels.LabelledModule`.

    Raises:
        UsageError: As for ``LabelledModule``, or if a metric does not fit the task.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        *,
        metrics: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        self.metrics = metrics

    def configure_model(self) -> None:
        """Learn labels and metrics from the data module, load and inject."""
        if self.model is not None:
            return
        if self.metrics is None:
            self.metrics = list(getattr(self._data, "metrics", None) or ()) or None
        super().configure_model()
        self.hparams.update(metrics=self.metrics)
        self.make_metrics()  # raises for a metric of another kind of task before anything is trained

    def make_metrics(self) -> Metrics:
        """The loss, and the metrics that were named."""
        count = self._known_num_labels()
        names = self.metrics or (list(REGRESSION) if count == 1 else [CLASSIFICATION[0]])
        return {**super().make_metrics(), **build_metrics(names, count)}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics by a batch with ``labels``."""
        if "labels" not in batch:
            raise UsageError(
                "The rows have no labels (GLUE hides those of its test sets), so nothing can be measured. Use predict "
                "for them."
            )
        output = self(**batch)
        found = predictions(output.logits, self._known_num_labels())
        for key, metric in metrics.items():
            if key == "loss":
                metric.update(output.loss * len(found), len(found))
            else:
                metric.update(found, batch["labels"])

    def predict_step(
        self,
        batch: dict[str, Tensor],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> dict[str, Tensor]:
        """Class numbers and probabilities of a batch; the values for regression."""
        logits = self(**{k: v for k, v in batch.items() if k != "labels"}).logits
        found = {"prediction": predictions(logits, self._known_num_labels())}
        if self._known_num_labels() > 1:
            found["probabilities"] = logits.float().softmax(-1)
        return found


class SequenceClassification(Classification):
    """Sequence classification, or regression with one label, of single texts or pairs.

    Arguments and errors are those of :class:`~lit_sparse.modules.classification.Classification`.
    """

    auto_class = AutoModelForSequenceClassification

    def configure_model(self) -> None:
        """Make the model as any classifier's, and tell it what rows are padded with."""
        super().configure_model()
        # A decoder such as GPT-2 classifies by the last token before the padding.
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = getattr(self._data, "pad_token_id", None)
