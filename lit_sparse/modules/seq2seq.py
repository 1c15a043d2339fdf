"""Sequence to sequence: write a text for a text, with an encoder-decoder such as T5 or BART."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics.functional.text import rouge_score
from transformers import AutoModelForSeq2SeqLM

from lit_sparse.callbacks.measuring import Mean, Metrics
from lit_sparse.data.padding import IGNORED
from lit_sparse.errors import UsageError, require_range
from lit_sparse.methods.method import Method
from lit_sparse.modules.language_modeling import LanguageModel, continuation

_ROUGE = ("rouge1", "rouge2", "rougeL")


class Seq2SeqLM(LanguageModel):
    """Fine-tune an encoder-decoder on the targets that :class:`~lit_sparse.Seq2SeqData` gives as labels.

    Evaluation logs, over all tokens of the targets, ``val_loss`` (nats per token), ``val_perplexity`` = e to that
    loss, and ``val_token_accuracy``, the share of tokens predicted exactly from the source and the target before
    them. ``validate`` and ``test`` also generate, and compare the texts with the whole targets: in [0, 1] and as
    means over the rows ``val_exact_match``, the share that is the same but for white space at the ends, and
    ``val_rouge1``, ``val_rouge2`` and ``val_rougeL`` (F-measures, without stemming).

    Args:
        max_new_tokens: Longest text that is generated, in tokens.
        generate_in_fit: Generate in the validations of a fit too, for early stopping or the choice of a checkpoint
            by ROUGE or exact match. Off by default: generation takes a pass of the decoder for each token, the loss
            one for all tokens.
        options: Further arguments of :class:`~lit_sparse.SparseModule`.

    Raises:
        UsageError: If an argument is outside its range, or the backbone cannot be loaded or has no decoder that
            reads an encoder.
    """

    auto_class = AutoModelForSeq2SeqLM

    def __init__(
        self,
        backbone: str | nn.Module,
        method: Method,
        *,
        max_new_tokens: int = 128,
        generate_in_fit: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(backbone, method, **options)
        require_range("max_new_tokens", max_new_tokens, at_least=1)
        self.max_new_tokens = max_new_tokens
        self.generate_in_fit = generate_in_fit

    def _check_model(self) -> None:
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            raise UsageError(
                f"Seq2SeqLM needs an encoder-decoder such as T5 or BART, but {type(self.model).__name__} is none: use "
                "CausalLM with InstructionData for a decoder."
            )

    def make_metrics(self) -> Metrics:
        """Loss, perplexity and accuracy by token, and the means over the generated texts."""
        # Means, not torchmetrics' ROUGEScore: that keeps nine numbers for each row, and would gather them from the
        # processes one by one, which never ends where these have different numbers of rows.
        return {**super().make_metrics(), **{name: Mean() for name in ("exact_match", *_ROUGE)}}

    def measure(self, batch: dict[str, Any], metrics: Metrics, data: Any = None, name: str = "") -> None:
        """Update metrics by the targets of a batch, and by generated texts."""
        super().measure(batch, metrics, data, name)
        if self.generate_in_fit or (self._trainer is not None and self._trainer.state.fn != TrainerFn.FITTING):
            self._compare_texts(batch, metrics, data)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Write a text for each source.

        Decoding is the model's own ``generation_config``, greedy unless that says otherwise.

        Returns:
            The new ``tokens``, and if the data module can decode, each source as the model read it, without special
            tokens, as ``prompt``, and the ``text`` written for it.
        """
        return self._predicted(batch, self._written(batch))

    def _written(self, batch: dict[str, Tensor]) -> Tensor:
        sources = {k: v for k, v in batch.items() if k not in ("labels", "targets")}
        return continuation(self._require_model(), sources, self.max_new_tokens)

    def _scored(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        # With labels: the model itself makes its decoder's input of them.
        return self(**{k: v for k, v in batch.items() if k != "targets"}).logits, batch["labels"]

    def _compare_texts(self, batch: dict[str, Tensor], metrics: Metrics, data: Any) -> None:
        if not hasattr(data, "decode"):
            raise UsageError(
                "Seq2SeqLM measures generated texts with a data module that has decode(tokens) -> list of str, as "
                "Seq2SeqData has: add that method."
            )
        targets = batch.get("targets", batch["labels"])  # the whole targets, where labels may be cut
        pad: int = self.model.config.pad_token_id  # type: ignore[union-attr, assignment]
        found = data.decode(self._written(batch))
        wanted = data.decode(targets.masked_fill(targets == IGNORED, pad))
        same = [a.strip() == b.strip() for a, b in zip(found, wanted, strict=True)]
        rouge = rouge_score(found, wanted, rouge_keys=_ROUGE)
        metrics["exact_match"].update(sum(same), len(same))
        for name in _ROUGE:
            metrics[name].update(rouge[f"{name}_fmeasure"] * len(same), len(same))
