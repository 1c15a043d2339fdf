"""Let a language model continue a prompt, greedily or by sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from lit_sparse.data.tokenizers import Prompt, prompt_tokens
from lit_sparse.errors import UsageError, require_range
from lit_sparse.modules.language_modeling import WITHOUT_SAMPLING, continuation
from lit_sparse.serving.language_models import LanguageModel


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen; what the model's ``generation_config`` says of sampling is not used.

    Args:
        max_new_tokens: Longest answer, in tokens.
        temperature: Divides the logits before sampling; 0 is greedy decoding.
        top_p: Share of the probability that tokens are sampled from, in (0, 1], the most likely first.

    Raises:
        UsageError: If an argument is outside its range, or ``top_p`` is set without a temperature.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        require_range("max_new_tokens", self.max_new_tokens, at_least=1)
        require_range("temperature", self.temperature, at_least=0)
        require_range("top_p", self.top_p, above=0, at_most=1)
        if self.top_p < 1 and not self.temperature:
            raise UsageError("top_p is for sampling, and temperature is 0, which is greedy: set a temperature.")

    def options(self) -> dict[str, Any]:
        """Arguments of ``generate``, but for the number of tokens."""
        if self.temperature:
            # top_k 0: transformers would otherwise sample from the 50 most likely tokens.
            sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
            return {"num_beams": 1, **sampling}
        return {"num_beams": 1, **WITHOUT_SAMPLING}


@torch.no_grad()
def answer(source: LanguageModel, prompt: Prompt, decoding: Decoding, streamer: TextStreamer | None = None) -> str:
    """Continue a prompt.

    Args:
        source: The model, whose adapters may be on or off.
        prompt: A text, or messages for its chat template.
        decoding: How to choose tokens.
        streamer: Is given the tokens as they come.

    Returns:
        The new text, without special tokens.

    Raises:
        UsageError: If the prompt does not suit the tokenizer, or does not fit into the model's context.
    """
    ids = prompt_tokens(source.tokenizer, prompt)
    limit = getattr(source.model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and len(ids) + decoding.max_new_tokens > limit:
        raise UsageError(
            f"The prompt has {len(ids):,} tokens, and with {decoding.max_new_tokens:,} new ones that is more than the "
            f"{limit:,} that the model can take. Shorten it, or lower max_new_tokens."
        )
    tokens = torch.tensor([ids], device=source.model.device)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    options = {"pad_token_id": source.tokenizer.pad_token_id, "streamer": streamer, **decoding.options()}
    made = continuation(source.model, inputs, decoding.max_new_tokens, **options)
    return str(source.tokenizer.decode(made[0], skip_special_tokens=True))
