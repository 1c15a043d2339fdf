"""Train only the rows of some tokens in frozen embeddings and output layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_sparse.adapters.base import Adapter, KeepsPrecision
from lit_sparse.adapters.naming import clean_name
from lit_sparse.adapters.quantized import is_quantized
from lit_sparse.adapters.replacing import replace_modules
from lit_sparse.adapters.weight_reads import reads_weight
from lit_sparse.errors import UsageError


class TokenRows(KeepsPrecision):
    """Replaces an embedding or an output layer, and has trained rows for some tokens.

    The frozen matrix does not change and gets no gradient. Tied input and output layers share the trained rows.

    Args:
        base: The frozen layer, with a row for each token.
        ids: Ids of the trained tokens, in ascending order.
        rows: Their rows, of shape ``(tokens, width)``, float32 or better.
        bias: Their entries of the bias, of shape ``(tokens,)``; None for a layer without bias.
        texts: The tokens as text in the order of ``ids``; empty if they are not known.
    """

    rows: nn.Parameter
    bias_rows: nn.Parameter | None
    ids: Tensor

    def __init__(
        self,
        base: nn.Embedding | nn.Linear,
        ids: Tensor,
        rows: nn.Parameter,
        bias: nn.Parameter | None,
        texts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.rows = rows
        self.register_parameter("bias_rows", bias)
        self.register_buffer("ids", ids, persistent=False)
        self.texts = tuple(texts)
        self.enabled = True
        """False: the output is that of the frozen layer, in which new tokens have the rows that they started from."""
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        """The frozen weight. Backbones read its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map token ids ``(...)`` to ``(..., width)``, or hidden states ``(..., width)`` to scores of all tokens."""
        y: Tensor = self.base(x)
        if not self.enabled:
            return y
        if isinstance(self.base, nn.Embedding):
            places = torch.searchsorted(self.ids, x.contiguous()).clamp(max=len(self.ids) - 1)
            found = F.embedding(places, self.rows).to(y.dtype)
            base: Any = self.base
            scale = getattr(base, "embed_scale", 1.0)
            found = found * (scale.to(y.dtype) if torch.is_tensor(scale) else scale)
            return torch.where((self.ids[places] == x).unsqueeze(-1), found, y)
        bias = None if self.bias_rows is None else self.bias_rows.to(x.dtype)
        # In place: copying the scores of a large vocabulary would cost more than the rest of the layer.
        return y.index_copy_(-1, self.ids, F.linear(x, self.rows.to(x.dtype), bias).to(y.dtype))

    @torch.no_grad()
    def fold(self) -> None:
        """Write the rows into the frozen weight."""
        base: Any = self.base
        base.weight[self.ids] = self.rows.to(base.weight.dtype)
        if self.bias_rows is not None:
            base.bias[self.ids] = self.bias_rows.to(base.bias.dtype)

    def __getattr__(self, name: str) -> Any:
        # Backbones read attributes of the layer: num_embeddings, padding_idx, bias.
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)


def token_rows_in(model: nn.Module) -> Iterator[tuple[str, TokenRows]]:
    """Iterate over ``(name, layer)`` of every layer of ``model`` with trained rows for some tokens."""
    for name, module in model.named_modules():
        if isinstance(module, TokenRows):
            yield clean_name(name), module


def add_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[int]:
    """Give a model with adapters new tokens, and train the rows of these tokens.

    The tokens are added to the tokenizer, and the embeddings grow if they have no rows for them. A new row starts as
    the mean of the others, so that the token is neither likely nor impossible at first. A token that the tokenizer
    already knew starts from its own row. Both input embedding and output layer are trained; tied layers share the rows.

    Args:
        model: Hugging Face model, or a module that holds one, after :func:`~lit_sparse.inject`.
        tokenizer: Tokenizer of the data. It is changed.
        tokens: Texts of the tokens.

    Returns:
        The ids of the tokens.

    Raises:
        UsageError: If there are no tokens or duplicates, ``model`` reads no tokens, has no adapters or already has such
            rows, or its embeddings are adapted, fully trained, quantized, or read without being called.
            ``tokenizer`` is not changed then.
    """
    if not tokens or len(set(tokens)) < len(tokens) or not all(isinstance(t, str) and t.strip() for t in tokens):
        raise UsageError(f"new_tokens are texts of tokens, each once; got {list(tokens)}.")
    if not any(isinstance(module, Adapter) for module in model.modules()):
        raise UsageError(f"{type(model).__name__} holds no adapters: inject a method first, then add tokens.")
    known = set(tokenizer.get_vocab())
    trial = copy.deepcopy(tokenizer)  # nothing takes added tokens out again
    trial.add_tokens(list(tokens))
    ids: list[int] = [trial.convert_tokens_to_ids(token) for token in tokens]  # type: ignore[misc]
    texts = dict(sorted(zip(ids, tokens, strict=True)))
    if len(texts) < len(tokens):
        raise UsageError(f"The tokenizer takes several of new_tokens {list(tokens)} for one token.")
    before = embedding_count(model)
    layers = train_rows(model, list(texts), list(texts.values()))
    tokenizer.add_tokens(list(tokens))
    fresh = [i for i, (number, text) in enumerate(texts.items()) if text not in known and number < before]
    with torch.no_grad():
        for layer in layers:
            base: Any = layer.base
            layer.rows[fresh] = _mean(base.weight).to(layer.rows.dtype)
            if layer.bias_rows is not None:
                layer.bias_rows[fresh] = _mean(base.bias).to(layer.bias_rows.dtype)
    return ids


def train_rows(
    model: nn.Module, ids: Sequence[int], texts: Sequence[str] = (), only: str | None = None
) -> list[TokenRows]:
    """Train rows of the embeddings, starting from their current values. The embeddings grow if they lack rows.

    Args:
        model: Model with adapters.
        ids: Ids of the tokens, in ascending order.
        texts: The tokens as text, in that order.
        only: Name of an embedding or output layer: train only its rows and those of layers that share its weight.

    Returns:
        The modules that replace the layers.

    Raises:
        UsageError: As :func:`add_tokens`.
    """
    for name, layer in _layers(model, only).items():
        reason = _refusal(model, name, layer)
        if reason is not None:
            raise UsageError(f"New tokens are rows of {name!r} of {type(model).__name__}, which {reason}.")
    grow(text_model(model), max(ids) + 1)
    layers = _layers(model, only)
    shared: dict[int, nn.Parameter] = {}
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        numbers = torch.tensor(list(ids), device=layer.weight.device)
        rows = shared.setdefault(id(layer.weight), _rows(layer.weight, numbers))
        bias = getattr(layer, "bias", None)
        replacements[layer] = TokenRows(layer, numbers, rows, None if bias is None else _rows(bias, numbers), texts)
    replace_modules(model, replacements)
    return [layer for layer in replacements.values() if isinstance(layer, TokenRows)]


def vocabulary_layers(model: nn.Module) -> dict[str, Any]:
    """The input embedding and the output layer of a text model, and layers that share a weight with them, by name."""
    host = text_model(model)
    ends = [layer for layer in (host.get_input_embeddings(), host.get_output_embeddings()) if layer is not None]
    weights = [layer.weight for layer in ends]
    inside = {id(module.base) for module in model.modules() if isinstance(getattr(module, "base", None), nn.Module)}
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) not in inside and any(getattr(module, "weight", None) is weight for weight in weights)
    }


def embedding_count(model: nn.Module) -> int:
    """Rows of the input embedding."""
    embedding: Any = text_model(model).get_input_embeddings()
    return int(embedding.weight.shape[0])


def text_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face text model that ``model`` is or holds.

    Raises:
        UsageError: If there is none, or several.
    """
    outermost: list[PreTrainedModel] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module not in inside:
            inside.update(module.modules())
            outermost.append(module)
    if len(outermost) != 1 or outermost[0].main_input_name != "input_ids":
        read = [module.main_input_name for module in outermost]
        raise UsageError(
            f"{type(model).__name__} is no model of text (its Hugging Face models read {read}): it has no tokens to "
            "add to."
        )
    return outermost[0]


@torch.no_grad()
def grow(host: PreTrainedModel, size: int) -> None:
    """Give embeddings at least ``size`` rows. New rows are the mean of the others, so that they are deterministic."""
    before = embedding_count(host)
    if size <= before:
        return
    host.resize_token_embeddings(size, mean_resizing=False)
    done: set[int] = set()
    for layer in vocabulary_layers(host).values():
        for tensor in (layer.weight, getattr(layer, "bias", None)):
            if tensor is not None and id(tensor) not in done:
                done.add(id(tensor))
                tensor[before:] = _mean(tensor[:before]).to(tensor.dtype)


def token_record(model: nn.Module) -> dict[str, Mapping[str, Any]]:
    """Record the trained rows of a model: one layer name for each weight → ids and texts of its tokens."""
    found = {id(layer.rows): (name, layer) for name, layer in reversed(list(token_rows_in(model)))}
    return {name: {"ids": layer.ids.tolist(), "texts": list(layer.texts)} for name, layer in found.values()}


def same_tokens(ids: list[int], texts: Sequence[str], other_ids: list[int], other_texts: Sequence[str]) -> bool:
    """Whether two lists of tokens have the same ids, and the same texts where both are known."""
    return ids == other_ids and all(
        text == other for text, other in zip(texts, other_texts, strict=False) if text and other
    )


def _layers(model: nn.Module, only: str | None) -> dict[str, Any]:
    layers = vocabulary_layers(model)
    if only is not None and only not in layers:
        raise UsageError(f"{only!r} is no embedding or output layer of {type(model).__name__}: {list(layers)}.")
    return {name: layer for name, layer in layers.items() if only is None or layer.weight is layers[only].weight}


def _refusal(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    if isinstance(layer, TokenRows):
        return "trains rows of tokens already"
    if isinstance(layer, Adapter):
        return "target_modules adapts: leave it out there"
    if not isinstance(layer, nn.Embedding | nn.Linear) or is_quantized(layer):
        return f"is quantized or of a kind without rows ({type(layer).__name__})"
    if any(p.requires_grad for p in layer.parameters()):
        return "is trained whole: leave it out of train_head"
    reader = reads_weight(model, name)
    if reader is not None:
        return f"is not called: {reader} reads its weight directly"
    scaled = isinstance(layer, nn.Embedding) and hasattr(layer, "embed_scale")
    plain = nn.Embedding.forward if isinstance(layer, nn.Embedding) else nn.Linear.forward
    if (type(layer).forward is not plain and not scaled) or getattr(layer, "max_norm", None) is not None:
        return f"computes something else than an embedding or a linear layer ({type(layer).__name__})"
    return None


def _rows(weight: Tensor, ids: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach()[ids].to(torch.promote_types(weight.dtype, torch.float32)))


def _mean(rows: Tensor) -> Tensor:
    return rows.detach().to(torch.promote_types(rows.dtype, torch.float32)).mean(0)
