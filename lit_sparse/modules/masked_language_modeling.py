"""Masked language modelling: predict the hidden tokens of a text."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForMaskedLM

from lit_sparse.errors import UsageError
from lit_sparse.modules.language_modeling import LanguageModel


class MaskedLM(LanguageModel):
    """Fine-tune an encoder to predict the hidden tokens of its input, whose label is not -100.

    :class:`~lit_sparse.MaskedLMData` hides and labels them. Evaluation logs, over all hidden tokens of the set,
    ``val_loss`` (nats per token), ``val_perplexity`` = e to that loss, and ``val_token_accuracy``, the share of
    hidden tokens that are found. ``predict`` fills the mask tokens that the texts themselves hold. Arguments and
    errors are those of :class:`~lit_sparse.SparseModule`.
    """

    auto_class = AutoModelForMaskedLM

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Replace each mask token, independently of the others, by the most likely token.

        Returns:
            ``tokens``, the predicted ids of each row in the order of its masks, and ``text``, the completed texts.
        """
        data = self._data
        if not hasattr(data, "mask_token_id"):
            raise UsageError(
                "MaskedLM predicts with a data module that has mask_token_id and decode(tokens), as MaskedLMData has: "
                "they tell which tokens to fill in."
            )
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        masked = inputs["input_ids"] == data.mask_token_id
        found = self(**inputs).logits.argmax(-1)
        filled = inputs["input_ids"].where(~masked, found)
        tokens = [row[places].tolist() for row, places in zip(found.cpu(), masked.cpu(), strict=True)]
        return {"tokens": tokens, "text": data.decode(filled)}
