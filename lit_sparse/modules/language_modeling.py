"""Causal language modelling of prompts and responses, with the loss on the responses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lit_sparse.modules.base import SparseModule

IGNORED = -100
"""The label of tokens without loss: prompts and padding."""


class CausalLM(SparseModule):
    """Fine-tune a causal language model on the tokens whose label is not -100.

    :class:`~lit_sparse.InstructionData` labels the responses only. Evaluation logs, over all labelled tokens of
    the set, ``val_loss`` (nats per token), ``val_perplexity`` = e to that loss, and ``val_token_accuracy``, the
    share of tokens predicted exactly from those before them.

    Args are those of :class:`~lit_sparse.SparseModule`.
    """

    auto_class = AutoModelForCausalLM

    def configure_model(self) -> None:
        """Load, inject, and make the metrics."""
        if self.model is not None:
            return
        super().configure_model()
        self._loss = MeanMetric()
        self._token_accuracy = MeanMetric()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Update the metrics by one batch."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # noqa: ARG002
        """Update the metrics by one batch."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the validation set."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the test set."""
        self._log_metrics("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:  # noqa: ARG002
        """Each row's mean loss per labelled token, in nats, and its share of tokens predicted exactly."""
        logits, labels = self._shifted(batch)
        counted = labels != IGNORED
        tokens = counted.sum(1).clamp(min=1)
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2).float(), labels, ignore_index=IGNORED, reduction="none"
        )
        right = (logits.argmax(-1) == labels) & counted
        return {"loss": losses.sum(1) / tokens, "token_accuracy": right.sum(1) / tokens}

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        logits, labels = self._shifted(batch)
        counted = labels != IGNORED
        tokens = counted.sum()
        # By token, not by batch: the mean of batch means is not the loss of the set.
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        right = ((logits.argmax(-1) == labels) & counted).sum()
        self._loss.update(losses / tokens, tokens)
        self._token_accuracy.update(right / tokens, tokens)

    def _log_metrics(self, stage: str) -> None:
        loss = self._loss.compute()
        figures = {
            f"{stage}_loss": loss,
            f"{stage}_perplexity": loss.exp(),
            f"{stage}_token_accuracy": self._token_accuracy.compute(),
        }
        self.log_dict(figures, prog_bar=True)
        self._loss.reset()
        self._token_accuracy.reset()

    def _shifted(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of shape (rows, tokens - 1, vocabulary) and the labels they are to predict."""
        logits: Tensor = self(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits[:, :-1], batch["labels"][:, 1:]
