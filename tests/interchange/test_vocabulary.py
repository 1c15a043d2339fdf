"""Rows of new tokens in every folder, and a vocabulary that was resized by hand."""

import re

import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_llama
from safetensors.torch import load_file
from trained import as_trained, logits
from transformers import AutoModelForCausalLM, AutoTokenizer, BertForMaskedLM, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.token_rows import token_rows_in

NEW = ["<one>", "<two>"]
METHOD = ls.SoRA("all-linear", rank=4, threshold=0.1)
ADAPTERS = {
    "peft": (ls.export_peft, ls.load_peft),
    "sparse": (ls.save_adapter, ls.load_adapter),
    "delta": (ls.export_delta, ls.load_adapter),
}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tmp_path):
    return save_tiny_llama(tmp_path / "base", tie_word_embeddings=request.param)


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


@torch.no_grad()
def with_tokens(base):
    """A trained model, and ids of which some are new."""
    model = as_trained(load(base), METHOD)
    ids = ls.add_tokens(model, AutoTokenizer.from_pretrained(base), NEW)
    for number, rows in enumerate({id(layer.rows): layer.rows for _, layer in token_rows_in(model)}.values()):
        rows.add_(torch.linspace(-1, 1 + number, rows.numel()).view_as(rows))
    return model, torch.tensor([[5, *ids, 7]])


@pytest.mark.parametrize("form", ADAPTERS)
def test_a_folder_gives_its_rows_to_the_plain_model(form, base, tmp_path):
    model, ids = with_tokens(base)
    write, read = ADAPTERS[form]
    report = write(model, tmp_path / form, tolerance=1e-3)
    assert report.difference < 1e-4
    assert report.head_parameters == 0
    assert "; 0 parameters trained whole and rows of 2 tokens. " in str(report)
    plain = load(base)
    read(plain, tmp_path / form)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert bool(list(token_rows_in(plain))) == (form != "delta")  # which trains on
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
    assert tokenizer.convert_tokens_to_ids(NEW) == ids[0, 1:3].tolist()


def test_merged_is_whole(base, tmp_path):
    model, ids = with_tokens(base)
    expected = logits(model, ids)
    ls.export_merged(model, tmp_path / "merged", tolerance=1e-3)
    torch.testing.assert_close(logits(load(tmp_path / "merged"), ids), expected, rtol=0, atol=1e-4)


def test_peft_computes_the_same_by_the_code_of_the_card(base, tmp_path):
    pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    model, ids = with_tokens(base)
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-3)
    card = (tmp_path / "lora" / "README.md").read_text()
    names: dict = {}
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], names)  # noqa: S102
    torch.testing.assert_close(logits(names["model"], ids), logits(model, ids), rtol=0, atol=1e-4)
    assert names["tokenizer"].convert_tokens_to_ids(NEW) == ids[0, 1:3].tolist()
    assert "ends with an IndexError at the first new token: use PEFT's AutoPeftModel, or resize first" in card
    assert "vLLM, llama.cpp and TGI cannot read rows of tokens from a LoRA: serve the format merged" in card


def test_peft_resizes_by_the_tokenizer_in_the_folder(base, tmp_path):
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    model, ids = with_tokens(base)
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-3)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora")
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=0, atol=1e-4)


def test_a_folder_of_pefts_own_is_the_same_function(base, tmp_path):
    peft = pytest.importorskip("peft", reason="compares with PEFT, which is not installed")
    model = load(base)
    size = model.config.vocab_size
    model.resize_token_embeddings(size + 2, mean_resizing=False)
    tied = model.config.tie_word_embeddings
    rows = [size + 1, size]  # in an order of their own
    indices = rows if tied else {"embed_tokens": rows, "lm_head": rows}
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=indices, init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    plain = load(base)
    ls.load_peft(plain, tmp_path / "lora")
    ids = torch.tensor([[5, size, size + 1, 7]])
    torch.testing.assert_close(logits(plain, ids), logits(adapted, ids), rtol=0, atol=1e-5)


def test_a_bank_switches_rows_and_does_not_grow(base, tmp_path):
    model, ids = with_tokens(base)
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-3)
    bank = ls.AdapterBank(load(base))
    with pytest.raises(ls.UsageError, match=rf"Call model.resize_token_embeddings\({int(ids.max()) + 1}\) before"):
        bank.add("new", tmp_path / "lora")
    larger = load(base)
    larger.resize_token_embeddings(int(ids.max()) + 1, mean_resizing=False)
    bank = ls.AdapterBank(larger)
    before = logits(larger, ids)
    bank.add("new", tmp_path / "lora")
    with bank.using("new"):
        torch.testing.assert_close(logits(larger, ids), logits(model, ids), rtol=0, atol=1e-4)
    assert torch.equal(logits(larger, ids), before)


# Resized by hand.


def resized(base, count, seed=1):
    model = load(base)
    torch.manual_seed(seed)
    model.resize_token_embeddings(model.config.vocab_size + count, mean_resizing=False)
    return as_trained(model, METHOD)


@pytest.mark.parametrize("form", ADAPTERS)
def test_rows_that_were_added_by_hand_are_stored_as_they_are(form, base, tmp_path):
    model = resized(base, 3)
    size = model.config.vocab_size
    ids = torch.tensor([[5, size - 3, size - 1, 7]])
    write, read = ADAPTERS[form]
    report = write(model, tmp_path / form, tolerance=1e-3)
    assert "The embeddings were resized by hand: 3 rows" in str(report)
    plain = load(base)
    read(plain, tmp_path / form)
    torch.testing.assert_close(logits(plain, ids), logits(model, ids), rtol=0, atol=1e-4)
    elsewhere = load(base)
    elsewhere.resize_token_embeddings(size)  # other rows, as another seed gives them
    read(elsewhere, tmp_path / form)
    torch.testing.assert_close(logits(elsewhere, ids), logits(model, ids), rtol=0, atol=1e-4)


def test_rows_added_by_hand_are_not_counted_as_trained(base, tmp_path):
    report = ls.save_adapter(resized(base, 5), tmp_path / "sparse")
    assert report.head_parameters == 0
    assert report.whole == "0 parameters trained whole and rows of 5 tokens stored as they are"
    assert report.whole in (tmp_path / "sparse" / "README.md").read_text()


def test_reading_back_starts_from_the_pretrained_model(base, tmp_path, monkeypatch):
    model = resized(base, 3)
    for part in ("peft_export", "peft_readback"):
        monkeypatch.setattr(f"lit_sparse.interchange.{part}.rows_of", lambda _: {})  # an export that forgets them
    with pytest.raises(ls.UsageError, match=r"does not run on .*index out of range"):
        ls.export_peft(model, tmp_path / "lora")


def test_what_no_folder_can_hold_is_refused(base, tmp_path):
    cut = load(base)
    cut.resize_token_embeddings(cut.config.vocab_size - 1)
    with pytest.raises(ls.UsageError, match=r"was cut by hand, from .* Use export_merged"):
        ls.export_peft(as_trained(cut, METHOD), tmp_path / "lora")
    adapted = load(base)
    adapted.resize_token_embeddings(adapted.config.vocab_size + 1, mean_resizing=False)
    if adapted.config.tie_word_embeddings:
        return
    model = as_trained(adapted, ls.LoRA(["embed_tokens", "q_proj"], rank=2))
    with pytest.raises(ls.UsageError, match=r"was resized by hand, and 'model.embed_tokens' is adapted"):
        ls.save_adapter(model, tmp_path / "sparse")


def test_peft_cannot_express_rows_with_a_bias(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(tmp_path / "bert"))
    plain = build_tiny(BertForMaskedLM, vocab_size=len(tokenizer))
    model = as_trained(build_tiny(BertForMaskedLM, vocab_size=len(tokenizer)), ls.LoRA(["query"], rank=2))
    ids = ls.add_tokens(model, tokenizer, NEW)
    with pytest.raises(ls.UsageError, match=r"PEFT cannot express the rows of new tokens: .* has a bias"):
        ls.export_peft(model, tmp_path / "lora")
    with torch.no_grad():
        for _, layer in token_rows_in(model):
            if layer.bias_rows is not None:
                layer.bias_rows.add_(1)
    ls.save_adapter(model, tmp_path / "sparse")
    ls.load_adapter(plain, tmp_path / "sparse")
    batch = torch.tensor([[5, *ids, 7]])
    torch.testing.assert_close(logits(plain, batch), logits(model, batch), rtol=0, atol=1e-5)


def test_rows_are_compared_with_the_configuration(base, tmp_path):
    model, _ = with_tokens(base)
    ls.export_peft(model, tmp_path / "lora", tolerance=1e-3)
    file = tmp_path / "lora" / "adapter_model.safetensors"
    rows = [name for name in load_file(file) if "trainable_tokens_delta" in name]
    assert len(rows) == 1 + (not model.config.tie_word_embeddings)
    config = tmp_path / "lora" / "adapter_config.json"
    config.write_text(config.read_text().replace('"model.embed_tokens": [', '"model.embed_tokens": [3, '))
    with pytest.raises(ls.UsageError, match="there must be a row for each token, once"):
        ls.load_peft(load(base), tmp_path / "lora")


def test_a_model_built_in_python_has_nothing_to_be_compared_with(tmp_path):
    model = build_tiny(LlamaForCausalLM)
    model.resize_token_embeddings(70)
    assert ls.save_adapter(as_trained(model, METHOD), tmp_path / "sparse").difference < 1e-4
