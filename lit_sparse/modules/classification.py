"""Classify whole rows: texts, pairs of texts, images, sounds."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lit_sparse.callbacks.measuring import Figures
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.labels import name_classes
from lit_sparse.modules.metrics import CLASSIFICATION, REGRESSION, build_metrics, predictions
from lit_sparse.modules.optimization import LrSchedule


class Classification(SparseModule):
    """One class, or with one label one number, for each row of a batch; sub-classes name the auto class.

    The number of labels, their names and the metrics come from the data module when it has them
    (``num_labels``, ``label_names``, ``metrics``), so that a configuration says them once. Metrics are logged as
    ``val_accuracy`` and so on; with several validation sets as ``val_matched_accuracy`` …

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built.
        method: How to adapt it.
        num_labels: Number of classes, 1 for regression; None: the data module's, or the built model's.
        label_names: Names of the classes in the order of their numbers; None: the data module's.
        metrics: Among accuracy, f1, matthews; for regression pearson, spearman. None: the data module's, else
            accuracy, or both for regression.
        optimizer: Makes the optimizer from parameter groups; gates, biases and norms are exempt from its weight
            decay. In a YAML ``class_path: torch.optim.AdamW`` and ``init_args``.
        lr_schedule: ``linear`` or ``cosine`` decay to zero over the run, or ``constant``.
        warmup: Share of the run in which the learning rate rises linearly, in [0, 1).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the model by ``torch.compile``.
        backbone_args: Arguments for ``from_pretrained``: dtype (default float32), revision, attn_implementation …
        start_from: Folder of a dense LoRA in PEFT's format from which the adapters start, by
            :func:`~lit_sparse.load_peft`. A checkpoint that is resumed holds later values, and overrides it.
        new_tokens: Tokens to add to the backbone's tokenizer and to its embeddings, of which only the new rows are
            trained (:func:`~lit_sparse.add_tokens`).

    Raises:
        UsageError: If an argument is outside its range, the backbone cannot be loaded, or the number of labels
            is not known.
    """

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        num_labels: int | None = None,
        label_names: list[str] | None = None,
        metrics: list[str] | None = None,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_schedule: LrSchedule = "linear",
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        backbone_args: dict[str, Any] | None = None,
        start_from: str | None = None,
        new_tokens: list[str] | None = None,
    ) -> None:
        super().__init__(
            backbone,
            method,
            optimizer,
            lr_schedule,
            warmup,
            gradient_checkpointing,
            compile,
            backbone_args,
            start_from,
            new_tokens,
        )
        if num_labels is not None and num_labels < 1:
            raise UsageError(f"num_labels must be at least 1; got {num_labels}.")
        if label_names is not None and num_labels is not None and len(label_names) != num_labels:
            raise UsageError(f"num_labels is {num_labels}, but label_names has {len(label_names)}: {label_names}.")
        self.num_labels = num_labels
        self.label_names = label_names
        self.metrics = metrics

    def load_model(self) -> nn.Module:
        """Load the backbone with a new head of ``num_labels`` outputs, unless it has one of that size."""
        self.backbone_args = {**self._head_arguments(), **self.backbone_args}
        model = super().load_model()
        if self.label_names is not None:
            name_classes(model, self.label_names, self.method.train_head)
        return model

    def configure_model(self) -> None:
        """Learn labels and metrics from the data module, load, inject, and make the metrics."""
        if self.model is not None:
            return
        self._ask_data()
        if self._built and self.label_names is not None:
            name_classes(self._built[0], self.label_names, self.method.train_head)
        super().configure_model()
        count = self._known_num_labels()
        # In the checkpoint, so that it loads without a data module.
        self.hparams.update(num_labels=count, label_names=self.label_names, metrics=self.metrics)
        self._names = self.metrics or (list(REGRESSION) if count == 1 else [CLASSIFICATION[0]])
        build_metrics(self._names, count)  # raises for a metric of another kind of task before anything is trained
        self._metrics = nn.ModuleDict()

    def on_validation_epoch_start(self) -> None:
        """Make one set of metrics for each validation set."""
        self._make_metrics("val", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Make one set of metrics for each test set."""
        self._make_metrics("test", len(self.trainer.num_test_batches))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Update and log the metrics of one validation set."""
        self._evaluate("val", batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:  # noqa: ARG002
        """Update and log the metrics of one test set."""
        self._evaluate("test", batch, dataloader_idx)

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

    def measure(self, batch: dict[str, Any], data: Any = None) -> Figures:  # noqa: ARG002
        """Loss, and with several classes the share of rows that are classified right."""
        output, labels = self(**batch), batch["labels"]
        rows = torch.tensor(float(len(labels)), device=self.device)
        found = {"loss": (output.loss.detach() * rows, rows)}
        if self._known_num_labels() > 1:
            right = (predictions(output.logits, self._known_num_labels()) == labels).sum()
            found["accuracy"] = (right, rows)
        return found

    def _evaluate(self, stage: str, batch: dict[str, Tensor], index: int) -> None:
        if "labels" not in batch:
            raise UsageError(
                f"The {stage} rows have no labels (GLUE hides those of its test sets), so nothing can be measured. Use "
                "predict for them."
            )
        output = self(**batch)
        metrics = self._metrics[stage][index]  # type: ignore[index]
        metrics.update(predictions(output.logits, self._known_num_labels()), batch["labels"])
        loss_name = f"{metrics.prefix}loss"
        self.log(loss_name, output.loss, add_dataloader_idx=False, sync_dist=True, batch_size=len(batch["labels"]))
        self.log_dict(metrics, prog_bar=True, add_dataloader_idx=False, on_step=False, on_epoch=True)

    def _make_metrics(self, stage: str, count: int) -> None:
        if stage in self._metrics and len(self._metrics[stage]) == count:  # type: ignore[arg-type]
            return
        names = getattr(_datamodule(self), "validation_names", ()) if stage == "val" else ()
        if len(names) != count:
            names = ("",) if count == 1 else tuple(str(number) for number in range(count))
        built = build_metrics(self._names, self._known_num_labels())
        prefixes = [f"{stage}_{name}_" if name else f"{stage}_" for name in names]
        self._metrics[stage] = nn.ModuleList(built.clone(prefix=prefix) for prefix in prefixes).to(self.device)

    def _ask_data(self) -> None:
        """Take what was not given from the data module, and refuse what contradicts it."""
        data = _datamodule(self)
        count = getattr(data, "num_labels", None)
        if self.num_labels is None:
            self.num_labels = count
        elif count is not None and count != self.num_labels:
            raise UsageError(
                f"num_labels is {self.num_labels}, but the data has {count} ({getattr(data, 'label_names', None)}). "
                "Leave num_labels out to take it from the data."
            )
        if self.label_names is None:
            self.label_names = getattr(data, "label_names", None)
        if self.metrics is None:
            self.metrics = list(getattr(data, "metrics", ())) or None

    def _head_arguments(self) -> dict[str, Any]:
        """What ``from_pretrained`` must know to make the head."""
        # A head of another task, such as MNLI's three classes for RTE, gives way to a new one.
        return {"num_labels": self._known_num_labels(), "ignore_mismatched_sizes": True}

    def _known_num_labels(self) -> int:
        if self.num_labels is not None:
            return self.num_labels
        if self._built:
            count = getattr(getattr(self._built[0], "config", None), "num_labels", None)
            if isinstance(count, int):
                return count
        raise UsageError("The number of labels is not known: give num_labels, or fit with a data module that has it.")


class SequenceClassification(Classification):
    """Sequence classification, or regression with one label, of single texts or pairs.

    Arguments and errors are those of :class:`Classification`.
    """

    auto_class = AutoModelForSequenceClassification

    def configure_model(self) -> None:
        """Make the model as any classifier's, and tell it what rows are padded with."""
        super().configure_model()
        # A decoder such as GPT-2 classifies by the last token before the padding.
        config = getattr(self.model, "config", None)
        if config is not None and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = getattr(_datamodule(self), "pad_token_id", None)


def _datamodule(module: SparseModule) -> object | None:
    """The Trainer's data module, None outside a Trainer."""
    trainer = module._trainer
    return getattr(trainer, "datamodule", None) if trainer is not None else None
