"""Language models: causal models of prompts and responses, and what they share with other language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lit_sparse.callbacks.measuring import Mean, Metrics
from lit_sparse.data.padding import IGNORED
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.packing import as_model_inputs, is_packed, require_rows_apart

# Sampling switched off must take its settings along, or transformers warns of each of them.
WITHOUT_SAMPLING: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
"""Arguments of ``generate``."""


class LanguageModel(SparseModule):
    """Measures a model by the tokens whose label is not -100; the base of the language models.

    Evaluation logs, over all labelled tokens of the set, ``val_loss`` (nats per token), ``val_perplexity`` = e to
    that loss, and ``val_token_accuracy``, the share of labelled tokens that the model finds most likely. Arguments
    and errors are those of :class:`~lit_sparse.SparseModule`.
    """

    _label_dimensions: ClassVar[tuple[int, ...]] = (2,)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """The model's own loss."""
        self._require_labels(batch)
        return super().training_step(batch, batch_idx)

    def _require_labels(self, batch: Any) -> None:
        """Refuse the data of another task, which has one label for each row, or pairs of answers."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None  # a BatchEncoding is no dict
        if labels is not None and labels.ndim not in self._label_dimensions:
            found = "one for every row" if labels.ndim < 2 else "them for pairs of answers"
            task = "classification" if labels.ndim < 2 else "that of PreferenceLM"
            raise UsageError(
                f"{type(self).__name__} needs a label for every token, and the data has {found}: it is for another "
                f"task, such as {task}."
            )

    def make_metrics(self) -> Metrics:
        """Loss, perplexity and accuracy by token."""
        return {**super().make_metrics(), "perplexity": _Perplexity(), "token_accuracy": Mean()}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:  # noqa: ARG002
        """Update metrics by the labelled tokens of a batch."""
        self._require_labels(batch)
        logits, labels = self._scored(batch)
        counted = labels != IGNORED
        tokens = counted.sum()
        # By token, not by batch: the mean of batch means is not the loss of the set.
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        right = ((logits.argmax(-1) == labels) & counted).sum()
        for key, total in (("loss", losses), ("perplexity", losses), ("token_accuracy", right)):
            metrics[key].update(total, tokens)

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of shape (rows, tokens, vocabulary), and the labels (rows, tokens) that each is to predict."""
        return self(**{k: v for k, v in batch.items() if k != "labels"}).logits, batch["labels"]

    def _predicted(self, batch: dict[str, Tensor], tokens: Tensor) -> dict[str, Any]:
        """A prediction: the generated ``tokens``, and ``prompt`` and ``text`` if the data module can decode."""
        data = self._data
        if not hasattr(data, "decode"):
            return {"tokens": tokens}
        return {"prompt": data.decode(batch["input_ids"]), "text": data.decode(tokens), "tokens": tokens}


class CausalLM(LanguageModel):
    """Fine-tune a causal language model on the tokens whose label is not -100.

    :class:`~lit_sparse.InstructionData` labels the responses only, and :class:`~lit_sparse.ChatData` the assistant's
    turns. Evaluation logs, over all labelled tokens of the set, ``val_loss`` (nats per token), ``val_perplexity`` = e
    to that loss, and ``val_token_accuracy``, the share of tokens predicted exactly from those before them. Batches with
    ``answers``, as :class:`~lit_sparse.ReasoningData` has them, are prompts: the model continues them, and the share of
    right answers is logged as ``test_<set>_accuracy`` for every set, and their mean as ``test_accuracy``.

    Args:
        max_new_tokens: Longest continuation that ``predict`` and answers generate, in tokens.
        num_beams: Beams of the search for answers; 1 is greedy. LLM-Adapters has 4.
        options: Further arguments of :class:`~lit_sparse.SparseModule`.

    Raises:
        UsageError: If an argument is outside its range, or the backbone cannot be loaded.
    """

    auto_class = AutoModelForCausalLM

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        max_new_tokens: int = 64,
        num_beams: int = 1,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        require_range("max_new_tokens", max_new_tokens, at_least=1)
        require_range("num_beams", num_beams, at_least=1)
        self.max_new_tokens = max_new_tokens
        self.num_beams = num_beams
        self._keeps_rows_apart = False  # known after the first packed batch

    def forward(self, **batch: Any) -> Any:
        """The model's own output for a batch of its own arguments, or for packed rows (``position_ids``, no mask)."""
        if not is_packed(batch):
            return super().forward(**batch)
        model = self._require_model()
        if not self._keeps_rows_apart:
            self._keeps_rows_apart = True
            require_rows_apart(self, model, batch)
        return super().forward(**as_model_inputs(batch, model))

    def make_metrics(self) -> Metrics:
        """Loss, perplexity and accuracy by token, and the share of right answers."""
        return {**super().make_metrics(), "accuracy": Mean()}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:
        """Update metrics by the labels of a batch, or by its ``answers``."""
        if "answers" in batch:
            right = self.answer(batch, name, data)
            metrics["accuracy"].update(right.sum(), len(right))
        else:
            super().measure(batch, metrics, data, name)

    def answer(self, batch: dict[str, Any], name: str = "", data: Any = None) -> Tensor:
        """Continue the prompts of a batch, greedily or by beams but without sampling, and compare the answers.

        Args:
            batch: ``input_ids`` and ``attention_mask`` padded on the left, and ``answers``, a text for each row.
            name: Name of the set that the rows are from.
            data: Decodes and judges texts by ``decode(tokens)`` and ``is_right(text, answer, name)``; None: the data
                module of the Trainer.

        Returns:
            1 for each row that was answered right, else 0.
        """
        data = data or self.trainer.datamodule  # type: ignore[attr-defined]
        prompts = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
        options = {"num_beams": self.num_beams, **WITHOUT_SAMPLING}
        new = continuation(self._require_model(), prompts, self.max_new_tokens, **options)
        texts = data.decode(new)
        right = [data.is_right(text, answer, name) for text, answer in zip(texts, batch["answers"], strict=True)]
        return torch.tensor(right, dtype=torch.float32, device=new.device)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:  # noqa: ARG002
        """Continue each prompt of a batch that is padded on the left.

        Decoding is the model's own ``generation_config``, greedy unless that says otherwise.

        Returns:
            The new ``tokens``, and if the data module can decode, each ``prompt`` as the model read it, without special
            tokens, and its continuation as ``text``.
        """
        prompts = {k: v for k, v in batch.items() if k != "labels"}
        return self._predicted(batch, continuation(self._require_model(), prompts, self.max_new_tokens))

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        logits, labels = super()._scored(batch)
        return logits[:, :-1], labels[:, 1:]  # each token is predicted at the position before it

    def _results(self, stage: str) -> dict[str, Tensor]:
        found = super()._results(stage)
        each = [metrics["accuracy"].compute() for metrics in self._metrics if metrics["accuracy"].update_called]
        # Every set counts the same, whatever its number of rows.
        return {**found, f"{stage}_accuracy": torch.stack(each).mean()} if each else found


def continuation(model: Any, inputs: Mapping[str, Tensor], max_new_tokens: int, **options: Any) -> Tensor:
    """Let a model write on.

    Args:
        model: A causal language model, or an encoder-decoder.
        inputs: Prompts, padded on the left, or the sources of an encoder-decoder.
        max_new_tokens: Longest text that is written, in tokens.
        options: Further arguments of ``generate``, in place of those in the model's ``generation_config``, which is
            greedy unless it says otherwise.

    Returns:
        The new tokens alone, of shape ``(rows, longest new text)``.
    """
    tokens: Tensor = model.generate(**inputs, max_new_tokens=max_new_tokens, **options)
    # An encoder-decoder writes after the token that starts every decoder.
    return tokens[:, 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1] :]


class _Perplexity(Mean):
    """e to the mean loss, which stays finite."""

    def compute(self) -> Tensor:
        return super().compute().exp().clamp(max=torch.finfo(torch.float32).max)
