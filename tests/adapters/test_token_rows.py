"""lit_sparse.adapters.token_rows: of a frozen vocabulary only the rows of new tokens are trained."""

import copy

import pytest
import torch
from backbones import build_tiny, save_tiny_causal_tokenizer, save_tiny_tokenizer
from torch import nn
from transformers import (
    AutoTokenizer,
    BartForConditionalGeneration,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    RobertaForMaskedLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.adapters.token_rows import TokenRows, token_rows_in, train_rows, vocabulary_layers

NEW = ["<one>", "<two>"]
MODELS = {
    "Llama": (LlamaForCausalLM, {"tie_word_embeddings": False}),
    "Llama, tied": (LlamaForCausalLM, {"tie_word_embeddings": True}),
    "Llama, classifier": (LlamaForSequenceClassification, {}),
    "GPT-2": (GPT2LMHeadModel, {}),
    "BERT": (BertForSequenceClassification, {}),
    "BERT, masked": (BertForMaskedLM, {}),
    "BERT, masked, untied": (BertForMaskedLM, {"tie_word_embeddings": False}),
    "RoBERTa, masked": (RobertaForMaskedLM, {}),
    "T5": (T5ForConditionalGeneration, {}),
    "T5, untied": (T5ForConditionalGeneration, {"tie_word_embeddings": False}),
    "BART, scaled": (
        BartForConditionalGeneration,
        {
            "vocab_size": 64,
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "scale_embedding": True,
        },
    ),
}


def injected(name, **method):
    model_class, config = MODELS[name]
    model = build_tiny(model_class, **config)
    ls.inject(model, ls.LoRA(**{"target_modules": "all-linear", "rank": 2, **method}))
    return model


def batch(ids):
    return {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([ids])}


def outputs(model, ids):
    inputs = batch(ids) if model.config.is_encoder_decoder else {"input_ids": torch.tensor([ids])}
    return model.eval()(**inputs).logits


@torch.no_grad()
def as_if_trained(model):
    """Rows that differ from each other and from what they started as."""
    for parameter in {id(p): p for _, layer in token_rows_in(model) for p in layer.parameters(recurse=False)}.values():
        parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_rows_compute_what_they_would_inside_of_the_matrix(name):
    model = injected(name)
    layers = train_rows(model, [3, 64, 66])  # one of them in the old matrix, one in between missed out
    assert all(isinstance(layer, TokenRows) for layer in vocabulary_layers(model).values())
    as_if_trained(model)
    ids = [5, 64, 3, 7, 66, 65, 2]
    with torch.no_grad():
        found = outputs(model, ids)
    merged = copy.deepcopy(model)
    ls.merge(merged)
    assert not any(token_rows_in(merged))
    with torch.no_grad():
        torch.testing.assert_close(found, outputs(merged, ids), rtol=1e-5, atol=1e-5)
    embedding = merged.get_input_embeddings()
    assert torch.equal(embedding.weight[[3, 64, 66]], layers[0].rows)
    assert embedding.num_embeddings == merged.config.vocab_size == 67


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_rows_of_the_matrix(name):
    ids = [5, 64, 3, 7, 64, 65, 2]
    model = injected(name)
    train_rows(model, [3, 64, 65])
    as_if_trained(model)
    whole = copy.deepcopy(model)
    ls.merge(whole)
    weights = {id(layer.weight): layer.weight.requires_grad_() for layer in vocabulary_layers(whole).values()}
    outputs(model, ids).square().sum().backward()
    outputs(whole, ids).square().sum().backward()
    rows = {id(layer.rows): layer for _, layer in token_rows_in(model)}
    assert len(rows) == len(weights)
    for layer, weight in zip(rows.values(), weights.values(), strict=True):
        torch.testing.assert_close(layer.rows.grad, weight.grad[[3, 64, 65]], rtol=1e-4, atol=1e-4)
        assert layer.base.weight.grad is None
        assert not layer.base.weight.requires_grad


def test_switched_off_the_frozen_rows_are_used():
    model = injected("Llama")
    train_rows(model, [3, 64])
    with torch.no_grad():
        before = outputs(model, [5, 3, 64])
        as_if_trained(model)
        assert not torch.allclose(outputs(model, [5, 3, 64]), before)
        with ls.disable_adapters(model):
            torch.testing.assert_close(outputs(model, [5, 3, 64]), before)


def test_rows_stay_float32_beside_half_precision():
    model = injected("Llama, tied").bfloat16()
    (layer, *_) = train_rows(model, [64])
    assert layer.rows.dtype is torch.float32
    assert model.to(torch.bfloat16).get_input_embeddings().rows.dtype is torch.float32
    assert outputs(model, [3, 64]).dtype is torch.bfloat16


@pytest.mark.parametrize("name", MODELS)
def test_tied_layers_share_their_rows_and_others_do_not(name):
    model = injected(name)
    train_rows(model, [64])
    rows = {id(layer.weight): layer.rows for _, layer in token_rows_in(model)}
    assert all(layer.rows is rows[id(layer.weight)] for _, layer in token_rows_in(model))
    assert len({id(own) for own in rows.values()}) == len(rows) == 1 + (name in ("Llama", "BERT, masked, untied"))


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(save_tiny_causal_tokenizer(tmp_path, add_bos=True, pad_token="<pad>"))  # noqa: S106


def test_new_tokens_start_as_the_mean_and_known_ones_as_they_are(tokenizer):
    size = len(tokenizer)
    model = build_tiny(LlamaForCausalLM, vocab_size=size + 1)  # with a row that no token uses, as many models have
    ls.inject(model, ls.LoRA("all-linear", rank=2))
    weight = model.get_input_embeddings().weight.clone()
    known = tokenizer.convert_ids_to_tokens(7)
    assert ls.add_tokens(model, tokenizer, [*NEW, known]) == [size, size + 1, 7]
    assert len(tokenizer) == model.get_input_embeddings().num_embeddings == size + 2
    layer = model.get_input_embeddings()
    assert layer.ids.tolist() == [7, size, size + 1]
    assert layer.texts == (known, *NEW)
    assert torch.equal(layer.rows[0], weight[7])
    for row in layer.rows[1:]:
        torch.testing.assert_close(row, weight.mean(0))
    assert torch.equal(layer.base.weight[: size + 1], weight)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n} == {
        "model.embed_tokens.rows",
        "lm_head.rows",
    }


def test_only_new_rows_learn_and_none_decays(tokenizer):
    model = injected("Llama, tied")
    model.resize_token_embeddings(len(tokenizer))
    ls.add_tokens(model, tokenizer, NEW)
    method = ls.LoRA("all-linear", rank=2)
    frozen = model.get_input_embeddings().base.weight.clone()
    groups = ls.parameter_groups(model, method)
    rows = model.get_input_embeddings().rows
    (group,) = [group for group in groups if any(p is rows for p in group["params"])]
    assert group["weight_decay"] == 0
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    before = rows.detach().clone()
    ids = tokenizer("a <one> film <two> runs", return_tensors="pt").input_ids
    for _ in range(3):
        model.train()(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(model.get_input_embeddings().base.weight, frozen)
    assert (rows != before).all(1).all()
    assert (
        sum(p.numel() for p in optimizer.state if p.shape[-1] == 32 and p.shape[0] > 8) == 0
    )  # no state of the matrix


@pytest.mark.parametrize(
    ("name", "method", "tokens", "message"),
    [
        ("Llama", {}, [], "are texts of tokens, each once"),
        ("Llama", {}, ["<a>", "<a>"], "are texts of tokens, each once"),
        ("Llama", {}, [" "], "are texts of tokens, each once"),
        (
            "Llama",
            {"target_modules": ["embed_tokens", "q_proj"]},
            NEW,
            "'model.embed_tokens' of .* target_modules adap",
        ),
        (
            "Llama",
            {"target_modules": ["lm_head", "q_proj"]},
            NEW,
            "'lm_head' of .* target_modules adapts: leave it out",
        ),
        ("Llama", {"train_head": ["lm_head"]}, NEW, "'lm_head' of .* is trained whole: leave it out of train_head"),
    ],
)
def test_what_cannot_be_is_refused(name, method, tokens, message, tokenizer):
    before = tokenizer.get_vocab()
    with pytest.raises(ls.UsageError, match=message):
        ls.add_tokens(injected(name, **method), tokenizer, tokens)
    assert tokenizer.get_vocab() == before


def test_models_without_tokens_or_adapters_are_refused(tokenizer):
    model = build_tiny(ViTForImageClassification)
    ls.inject(model, ls.LoRA("all-linear", rank=2))
    before = tokenizer.get_vocab()
    with pytest.raises(ls.UsageError, match=r"ViTForImageClassification is no model of text .*\['pixel_values'\]"):
        ls.add_tokens(model, tokenizer, NEW)
    with pytest.raises(ls.UsageError, match="holds no adapters: inject a method first"):
        ls.add_tokens(build_tiny(LlamaForCausalLM), tokenizer, NEW)
    twice = injected("Llama")
    train_rows(twice, [64])
    with pytest.raises(ls.UsageError, match="trains rows of tokens already"):
        ls.add_tokens(twice, tokenizer, NEW)
    assert tokenizer.get_vocab() == before


def test_tokens_that_a_tokenizer_takes_for_one_are_refused(tmp_path):
    lowering = AutoTokenizer.from_pretrained(save_tiny_tokenizer(tmp_path))
    model = injected("BERT")
    model.resize_token_embeddings(len(lowering))
    ids = ls.add_tokens(model, lowering, ["<ENT>"])
    assert lowering("a <ENT> film").input_ids.count(ids[0]) == 1


def test_a_model_inside_of_a_module_gets_them_too(tokenizer):
    model = nn.ModuleDict({"inner": injected("Llama, tied")})
    train_rows(model, [64])
    assert [name for name, _ in token_rows_in(model)] == ["inner.model.embed_tokens", "inner.lm_head"]


def test_gradient_checkpointing_changes_nothing():
    def gradients(checkpointing):
        model = injected("Llama")
        train_rows(model, [3, 64])
        as_if_trained(model)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.tensor([[5, 3, 64, 7]])
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [layer.rows.grad for _, layer in token_rows_in(model)]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed)
