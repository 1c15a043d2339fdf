"""Rows of new tokens: out of a model into a folder, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.token_rows import (
    TokenRows,
    embedding_count,
    grow,
    same_tokens,
    text_model,
    token_rows_in,
    train_rows,
    vocabulary_layers,
)
from lit_sparse.errors import UsageError


@dataclass(frozen=True, eq=False)
class StoredRows:
    """Stored rows of one matrix.

    Args:
        ids: Ids of the tokens, ascending.
        texts: Texts of the tokens in that order; empty if they are unknown.
        rows: Shape ``(tokens, width)``.
        bias: Shape ``(tokens,)``; None where no layer with this matrix has a bias.
    """

    ids: list[int]
    texts: list[str]
    rows: Tensor
    bias: Tensor | None


@torch.no_grad()
def rows_of(model: nn.Module, by_hand: bool = True) -> dict[str, StoredRows]:
    """The rows that the pretrained model lacks: trained rows, and rows added by hand.

    Rows added by hand (``resize_token_embeddings``) are those beyond the vocabulary in the configuration that the model
    was loaded with. They are frozen, but no copy of the pretrained model has them.

    Args:
        model: With adapters.
        by_hand: Whether to include rows added by hand.

    Returns:
        Layer name to rows; of layers that share a weight, only the first.

    Raises:
        UsageError: If rows were removed by hand, or added to embeddings that are adapted.
    """
    try:
        host = text_model(model)
    except UsageError:
        return {}
    groups: dict[int, list[tuple[str, Any]]] = {}
    first = host.get_input_embeddings()  # by whose name PEFT finds what is tied to it
    for name, layer in sorted(vocabulary_layers(model).items(), key=lambda item: item[1] is not first):
        groups.setdefault(id(layer.weight), []).append((name, layer))
    added = _added_by_hand(model, host) if by_hand else set()
    found = {group[0][0]: _rows_of(model, group, added) for group in groups.values()}
    return {name: stored for name, stored in found.items() if stored.ids}


@torch.no_grad()
def put_rows(model: nn.Module, stored: Mapping[str, StoredRows]) -> None:
    """Load stored rows as trainable rows; the embeddings grow to hold them.

    Args:
        model: Without trainable rows, or with rows of the same tokens.
        stored: Layer name to rows.

    Raises:
        UsageError: If the model has no such layer, the layer has another width, or other rows are trained.
    """
    for name, new in stored.items():
        layers = [layer for own, layer in token_rows_in(model) if own == name]
        if layers and not same_tokens(layers[0].ids.tolist(), layers[0].texts, new.ids, new.texts):
            raise UsageError(
                f"{name!r} trains rows of other tokens than the stored ones: set new_tokens to {new.texts or 'those'}."
            )
        rows = layers[0].rows if layers else train_rows(model, new.ids, new.texts, only=name)[0].rows
        if rows.shape != new.rows.shape:
            raise UsageError(
                f"Stored rows of {name!r} have shape {tuple(new.rows.shape)}, the model's {tuple(rows.shape)}: they "
                "were trained on another model."
            )
        rows.copy_(new.rows)
        for _, layer in token_rows_in(model):
            if layer.rows is rows and layer.bias_rows is not None and new.bias is not None:
                layer.bias_rows.copy_(new.bias)


@torch.no_grad()
def write_rows(model: nn.Module, stored: Mapping[str, StoredRows]) -> None:
    """Write stored rows into the weights of a plain model; the embeddings grow to hold them.

    Raises:
        UsageError: If the model has no such layer, or the layer has another width.
    """
    for name, new in stored.items():
        grow(text_model(model), max(new.ids) + 1)
        layers = vocabulary_layers(model)
        if name not in layers or layers[name].weight.shape[1:] != new.rows.shape[1:]:
            raise UsageError(f"{type(model).__name__} has no {name!r} for rows of {new.rows.shape[1]} numbers.")
        weight = layers[name].weight
        weight[new.ids] = new.rows.to(weight)
        for layer in layers.values():
            biased = layer.weight is weight and getattr(layer, "bias", None) is not None
            if biased and new.bias is not None:
                layer.bias[new.ids] = new.bias.to(layer.bias)


@torch.no_grad()
def forget_rows(model: nn.Module, stored: Mapping[str, StoredRows]) -> None:
    """Remove stored rows from a plain model, so that it is as large as the pretrained one."""
    if not stored:
        return
    layers = vocabulary_layers(model)
    whole = len({id(layer.weight) for layer in layers.values()}) == len(stored)
    covered = set.intersection(*(set(rows.ids) for rows in stored.values())) if whole else set()
    size = embedding_count(model)
    first = next(i for i in range(size, 0, -1) if i - 1 not in covered)
    for name, rows in stored.items():
        layers[name].weight[rows.ids] = 0
    if first < size:
        text_model(model).resize_token_embeddings(first, mean_resizing=False)


def texts_of(stored: Mapping[str, StoredRows]) -> dict[int, str | None]:
    """Id to text of every token with a stored row; None where the text is not known."""
    found: dict[int, str | None] = {}
    for rows in stored.values():
        found |= {number: rows.texts[i] if rows.texts else None for i, number in enumerate(rows.ids)}
    return dict(sorted(found.items()))


def whole_sentence(head: int, tokens: Collection[int], trained: Collection[int]) -> str:
    """A sentence on what is stored beside the adapters.

    Args:
        head: Number of parameters trained whole.
        tokens: Ids of the tokens with a stored row.
        trained: Ids of the tokens whose rows were trained.
    """
    parts = [f"{head:,} parameters trained whole"]
    counts = {"": len(set(tokens) & set(trained)), " stored as they are": len(set(tokens) - set(trained))}
    parts += [f"rows of {count:,} token{'s' * (count > 1)}{end}" for end, count in counts.items() if count]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def token_notes(form: str, texts: Mapping[int, str | None]) -> list[str]:
    """Notes on stored rows of tokens, for card and terminal.

    Args:
        form: Format of the export.
        texts: Id to text of the tokens with a stored row.
    """
    notes = []
    known = [repr(text) for text in texts.values() if text]
    if known:
        listed = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
        notes.append(f"The rows of these tokens were trained: {listed}. The tokenizer must know them.")
    if len(known) < len(texts):
        notes.append(
            f"The embeddings were resized by hand: {len(texts) - len(known)} rows, the last of the token {max(texts)}, "
            "are stored as they are. The tokenizer of the pretrained model does not know tokens that were added."
        )
    if texts and form == "peft":
        notes.append(
            "vLLM, llama.cpp and TGI cannot read rows of tokens from a LoRA: serve the format merged there. PEFT needs "
            "the embeddings resized before it loads the folder, as above. Without that, transformers' load_adapter "
            "ends with an IndexError at the first new token: use PEFT's AutoPeftModel, or resize first."
        )
    return notes


def _rows_of(model: nn.Module, group: list[tuple[str, Any]], added: set[int]) -> StoredRows:
    own = next((layer for _, layer in group if isinstance(layer, TokenRows)), None)
    texts = dict(zip(own.ids.tolist(), own.texts or [""] * len(own.ids), strict=True)) if own is not None else {}
    missing = sorted(added - set(texts))
    if missing and any(isinstance(layer, Adapter) for _, layer in group):
        raise UsageError(
            f"The vocabulary of {type(model).__name__} was resized by hand, and {group[0][0]!r} is adapted: adapters "
            "of a larger matrix fit no copy of the pretrained model. Use export_merged (format merged)."
        )
    if missing and any(p.requires_grad for _, layer in group for p in [layer.weight]):
        missing = []  # trained whole, and so stored whole
    ids = sorted({*texts, *missing})
    first = group[0][1]
    weight = first.weight.detach()[ids].to(torch.promote_types(first.weight.dtype, torch.float32))
    biased: Any = next((layer for _, layer in group if getattr(layer, "bias", None) is not None), None)
    bias = None if biased is None else biased.bias.detach()[ids].to(weight.dtype)
    if own is not None:
        places = [ids.index(i) for i in own.ids.tolist()]
        weight[places] = own.rows.detach()
        if bias is not None and biased.bias_rows is not None:
            bias[places] = biased.bias_rows.detach()
    known = any(texts.values())
    return StoredRows(
        ids, [texts.get(i, "") for i in ids] if known else [], weight.cpu(), None if bias is None else bias.cpu()
    )


def _added_by_hand(model: nn.Module, host: PreTrainedModel) -> set[int]:
    try:
        base = type(host.config).from_pretrained(host.name_or_path or "", local_files_only=True)
    except Exception:  # built in Python, moved, or not in the cache: nothing to compare with
        return set()
    before = getattr(base.get_text_config(), "vocab_size", None)
    now = getattr(host.config.get_text_config(), "vocab_size", None)
    if before is None or now is None or now == before:
        return set()
    if now < before:
        raise UsageError(
            f"The vocabulary of {type(model).__name__} was cut by hand, from {before} to {now}: adapters of it fit no "
            "copy of the pretrained model. Use export_merged (format merged)."
        )
    return set(range(before, embedding_count(model)))
