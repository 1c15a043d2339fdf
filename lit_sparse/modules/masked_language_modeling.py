"""Masked language modelling: say which tokens were hidden."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AutoModelForMaskedLM

from lit_sparse.errors import UsageError
from lit_sparse.modules.language_modeling import LanguageModel


class MaskedLM(LanguageModel):
    """Fine-tune an encoder to find the tokens whose label is not -100, which are hidden in its input.

    :class:`~lit_sparse.MaskedLMData` hides and labels them. Evaluation logs, over all hidden tokens of the set,
    ``val_loss`` (nats per token), ``val_perplexity`` = e to that loss, and ``val_token_accuracy``, the share of
    hidden tokens that are found. ``predict`` fills the mask tokens that the texts themselves hold. Arguments and
    errors are those of :class:`~lit_sparse.SparseModule`.
    """

    auto_class = AutoModelForMaskedLM

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:  # noqa: ARG002
        """Put the likeliest token in the place of each mask token, every one on its own.

        Returns:
            ``tokens``: for each row the ids found, in the order of its masks; ``text``: the whole texts, filled.
        """
        data = getattr(self.trainer, "datamodule", None)
        if data is None or not hasattr(data, "mask_token_id"):
            raise UsageError(
                "MaskedLM predicts with a data module that has mask_token_id and decode(tokens), as MaskedLMData has: "
                "without them it is not known which tokens are to be filled in."
            )
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        masked = inputs["input_ids"] == data.mask_token_id
        found = self(**inputs).logits.argmax(-1)
        filled = inputs["input_ids"].where(~masked, found)
        tokens = [row[places].tolist() for row, places in zip(found, masked, strict=True)]
        return {"tokens": tokens, "text": data.decode(filled)}
