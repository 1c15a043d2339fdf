"""lit_sparse.adapters.selection against name parts compared one by one, and every message it gives."""

import re

import pytest
import torch
from backbones import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    AlbertForSequenceClassification,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.selection import select_layers
from lit_sparse.errors import UsageError
from lit_sparse.methods.lora import LoRA

BERT = build_tiny(BertForSequenceClassification)  # only looked at
BLOCK = [
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
BODY = [f"bert.encoder.layer.{i}.{part}" for i in (0, 1) for part in BLOCK] + ["bert.pooler.dense"]

ENDS = (
    "embeddings end in ['position_embeddings', 'token_type_embeddings', 'word_embeddings'], linear layers end in "
    "['classifier', 'dense', 'key', 'query', 'value']"
)


def chosen(model, target_modules, *arguments, head=("classifier",)):
    layers = select_layers(model, target_modules, *arguments, head=head)
    assert all(model.get_submodule(name) is layer for name, layer in layers.items())
    return list(layers)


def test_all_linear_is_the_body_without_the_head():
    assert chosen(BERT, "all-linear") == BODY
    assert chosen(BERT, "all-linear", head=()) == BODY  # a head that is not trained is not adapted either
    assert chosen(build_tiny(BertModel), "all-linear", head=()) == [name.removeprefix("bert.") for name in BODY]


@pytest.mark.parametrize(
    ("model_class", "per_model", "kind"),
    [
        (GPT2LMHeadModel, 2 * 4, Conv1D),
        (LlamaForCausalLM, 2 * 7, nn.Linear),
        (BertForMaskedLM, 2 * 6, nn.Linear),
        (T5ForConditionalGeneration, 2 * 6 + 2 * 10, nn.Linear),
        (ViTForImageClassification, 2 * 6, nn.Linear),
        (AlbertForSequenceClassification, 8, nn.Linear),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_all_linear_leaves_out_the_output_layer_of_every_family(model_class, per_model, kind):
    layers = select_layers(build_tiny(model_class), "all-linear")
    assert len(layers) == per_model
    assert {type(layer) for layer in layers.values()} == {kind}
    assert not any("lm_head" in n or "cls." in n or "classifier" in n for n in layers)


def test_all_linear_of_a_plain_module_is_every_linear_layer():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Sequential(Conv1D(3, 3), nn.LayerNorm(3)))
    assert chosen(model, "all-linear", head=()) == ["0", "2.0"]


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["query", "value"], [n for n in BODY if n.endswith(("query", "value"))]),
        (["value", "query"], [n for n in BODY if n.endswith(("query", "value"))]),  # the model's order, not ours
        (["output.dense"], [n for n in BODY if n.endswith("output.dense")]),
        (["attention.output.dense"], [n for n in BODY if n.endswith("attention.output.dense")]),
        (["layer.1.output.dense"], ["bert.encoder.layer.1.output.dense"]),
        (["dense"], [n for n in BODY if n.endswith("dense")]),
        (["bert.pooler.dense", "dense"], [n for n in BODY if n.endswith("dense")]),  # twice meant, once chosen
        (r".*\.(query|key)", [n for n in BODY if n.endswith(("query", "key"))]),
        (r"bert\.encoder\.layer\.0\..*", [n for n in BODY if ".layer.0." in n]),
        (r".*embeddings", [f"bert.embeddings.{kind}_embeddings" for kind in ("word", "position", "token_type")]),
    ],
    ids=str,
)
def test_target_modules_are_trailing_parts_or_one_expression(target_modules, expected):
    assert chosen(BERT, target_modules) == expected


def test_a_part_is_matched_whole():
    model = nn.ModuleDict({"my_query": nn.Linear(2, 2), "query": nn.Linear(2, 2)})
    assert chosen(model, ["query"], head=()) == ["query"]
    # The dot of a list entry is a dot, whereas in an expression it is any character.
    model = nn.ModuleDict({"aXb": nn.Linear(2, 2)})
    assert chosen(model, "a.b", head=()) == ["aXb"]
    with pytest.raises(UsageError, match="matches no linear layer"):
        select_layers(model, ["a.b"])


@pytest.mark.parametrize("pattern", ["quer", "put.dense", "uery", ".query", "query.", ""])
def test_a_piece_of_a_part_matches_nothing(pattern):
    message = (
        f"target_modules {pattern!r} matches no linear layer of BertForSequenceClassification, whose {ENDS}. "
        "Give whole trailing parts of a name"
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        select_layers(BERT, ["value", pattern])


def test_an_expression_must_match_the_full_name():
    with pytest.raises(
        UsageError, match=r"target_modules 'query' matches no linear layer .* regular expression that ma"
    ):
        select_layers(BERT, "query")
    with pytest.raises(UsageError, match="matches no linear layer"):
        select_layers(BERT, r"encoder\.layer\.0.*")


def test_a_broken_expression_says_so():
    with pytest.raises(UsageError, match=r"target_modules '\(query' is not a valid regular expression: missing \)"):
        select_layers(BERT, "(query")
    with pytest.raises(UsageError, match=r"exclude_modules '\*' is not a valid regular expression: nothing to repeat"):
        select_layers(BERT, "all-linear", exclude_modules="*")


def test_layers_choose_blocks():
    assert chosen(BERT, ["query"], [1]) == ["bert.encoder.layer.1.attention.self.query"]
    assert chosen(BERT, "all-linear", [0]) == [n for n in BODY if ".layer.0." in n]  # the pooler stands in no block
    assert chosen(BERT, "all-linear", [1, 0, 1]) == [n for n in BODY if ".layer." in n]
    gpt2 = build_tiny(GPT2LMHeadModel)
    assert chosen(gpt2, ["c_attn"], [1], head=()) == ["transformer.h.1.attn.c_attn"]


def test_one_number_is_one_block():
    assert chosen(BERT, ["query"], 1) == chosen(BERT, ["query"], [1]) == ["bert.encoder.layer.1.attention.self.query"]
    assert chosen(BERT, ["query"], 0) == ["bert.encoder.layer.0.attention.self.query"]  # 0 is a number, not nothing
    with pytest.raises(UsageError, match=r"layers \[2\] match no chosen layer; the chosen ones stand in blocks"):
        select_layers(BERT, ["query"], 2)


@pytest.mark.parametrize("layers", [True, False, [True], [0, True]], ids=str)
def test_true_and_false_are_no_blocks(layers):
    with pytest.raises(UsageError, match=r"layers takes the numbers of transformer blocks, .*; got \[.*(True|False)\]"):
        select_layers(BERT, ["query"], layers)


@pytest.mark.parametrize(("layers", "named"), [([0, 5, 2], [2, 5]), ([-1], [-1]), ([], [])], ids=str)
def test_blocks_that_do_not_exist_are_named(layers, named):
    message = f"layers {named} match no chosen layer; the chosen ones stand in blocks [0, 1]."
    with pytest.raises(UsageError, match=re.escape(message)):
        select_layers(BERT, ["query"], layers)


@pytest.mark.parametrize(
    "exclude",
    [["dense"], r".*dense", ["output.dense", "intermediate.dense", "pooler.dense"]],
    ids=str,
)
def test_excluded_layers_are_left_out(exclude):
    assert chosen(BERT, "all-linear", None, exclude) == [n for n in BODY if not n.endswith("dense")]


def test_excluding_the_head_or_nothing_is_allowed():
    assert chosen(BERT, "all-linear", None, ["classifier"]) == BODY
    assert chosen(BERT, "all-linear", None, []) == BODY


def test_excluding_everything_is_an_error():
    message = (
        "No layer of BertForSequenceClassification is left to adapt after target_modules=['query'], layers=None and "
        "exclude_modules='.*attention.*'. "
        f"Its {ENDS}."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        select_layers(BERT, ["query"], exclude_modules=".*attention.*")


def test_an_exclusion_that_matches_nothing_is_a_typo():
    with pytest.raises(UsageError, match=r"exclude_modules 'pooller' matches no linear layer of BertForSequenceC"):
        select_layers(BERT, "all-linear", exclude_modules=["pooller"])
    with pytest.raises(UsageError, match=r"exclude_modules 'pooler' matches modules of .* of type \['BertPooler'\]"):
        select_layers(BERT, "all-linear", exclude_modules=["pooler"])
    with pytest.raises(UsageError, match=r"exclude_modules 'all-linear' matches no linear layer") as caught:
        select_layers(BERT, ["query"], exclude_modules="all-linear")
    assert 'Give "all-linear"' not in str(caught.value)


def test_a_target_within_the_trained_head_is_refused():
    message = (
        "target_modules 'classifier' matches only the task head of BertForSequenceClassification, which is trained "
        "whole. Leave it out, or set train_head to false to adapt it instead."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        select_layers(BERT, ["query", "classifier"], head=["classifier"])
    assert chosen(BERT, ["classifier"], head=()) == ["classifier"]


def test_a_target_that_is_not_linear_is_refused():
    message = (
        "target_modules 'LayerNorm' matches modules of BertForSequenceClassification of type ['LayerNorm'], not linear "
        f"layers. Its {ENDS}."
    )
    with pytest.raises(UsageError, match=re.escape(message)):
        select_layers(BERT, ["LayerNorm"])
    with pytest.raises(UsageError, match=r"of type \['BertLayer'\], not linear layers"):
        select_layers(BERT, r".*layer\.\d")


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv1d(1, 1, 1)), nn.Linear(2, 2)], ids=["Sequential", "Linear"])
def test_a_model_without_a_layer_in_it_is_refused(model):
    with pytest.raises(
        UsageError, match=f"{type(model).__name__} has no linear layer, convolution or embedding to adapt"
    ):
        select_layers(model, "all-linear")


def test_all_linear_of_a_model_of_convolutions_names_what_there_is():
    with pytest.raises(UsageError, match=r"No layer of Sequential is left .* Its convolutions end in \['0'\]\."):
        select_layers(nn.Sequential(nn.Conv2d(1, 1, 1)), "all-linear")


@pytest.mark.parametrize(
    ("model", "target_modules", "name", "parent"),
    [
        (nn.TransformerDecoderLayer(8, 2, 16), ["linear1", "out_proj"], "self_attn.out_proj", "MultiheadAttention"),
        (nn.TransformerDecoderLayer(8, 2, 16), r"self.*out_proj", "self_attn.out_proj", "MultiheadAttention"),
        (nn.TransformerEncoderLayer(8, 2, 16), ["linear1"], "linear1", "TransformerEncoderLayer"),
        (nn.Sequential(nn.TransformerEncoderLayer(8, 2)), ["linear2"], "0.linear2", "TransformerEncoderLayer"),
    ],
    ids=["list", "expression", "the model itself", "fused"],
)
def test_a_layer_that_is_not_always_called_is_refused_by_name(model, target_modules, name, parent):
    with pytest.raises(
        UsageError, match=rf"matches '{name}' of .*, which is not called: {parent} reads its weight directly"
    ):
        select_layers(model, target_modules)


def test_a_layer_that_is_never_called_can_be_excluded():
    model = nn.ModuleDict({"good": nn.ModuleDict({"out_proj": nn.Linear(2, 2)}), "bad": nn.MultiheadAttention(2, 1)})
    with pytest.raises(UsageError, match=r"exclude_modules=\['bad.out_proj'\]"):
        select_layers(model, ["out_proj"])
    assert chosen(model, ["out_proj"], None, ["bad.out_proj"], head=()) == ["good.out_proj"]
    assert chosen(model, "all-linear", head=()) == ["good.out_proj"]
    assert chosen(model, "all-linear", None, ["bad.out_proj"], head=()) == ["good.out_proj"]


def test_an_adapted_torch_transformer_uses_its_adapters_in_evaluation():
    model = nn.ModuleDict(
        {"decoder": nn.TransformerDecoderLayer(8, 2, 16), "encoder": nn.TransformerEncoderLayer(8, 2)}
    )
    adapters = inject(model, LoRA(rank=2))
    assert list(adapters) == ["decoder.linear1", "decoder.linear2"]
    x = torch.randn(3, 2, 8)
    model.eval()
    with torch.no_grad():
        before = model["decoder"](x, x)
        for adapter in adapters.values():
            adapter.lora_B_t.normal_()
        assert not torch.allclose(model["decoder"](x, x), before)


LINEAR = [name for name, module in BERT.named_modules() if isinstance(module, nn.Linear)]
suffixes = st.builds(
    lambda name, length: ".".join(name.split(".")[-length:]), st.sampled_from(LINEAR), st.integers(1, 7)
)


def slow_selection(targets, layers, excluded, head):
    """Compare the last parts of every name with those of every pattern, one by one."""
    names = []
    for name in LINEAR:
        parts = name.split(".")

        def ends_with(pattern, parts=parts):
            wanted = pattern.split(".")
            return parts[-len(wanted) :] == wanted

        block = [int(part) for part in parts if part.isdigit()]
        keep = any(map(ends_with, targets)) and not any(map(ends_with, excluded)) and name not in head
        if keep and (layers is None or (block and block[0] in layers)):
            names.append(name)
    return names


@settings(max_examples=100, deadline=None)
@given(
    st.lists(suffixes, min_size=1, max_size=3),
    st.none() | st.lists(st.integers(0, 1), min_size=1, max_size=2),
    st.lists(suffixes, max_size=2),
    st.sampled_from([(), ("classifier",)]),
)
def test_any_choice_is_what_the_patterns_say(targets, layers, excluded, head):
    expected = slow_selection(targets, layers, excluded, head)
    in_blocks = {int(name.split(".")[3]) for name in expected if ".layer." in name}
    head_only = "classifier" in targets and "classifier" in head
    if not expected or head_only or (layers is not None and in_blocks != set(layers)):
        with pytest.raises(UsageError):
            select_layers(BERT, targets, layers, excluded, head)
        return
    selected = select_layers(BERT, targets, layers, excluded, head)
    assert list(selected) == expected
    assert set(selected) <= set(LINEAR)
    assert not set(selected) & {n for n in LINEAR for e in excluded if f".{n}".endswith(f".{e}")}
