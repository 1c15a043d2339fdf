"""Packed rows in a causal language model: several rows in one sequence, each of which attends to itself alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.modes import in_mode
from lit_sparse.errors import UsageError

_PROBED = 4  # tokens of each of the two rows


def is_packed(batch: dict[str, Any]) -> bool:
    """Whether the sequences of a batch hold several rows: their positions restart, and there is no mask."""
    return "position_ids" in batch and "attention_mask" not in batch


def as_model_inputs(batch: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """The arguments by which transformers keeps packed rows apart.

    transformers finds the rows by their positions, but not where there is a cache. Flash attention finds them in a
    batch of one sequence only, so all sequences become one; other kinds would make a mask of its length squared.
    """
    flash = "flash" in str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    tokens = {name: value.reshape(1, -1) if flash else value for name, value in batch.items()}
    return {**tokens, "use_cache": False}


@torch.no_grad()
def require_rows_apart(forward: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Refuse a model in which packed rows see each other, by three forward passes of eight tokens at most.

    Args:
        forward: Maps ``input_ids`` and ``position_ids`` to the model's output.
        model: The model, which is in evaluation mode meanwhile.
        batch: A packed batch, whose first tokens are taken.

    Raises:
        UsageError: If a row after another one has different logits than the row alone.
    """
    ids = batch["input_ids"].reshape(1, -1)[:, : 2 * _PROBED]
    ids = ids.repeat(1, -(-2 * _PROBED // ids.shape[1]))[:, : 2 * _PROBED]
    row, positions = ids[:, _PROBED:], torch.arange(2 * _PROBED, device=ids.device)[None]
    with in_mode(model, training=False):
        alone = forward(input_ids=row, position_ids=positions[:, :_PROBED]).logits
        packed = forward(input_ids=ids, position_ids=positions % _PROBED).logits[:, _PROBED:]
        joined = forward(input_ids=ids, position_ids=positions).logits[:, _PROBED:]
    error, effect = ((found - alone).abs().amax() for found in (packed, joined))
    # A tenth of what the row before does to it: more than rounding in any dtype, and much less than a row that is seen.
    if error > 0.1 * effect:
        raise UsageError(
            f"{type(model).__name__} does not keep packed rows apart: set packing to false. transformers packs models "
            "that find a row by its position_ids, such as Llama, Qwen, Gemma, Mistral, Phi and GPT-2."
        )
