"""Inputs of adapted layers, and the positions that are no padding, as every kind of model passes them on."""

from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn

import lit_sparse as ls
from lit_sparse.adapters.inputs import real_positions, watch_inputs


def model_of(name: str) -> nn.Module:
    return next(architecture for architecture in ARCHITECTURES if architecture.name == name).build().eval()


def rows_of(model: nn.Module, *args: Any, watched: nn.Module | None = None, **kwargs: Any) -> dict[str, int]:
    """Layer name to the number of its inputs that are no padding, in a call."""
    found: dict[str, int] = {}
    adapters = dict(ls.adapters_in(model))
    with real_positions(model) as positions, watch_inputs(adapters, lambda n, x: found.update({n: len(positions(x))})):
        (watched or model)(*args, **kwargs)
    return found


def padded(rows: int, length: int, real: int) -> tuple[Tensor, Tensor]:
    mask = torch.zeros(rows, length, dtype=torch.long)
    mask[:, :real] = 1
    return torch.randint(5, 30, (rows, length)), mask


def test_tokens_of_encoders_and_decoders_have_masks_of_their_own() -> None:
    model = model_of("T5")
    ls.inject(model, ls.LoRA(rank=2))
    ids, mask = padded(2, 7, 5)
    labels = torch.tensor([[5, 6, 7, -100], [5, 6, -100, -100]])
    rows = rows_of(model, input_ids=ids, attention_mask=mask, labels=labels)
    for name, count in rows.items():
        of_text = "encoder" in name or any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v"))
        assert count == (10 if of_text else 5), name
    assert {10, 5} == set(rows.values())


@pytest.mark.parametrize("name", ["T5", "BART"])
def test_labels_are_for_the_decoder_where_lengths_agree(name: str) -> None:
    model = model_of(name)
    ls.inject(model, ls.LoRA(rank=2, train_head=False))
    ids, mask = padded(2, 6, 5)
    labels = torch.full((2, 6), -100)
    labels[:, :3] = 7
    decoder = model.get_decoder()
    crossing = {n for n, m in decoder.named_modules() if n.endswith(("EncDecAttention", "encoder_attn"))}
    counts = rows_of(model, input_ids=ids, attention_mask=mask, labels=labels)
    prefix = next(n for n, m in model.named_modules() if m is decoder) + "."
    reads_text = {f"{prefix}{n}.{last}" for n in crossing for last in ("k", "v", "k_proj", "v_proj")}
    for layer, count in counts.items():
        assert count == (6 if layer.startswith(prefix) and layer not in reads_text else 10), layer
    assert {6, 10} == set(counts.values())
    assert len(reads_text & counts.keys()) == 2 * len(crossing) > 0


def test_a_target_has_the_mask_of_the_decoder() -> None:
    model = model_of("T5")
    ls.inject(model, ls.LoRA(["EncDecAttention.q", "EncDecAttention.v"], rank=2, train_head=False))
    ids, mask = padded(2, 6, 5)
    targets, real = padded(2, 6, 2)
    rows = rows_of(model, ids, mask, decoder_input_ids=targets, decoder_attention_mask=real)
    assert {name.rpartition(".")[2]: count for name, count in rows.items()} == {"q": 4, "v": 10}


def test_labels_of_rows_leave_no_token_out() -> None:
    model = model_of("BERT")
    ls.inject(model, ls.LoRA(["query", "pooler.dense"], rank=2))
    ids, mask = padded(3, 6, 4)
    rows = rows_of(model, ids, mask, labels=torch.tensor([0, 1, 0]))  # the mask by its place
    assert set(rows.values()) == {12, 3}
    assert rows.pop("bert.pooler.dense") == 3
    assert set(rows_of(model, ids).values()) == {18, 3}
    assert set(rows_of(model, ids, mask, watched=model.bert).values()) == {12, 3}  # the body alone


def test_hooks_are_gone_after_an_error() -> None:
    model = model_of("BERT")
    ls.inject(model, ls.LoRA(["query"], rank=2))
    with pytest.raises(Exception, match=r"specify either input_ids or inputs_embeds|size"):
        rows_of(model, "no ids")
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
