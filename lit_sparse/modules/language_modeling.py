"""Language modelling: what is measured by token, and causal models of prompts and responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from transformers import AutoModelForCausalLM

from lit_sparse.callbacks.measuring import Figures
from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.optimization import LrSchedule

IGNORED = -100
"""The label of tokens without loss: prompts, tokens that are not masked, and padding."""


class LanguageModel(SparseModule):
    """Measures a model by the tokens whose label is not -100; the base of the language models.

    Evaluation logs, over all labelled tokens of the set, ``val_loss`` (nats per token), ``val_perplexity`` = e to
    that loss, and ``val_token_accuracy``, the share of labelled tokens that the model finds most likely. Arguments
    and errors are those of :class:`~lit_sparse.SparseModule`.
    """

    def configure_model(self) -> None:
        """Load, inject, and make the metrics."""
        if self.model is not None:
            return
        super().configure_model()
        self._loss = MeanMetric()
        self._token_accuracy = MeanMetric()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse the data of another task, which has one label for each row."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None  # a BatchEncoding is no dict
        if labels is not None and labels.ndim < 2:
            raise UsageError(
                f"{type(self).__name__} needs a label for every token, and the data has one for every row: it is for "
                "another task, such as classification."
            )
        return super().on_before_batch_transfer(batch, dataloader_idx)

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

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of shape (rows, tokens, vocabulary) and the labels (rows, tokens) that each is to predict."""
        return self(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]

    def measure(self, batch: dict[str, Any], data: Any = None) -> Figures:  # noqa: ARG002
        """Loss in nats per labelled token, and the share of these that the model finds most likely."""
        logits, labels = self._scored(batch)
        counted = labels != IGNORED
        tokens = counted.sum()
        # By token, not by batch: the mean of batch means is not the loss of the set.
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        right = ((logits.argmax(-1) == labels) & counted).sum()
        return {"loss": (losses.detach(), tokens), "token_accuracy": (right, tokens)}

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        found = LanguageModel.measure(self, batch)
        for metric, (total, tokens) in zip((self._loss, self._token_accuracy), found.values(), strict=True):
            metric.update(total / tokens.clamp(min=1), tokens)  # a batch without labelled tokens has no weight

    def _figures(self) -> dict[str, Tensor]:
        """The figures of an epoch by name."""
        loss = self._loss.compute()
        return {"loss": loss, "perplexity": loss.exp(), "token_accuracy": self._token_accuracy.compute()}

    def _log_metrics(self, stage: str) -> None:
        self.log_dict({f"{stage}_{name}": value for name, value in self._figures().items()}, prog_bar=True)

    def _reset_metrics(self) -> None:
        # Before an epoch, not after it: what is reset in validate's inference mode, fit could not update.
        self._loss.reset()
        self._token_accuracy.reset()

    def _generate(self, batch: dict[str, Tensor], max_new_tokens: int) -> Tensor:
        """What the model's own ``generation_config`` makes of the inputs: greedy unless that says otherwise."""
        if self.model is None:
            raise UsageError(
                f"{type(self).__name__} has no model yet: call configure_model() first, as the Trainer does."
            )
        tokens: Tensor = self.model.generate(**batch, max_new_tokens=max_new_tokens)  # type: ignore[operator]
        return tokens

    def _texts(self, tokens: Tensor) -> dict[str, list[str]]:
        """The ``text`` of rows of tokens, if there is a data module that can decode."""
        data = getattr(self.trainer, "datamodule", None)
        return {"text": data.decode(tokens)} if data is not None and hasattr(data, "decode") else {}


class CausalLM(LanguageModel):
    """Fine-tune a causal language model on the tokens whose label is not -100.

    :class:`~lit_sparse.InstructionData` labels the responses only. Evaluation logs, over all labelled tokens of
    the set, ``val_loss`` (nats per token), ``val_perplexity`` = e to that loss, and ``val_token_accuracy``, the
    share of tokens predicted exactly from those before them. Where batches hold ``answers``, as those of
    :class:`~lit_sparse.ReasoningData`, the model goes on from the prompts instead, and the share of right answers is
    logged: ``test_<set>_accuracy`` for every set, and their mean ``test_accuracy``.

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built.
        method: How to adapt it.
        max_new_tokens: Longest continuation that ``predict`` and answers generate, in tokens.
        num_beams: Beams of the search for answers; 1 is greedy. LLM-Adapters has 4.
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
        UsageError: If an argument is outside its range, or the backbone cannot be loaded.
    """

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        max_new_tokens: int = 64,
        num_beams: int = 1,
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
        if max_new_tokens < 1:
            raise UsageError(f"max_new_tokens must be at least 1; got {max_new_tokens}.")
        if num_beams < 1:
            raise UsageError(f"num_beams must be at least 1; got {num_beams}.")
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams

    def configure_model(self) -> None:
        """Load, inject, and make the metrics."""
        if self.model is not None:
            return
        super().configure_model()
        self._answers = nn.ModuleList()

    def on_validation_epoch_start(self) -> None:
        """Start the metrics anew."""
        super().on_validation_epoch_start()
        self._count_answers("validation", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Start the metrics anew, one for each test set."""
        super().on_test_epoch_start()
        self._count_answers("test", len(self.trainer.num_test_batches))

    def validation_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics by one batch: by its labels, or by answers to its prompts."""
        if "answers" in batch:
            self._accuracies[dataloader_idx].update(self.answer(batch, self._set_names[dataloader_idx]))
        else:
            super().validation_step(batch, batch_idx)

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Update the metrics by one batch: by its labels, or by answers to its prompts."""
        self.validation_step(batch, batch_idx, dataloader_idx)

    def answer(self, batch: dict[str, Any], name: str = "", data: Any = None) -> Tensor:
        """Go on from the prompts of a batch, greedily or by beams, never by chance, and compare the answers.

        Args:
            batch: ``input_ids`` and ``attention_mask`` padded on the left, and ``answers``, a text for each row.
            name: The set that the rows are of.
            data: What decodes and judges: ``decode(tokens)`` and ``is_right(text, answer, name)``; None: the data
                module of the Trainer.

        Returns:
            1 for each row that was answered right, else 0.
        """
        if self.model is None:
            raise UsageError("CausalLM has no model yet: call configure_model() first, as the Trainer does.")
        data = data or self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        new = most_likely_continuation(self.model, prompts, self.max_new_tokens, self.num_beams)
        texts = data.decode(new)
        right = [data.is_right(text, answer, name) for text, answer in zip(texts, batch["answers"], strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=new.device)

    def measure(self, batch: dict[str, Any], data: Any = None) -> Figures:
        """As of any language model; where the batch holds ``answers``, the share of right ones."""
        if "answers" not in batch:
            return super().measure(batch, data)
        right = self.answer(batch, data=data)
        return {"accuracy": (right.sum(), torch.tensor(float(len(right)), device=right.device))}

    def _count_answers(self, stage: str, count: int) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), f"{stage}_names", ())
        self._set_names = tuple(names) if len(names) == count else ("",) * count
        self._answers = nn.ModuleList(MeanMetric() for _ in range(count)).to(self.device)

    @property
    def _accuracies(self) -> list[MeanMetric]:
        return cast(list[MeanMetric], list(self._answers))

    def _log_metrics(self, stage: str) -> None:
        if self._loss.update_called:
            super()._log_metrics(stage)
        found = [
            (name, m.compute()) for name, m in zip(self._set_names, self._accuracies, strict=True) if m.update_called
        ]
        figures = {f"{stage}_{name}_accuracy": value for name, value in found if name}
        if found:
            # Every set counts as much as another, however many rows it has.
            figures[f"{stage}_accuracy"] = torch.stack([value for _, value in found]).mean()
        self.log_dict(figures, prog_bar=True)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:  # noqa: ARG002
        """Continue each prompt of a batch that is padded on the left: ``tokens``, and ``text`` if the data can decode.

        Decoding is the model's own ``generation_config``, greedy unless that says otherwise.
        """
        prompts = {k: v for k, v in batch.items() if k != "labels"}
        new = self._generate(prompts, self.max_new_tokens)[:, batch["input_ids"].shape[1] :]
        return {"tokens": new, **self._texts(new)}

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = super()._scored(batch)
        return logits[:, :-1], labels[:, 1:]  # each token is predicted where the one before it stands


def most_likely_continuation(model: Any, prompts: dict[str, Tensor], max_new_tokens: int, num_beams: int = 1) -> Tensor:
    """What a model goes on with, greedily or by beams, never by chance.

    Args:
        model: A causal language model.
        prompts: ``input_ids`` and ``attention_mask``, padded on the left.
        max_new_tokens: Longest continuation.
        num_beams: Beams of the search; 1 is greedy.

    Returns:
        The new tokens alone, of shape ``(rows, longest continuation)``.
    """
    # Sampling switched off must take its settings along, or transformers warns of each of them.
    by_chance = dict.fromkeys(("temperature", "top_p", "top_k"))
    tokens: Tensor = model.generate(
        **prompts, max_new_tokens=max_new_tokens, num_beams=num_beams, do_sample=False, **by_chance
    )
    return tokens[:, prompts["input_ids"].shape[1] :]
