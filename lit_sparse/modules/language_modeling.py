"""Causal language modelling of prompts and responses, with the loss on the responses."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.optimization import LrSchedule

IGNORED = -100
"""The label of tokens without loss: prompts and padding."""


class CausalLM(SparseModule):
    """Fine-tune a causal language model on the tokens whose label is not -100.

    :class:`~lit_sparse.InstructionData` labels the responses only. Evaluation logs, over all labelled tokens of
    the set, ``val_loss`` (nats per token), ``val_perplexity`` = e to that loss, and ``val_token_accuracy``, the
    share of tokens predicted exactly from those before them.

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built.
        method: How to adapt it.
        max_new_tokens: Longest continuation that ``predict`` generates, in tokens.
        optimizer: Makes the optimizer from parameter groups; gates, biases and norms are exempt from its weight
            decay. In a YAML ``class_path: torch.optim.AdamW`` and ``init_args``.
        lr_schedule: ``linear`` or ``cosine`` decay to zero over the run, or ``constant``.
        warmup: Share of the run in which the learning rate rises linearly, in [0, 1).
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        compile: Compile the model by ``torch.compile``.
        backbone_args: Arguments for ``from_pretrained``: dtype (default float32), revision, attn_implementation …

    Raises:
        UsageError: If an argument is outside its range, or the backbone cannot be loaded.
    """

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        max_new_tokens: int = 64,
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        lr_schedule: LrSchedule = "linear",
        warmup: float = 0.06,
        gradient_checkpointing: bool = False,
        compile: bool = False,  # noqa: A002
        backbone_args: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(
            backbone, method, optimizer, lr_schedule, warmup, gradient_checkpointing, compile, backbone_args
        )
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        self.max_new_tokens = max_new_tokens

    def configure_model(self) -> None:
        """Load, inject, and make the metrics."""
        if self.model is not None:
            return
        super().configure_model()
        self._loss = MeanMetric()
        self._token_accuracy = MeanMetric()

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew."""
        self._reset_metrics()

    def on_test_epoch_start(self) -> None:
        """Start the metrics anew."""
        self._reset_metrics()

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

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Continue each prompt of a batch that is padded on the left: ``tokens``, and ``text`` if the data can decode.

        Decoding is the model's own ``generation_config``, greedy unless that says otherwise.
        """
        if self.model is None:
            raise UsageError("CausalLM has no model yet: call configure_model() first, as the Trainer does.")
        prompts = {k: v for k, v in batch.items() if k != "labels"}
        tokens = self.model.generate(**prompts, max_new_tokens=self.max_new_tokens)  # type: ignore[operator]
        new: Tensor = tokens[:, batch["input_ids"].shape[1] :]
        data = getattr(self.trainer, "datamodule", None)
        texts = {"text": data.decode(new)} if data is not None and hasattr(data, "decode") else {}
        return {"tokens": new, **texts}

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        logits, labels = self._shifted(batch)
        counted = labels != IGNORED
        tokens = counted.sum()
        divisor = tokens.clamp(min=1)  # a batch without labelled tokens has no mean, and no weight
        # By token, not by batch: the mean of batch means is not the loss of the set.
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        right = ((logits.argmax(-1) == labels) & counted).sum()
        self._loss.update(losses / divisor, tokens)
        self._token_accuracy.update(right / divisor, tokens)

    def _log_metrics(self, stage: str) -> None:
        loss = self._loss.compute()
        figures = {
            f"{stage}_loss": loss,
            f"{stage}_perplexity": loss.exp(),
            f"{stage}_token_accuracy": self._token_accuracy.compute(),
        }
        self.log_dict(figures, prog_bar=True)

    def _reset_metrics(self) -> None:
        # Before an epoch, not after it: what is reset in validate's inference mode, fit could not update.
        self._loss.reset()
        self._token_accuracy.reset()

    def _shifted(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Logits of shape (rows, tokens - 1, vocabulary) and the labels they are to predict."""
        logits: Tensor = self(**{k: v for k, v in batch.items() if k != "labels"}).logits
        return logits[:, :-1], batch["labels"][:, 1:]
