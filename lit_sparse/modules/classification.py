"""Classify whole rows: texts, pairs of texts, images, sounds."""

from __future__ import annotations

from itertools import compress
from typing import Any

from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_sparse.callbacks.measuring import Metrics
from lit_sparse.errors import UsageError
from lit_sparse.methods.method import Method
from lit_sparse.modules.labels import LabelledModule
from lit_sparse.modules.metrics import MULTI_LABEL, REGRESSION, THRESHOLD, build_metrics, predictions

_SEVERAL = "multi_label_classification"  # the problem_type of transformers' configurations


class Classification(LabelledModule):
    """One class, or with one label one number, for each row of a batch; sub-classes name the auto class.

    The number of labels, their names and the metrics come from the data module when it has them
    (``num_labels``, ``label_names``, ``metrics``), so that a configuration says them once. Metrics are logged as
    ``val_accuracy`` and so on; with several validation sets as ``val_matched_accuracy`` …

    Args:
        metrics: Among accuracy, f1, matthews; for regression pearson, spearman; for several labels per row accuracy,
            f1_macro, f1_micro, auroc. None: the data module's, else accuracy, both for regression, or all but auroc.
        options: Further arguments of :class:`~lit_sparse.modules.labels.LabelledModule`.

    Raises:
        UsageError: As for ``LabelledModule``, or if a metric does not fit the task.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        metrics: list[str] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        self.metrics = metrics

    def _ask_data(self) -> None:
        super()._ask_data()
        if self.metrics is None:
            self.metrics = list(getattr(self._data, "metrics", None) or ()) or None

    def _check_model(self) -> None:
        super()._check_model()
        self.hparams.update(metrics=self.metrics)
        self.make_metrics()  # raises for a metric of another kind of task before anything is trained

    def make_metrics(self) -> Metrics:
        """The loss, and the metrics that were named."""
        count = self._known_num_labels()
        default = list(MULTI_LABEL)[:3] if self._several else list(REGRESSION) if count == 1 else ["accuracy"]
        return {**super().make_metrics(), **build_metrics(self.metrics or default, count, self._several)}

    @property
    def _several(self) -> bool:
        """Whether a row has any number of labels."""
        return getattr(getattr(self.model, "config", None), "problem_type", None) == _SEVERAL

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics with a batch with ``labels``."""
        if "labels" not in batch:
            raise UsageError(
                "The rows have no labels (GLUE hides those of its test sets), so nothing can be measured. Use predict "
                "for them."
            )
        output = self(**batch)
        found = predictions(output.logits, self._known_num_labels(), self._several)
        labels = batch["labels"].long() if self._several else batch["labels"]
        for key, metric in metrics.items():
            if key == "loss":
                metric.update(output.loss * len(found), len(found))
            else:
                metric.update(found, labels)

    def predict_step(
        self,
        batch: dict[str, Tensor],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Class numbers and probabilities of a batch; the values for regression; the names of several labels."""
        logits = self(**{k: v for k, v in batch.items() if k != "labels"}).logits
        found = predictions(logits, self._known_num_labels(), self._several)
        if self._several:
            names, chosen = self._names(), (found > THRESHOLD).tolist()
            return {"prediction": [list(compress(names, row)) for row in chosen], "probabilities": found}
        if self._known_num_labels() > 1:
            return {"prediction": found, "probabilities": logits.float().softmax(-1)}
        return {"prediction": found}


class SequenceClassification(Classification):
    """Sequence classification, or regression with one label, of single texts or pairs.

    With ``multi_label`` a row has any number of labels. Each label has a probability of its own, the sigmoid of its
    logit, and is predicted if that is above 0.5. The loss is the binary cross-entropy, averaged over rows and labels.

    Args:
        multi_label: Whether a row has any number of labels. None: as the data module says, else as the built model's
            ``problem_type`` says.
        options: Further arguments of :class:`~lit_sparse.modules.classification.Classification`.

    Raises:
        UsageError: As for ``Classification``, or if the data contradicts ``multi_label``.
    """

    auto_class = AutoModelForSequenceClassification

    def __init__(
        self, backbone: str | nn.Module, method: Method, *, multi_label: bool | None = None, **options: Any
    ) -> None:
        super().__init__(backbone, method, **options)
        self.multi_label = multi_label

    def _ask_data(self) -> None:
        super()._ask_data()
        found = getattr(self._data, "multi_label", None)
        if self.multi_label is None:
            self.multi_label = found
        elif found is not None and found != self.multi_label:
            raise UsageError(
                f"multi_label is {self.multi_label}, but each row of the data has "
                f"{'any number of labels' if found else 'one label'}. Leave multi_label out to take it from the data."
            )

    def _prepare_head(self, model: nn.Module) -> None:
        super()._prepare_head(model)
        config: Any = getattr(model, "config", None)
        if config is None or self.multi_label is None:
            return
        single = self._known_num_labels() == 1
        if single and self.multi_label:
            raise UsageError("multi_label needs at least two labels, but num_labels is 1.")
        one = "regression" if single else "single_label_classification"
        config.problem_type = _SEVERAL if self.multi_label else one

    def _check_model(self) -> None:
        super()._check_model()
        self.multi_label = self._several
        self.hparams.update(multi_label=self.multi_label)
        # A decoder such as GPT-2 classifies by the last token before the padding.
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = getattr(self._data, "pad_token_id", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with any number of labels per row if the checkpoint was trained so, and refuse other data."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("hyper_parameters", {}).get("multi_label")
        if stored is None or stored == self.multi_label:
            return
        if getattr(self._data, "multi_label", None) is not None:
            raise UsageError(
                f"The checkpoint was trained with {'any number of labels' if stored else 'one label'} per row, and the "
                "data is of the other kind. Give other data, or another checkpoint."
            )
        self.multi_label = stored
        self._prepare_head(self._require_model())
