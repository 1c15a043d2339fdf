import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.strategies.blocks import transformer_blocks

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}


def empty(kind: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (empty(LlamaForCausalLM, LlamaConfig(**SMALL)), ["LlamaDecoderLayer"] * 3),
        (empty(MixtralForCausalLM, MixtralConfig(**SMALL, num_key_value_heads=2)), ["MixtralDecoderLayer"] * 3),
        (empty(BertForSequenceClassification, BertConfig(**SMALL)), ["BertLayer"] * 3),
        (empty(ViTForImageClassification, ViTConfig(**SMALL)), ["ViTLayer"] * 3),
        (
            empty(T5ForConditionalGeneration, T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)),
            ["T5Block"] * 6,
        ),
        (empty(AlbertModel, AlbertConfig(**SMALL, embedding_size=16)), ["AlbertLayerGroup"]),  # one, used three times
    ],
    ids=["llama", "mixtral", "bert", "vit", "t5", "albert"],
)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_blocks_are_what_transformers_repeat(model: PreTrainedModel, expected: list[str], adapted: bool) -> None:
    if adapted and not any(ls.adapters_in(model)):
        with torch.device("meta"):
            ls.inject(model, ls.LoRA(rank=2, target_modules="all-linear"))
    blocks = transformer_blocks(nn.Sequential(model))
    assert [type(block).__name__ for block in blocks] == expected
    inner = {id(part) for block in blocks for part in block.modules() if part is not block}
    assert not inner & {id(block) for block in blocks}


def test_blocks_can_be_named() -> None:
    model = empty(T5ForConditionalGeneration, T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4))
    blocks = transformer_blocks(model, ["T5LayerSelfAttention", "T5LayerFF"])
    assert [type(block).__name__ for block in blocks].count("T5LayerSelfAttention") == 4
    assert len(transformer_blocks(model, ["T5Block", "T5LayerFF"])) == 4  # those within the blocks are not of their own
    with pytest.raises(
        ls.UsageError, match=r"auto_wrap: T5\w* has no classes \['BertLayer'\].*blocks are \['T5Block'\]"
    ):
        transformer_blocks(model, ["BertLayer"])
    with pytest.raises(ls.UsageError, match=r"auto_wrap: \w+ has no classes \[\]"):
        transformer_blocks(model, [])


def test_a_model_without_blocks_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2)]))
    with pytest.raises(ls.UsageError, match=r"has no module list of blocks.*classes of its blocks in auto_wrap"):
        transformer_blocks(plain)
