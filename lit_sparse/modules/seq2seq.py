"""Sequence to sequence: write a text for a text, with an encoder-decoder such as T5 or BART."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForSeq2SeqLM

from lit_sparse.errors import UsageError
from lit_sparse.methods.base import SparseMethod
from lit_sparse.modules.language_modeling import IGNORED, LanguageModel
from lit_sparse.modules.optimization import LrSchedule

_ROUGE = ("rouge1", "rouge2", "rougeL")


class Seq2SeqLM(LanguageModel):
    """Fine-tune an encoder-decoder on the targets that :class:`~lit_sparse.Seq2SeqData` gives as labels.

    Evaluation logs, over all tokens of the targets, ``val_loss`` (nats per token), ``val_perplexity`` = e to that
    loss, and ``val_token_accuracy``, the share of tokens predicted exactly from the source and the target before
    them. ``validate`` and ``test`` also generate, and compare the texts with the whole targets: in [0, 1] and as
    means over the rows ``val_exact_match``, the share that is the same but for white space at the ends, and
    ``val_rouge1``, ``val_rouge2`` and ``val_rougeL`` (F-measures, without stemming).

    Args:
        backbone: Hub id or folder of the pretrained model, or a model that is already built.
        method: How to adapt it.
        max_new_tokens: Longest text that is generated, in tokens.
        generate_in_fit: Generate in the validations of a fit too, for early stopping or the choice of a checkpoint
            by ROUGE or exact match. Off, because a generated text costs a pass of the decoder for each token, where
            the loss costs one for all.
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
        UsageError: If an argument is outside its range, or the backbone cannot be loaded or has no decoder that
            reads an encoder.
    """

    auto_class = AutoModelForSeq2SeqLM

    def __init__(
        self,
        backbone: str | nn.Module,
        method: SparseMethod,
        max_new_tokens: int = 128,
        generate_in_fit: bool = False,
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
        self.max_new_tokens = max_new_tokens
        self.generate_in_fit = generate_in_fit

    def configure_model(self) -> None:
        """Load, inject, and make the metrics."""
        if self.model is not None:
            return
        super().configure_model()
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise UsageError(
                f"Seq2SeqLM needs an encoder-decoder such as T5 or BART, but {type(self.model).__name__} is none: use "
                "CausalLM with InstructionData for a decoder."
            )
        # Means, not torchmetrics' ROUGEScore: that keeps nine numbers for each row, and would gather them from the
        # processes one by one, which never ends where these have different numbers of rows.
        self._text_metrics = nn.ModuleDict({name: MeanMetric() for name in ("exact_match", *_ROUGE)})

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Write a text for each source: ``tokens``, and ``text`` if the data can decode.

        Decoding is the model's own ``generation_config``, greedy unless that says otherwise.
        """
        tokens = self._written(batch)
        return {"tokens": tokens, **self._texts(tokens)}

    def _written(self, batch: dict[str, Tensor]) -> Tensor:
        sources = {k: v for k, v in batch.items() if k not in ("labels", "targets")}
        return self._generate(sources, self.max_new_tokens)[:, 1:]  # without the token that starts every decoder

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # With labels: the model itself makes its decoder's input of them.
        return self(**{k: v for k, v in batch.items() if k != "targets"}).logits, batch["labels"]

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        super()._evaluate(batch)
        if self._generates():
            self._compare_texts(batch)

    def _generates(self) -> bool:
        return self.generate_in_fit or self.trainer.state.fn != TrainerFn.FITTING

    def _compare_texts(self, batch: dict[str, Tensor]) -> None:
        targets = batch.get("targets", batch["labels"])  # the whole ones, where labels may be cut
        pad: int = self.model.config.pad_token_id  # type: ignore[union-attr, assignment]
        found = self._texts(self._written(batch)).get("text")
        if found is None:
            raise UsageError(
                "Seq2SeqLM measures generated texts with a data module that has decode(tokens) -> list of str, as "
                "Seq2SeqData has: add that method."
            )
        wanted = self._texts(targets.masked_fill(targets == IGNORED, pad))["text"]
        same = [a.strip() == b.strip() for a, b in zip(found, wanted, strict=True)]
        rouge = rouge_score(found, wanted, rouge_keys=_ROUGE)
        figures = {"exact_match": sum(same) / len(same), **{name: rouge[f"{name}_fmeasure"] for name in _ROUGE}}
        for name, value in figures.items():
            self._text_metrics[name].update(value, len(same))  # type: ignore[operator]

    def _figures(self) -> dict[str, Tensor]:
        figures = super()._figures()
        if self._generates():
            figures |= {name: metric.compute() for name, metric in self._text_metrics.items()}  # type: ignore[operator]
        return figures

    def _reset_metrics(self) -> None:
        super()._reset_metrics()
        for metric in self._text_metrics.values():
            metric.reset()  # type: ignore[operator]
