"""new_tokens of a module: the same tokens in the data, the model, the checkpoint and every export."""

import json

import pytest
import torch
from backbones import save_tiny_bert, save_tiny_llama, save_tiny_t5, save_tiny_vit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoTokenizer

import lit_sparse as ls
from lit_sparse.adapters.token_rows import token_rows_in

NEW = ["<person>", "<city>"]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture
def rows(tmp_path):
    texts = [f"the <person> saw a {word} in <city>" for word in ("dog", "cat", "house", "tree")] * 4
    for split in ("train", "validation"):
        lines = [json.dumps({"instruction": text, "output": "<city>"}) for text in texts]
        (tmp_path / "rows").mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{split}.jsonl").write_text("\n".join(lines))
    return str(tmp_path / "rows")


def causal(folder, **changes):
    method = ls.SoRA("all-linear", rank=4, threshold=0.01)
    settings = {"optimizer": lambda p: torch.optim.AdamW(p, lr=1e-2), "new_tokens": NEW, **changes}
    return ls.CausalLM(str(folder), method, **settings)


def data(rows, **changes):
    return ls.InstructionData(rows, batch_size=4, max_length=64, **changes)


def fit(module, rows, folder, steps, **changes):
    keeper = ModelCheckpoint(folder, filename="last", save_top_k=1, every_n_train_steps=1)
    trainer = Trainer(
        max_steps=steps, callbacks=[keeper], num_sanity_val_steps=0, limit_val_batches=0, **{**QUIET, **changes}
    )
    trainer.fit(module, data(rows), ckpt_path=changes.pop("ckpt_path", None))
    return f"{folder}/last.ckpt"


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def llama(request, tmp_path):
    return save_tiny_llama(tmp_path / "llama", tie_word_embeddings=request.param)


@pytest.mark.filterwarnings("ignore")
def test_rows_are_trained_kept_and_resumed(llama, rows, tmp_path):
    torch.manual_seed(1)
    module = causal(llama)
    fit(module, rows, tmp_path / "one", 4)
    tokenizer = AutoTokenizer.from_pretrained(llama)
    size = len(tokenizer)
    embedding = module.model.get_input_embeddings()
    assert embedding.ids.tolist() == [size, size + 1]
    assert module.trainer.datamodule._tokenizer.convert_tokens_to_ids(NEW) == [size, size + 1]
    mean = embedding.base.weight[:size].mean(0)
    assert all((row - mean).abs().max() > 1e-3 for row in embedding.rows)
    # Without the frozen matrix, of which nothing is trained.
    checkpoint = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)
    kept = {name for name in checkpoint["state_dict"] if "embed_tokens" in name or "lm_head" in name}
    assert kept == {"model.model.embed_tokens.rows", "model.lm_head.rows"}

    torch.manual_seed(1)
    half = causal(llama)
    kept = ModelCheckpoint(tmp_path / "two", filename="{step}", save_top_k=-1, every_n_train_steps=2)
    options = {"max_steps": 4, "num_sanity_val_steps": 0, "limit_val_batches": 0, **QUIET}
    Trainer(callbacks=[kept], **options).fit(half, data(rows))
    resumed = causal(llama)
    Trainer(callbacks=[], enable_checkpointing=False, **options).fit(
        resumed, data(rows), ckpt_path=str(tmp_path / "two" / "step=2.ckpt")
    )
    for (name, straight), (_, again) in zip(half.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(straight, again), name


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_is_loaded_and_exported_by_itself(llama, rows, tmp_path):
    module = causal(llama)
    path = fit(module, rows, tmp_path / "kept", 3)
    ids = AutoTokenizer.from_pretrained(llama)("a cat", return_tensors="pt").input_ids
    size = len(AutoTokenizer.from_pretrained(llama))
    ids[0, -1] = size
    expected = module.model.eval()(ids).logits
    again = ls.CausalLM.load_from_checkpoint(path)
    torch.testing.assert_close(again.model.eval()(ids).logits, expected)
    for form in ("peft", "sparse", "delta", "merged"):
        report = ls.export_checkpoint(path, str(tmp_path / form), form, tolerance=1e-3)
        assert report.difference < 1e-4, form
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / form)
        assert tokenizer.convert_tokens_to_ids(NEW) == [size, size + 1]
        assert json.loads((tmp_path / form / "lit_sparse.json").read_text())["new_tokens"] == {
            str(size): NEW[0],
            str(size + 1): NEW[1],
        }


def test_a_checkpoint_of_other_tokens_is_refused(llama, rows, tmp_path):
    path = fit(causal(llama), rows, tmp_path / "kept", 1)
    other = causal(llama, new_tokens=["<person>"])
    with pytest.raises(ls.UsageError, match=r"trains rows of the tokens \['<person>', '<city>'\], the model those of"):
        Trainer(**QUIET).validate(other, data(rows), ckpt_path=path)


def test_other_tokens_of_the_same_ids_are_refused(rows, tmp_path):
    llama = save_tiny_llama(tmp_path / "llama")
    module = causal(llama)
    path = fit(module, rows, tmp_path / "kept", 1)
    ls.export_peft(module.model, tmp_path / "peft")
    for tokens in (["<city>", "<person>"], ["<a>", "<b>"]):
        other = causal(llama, new_tokens=tokens)
        with pytest.raises(ls.UsageError, match=r"the tokens \['<person>', '<city>'\], the model those of"):
            Trainer(**QUIET).validate(other, data(rows), ckpt_path=path)
        message = r"other tokens than the stored ones: set new_tokens to \['<person>', '<city>'\]"
        with pytest.raises(ls.UsageError, match=message):
            causal(llama, new_tokens=tokens, start_from=str(tmp_path / "peft")).configure_model()
    causal(llama, start_from=str(tmp_path / "peft")).configure_model()


def test_a_run_without_new_tokens_is_refused_a_checkpoint_with_them(rows, tmp_path):
    llama = save_tiny_llama(tmp_path / "llama")
    path = fit(causal(llama), rows, tmp_path / "kept", 1)
    message = r"the module has no new_tokens, .* give new_tokens: \['<person>', '<city>'\]"
    for run in (Trainer.fit, Trainer.validate):
        with pytest.raises(ls.UsageError, match=message):
            run(Trainer(**QUIET, max_steps=2), causal(llama, new_tokens=None), datamodule=data(rows), ckpt_path=path)
    again = ls.CausalLM.load_from_checkpoint(path)
    Trainer(**QUIET, limit_val_batches=1).validate(again, data(rows), ckpt_path=path)


def test_another_tokenizer_in_the_data_is_refused(llama, rows, tmp_path):
    save_tiny_t5(tmp_path / "t5")
    trainer = Trainer(**QUIET, max_steps=1, enable_checkpointing=False)
    with pytest.raises(ls.UsageError, match=r"new_tokens extend the tokenizer of its backbone .* leave tokenizer out"):
        trainer.fit(causal(llama), data(rows, tokenizer=str(tmp_path / "t5")))


def test_images_have_no_tokens(tmp_path):
    module = ls.ImageClassification(
        save_tiny_vit(tmp_path / "vit"), ls.LoRA("all-linear", rank=2), num_labels=2, new_tokens=NEW
    )
    with pytest.raises(ls.UsageError, match="is no model of text"):
        module.configure_model()


@pytest.mark.filterwarnings("ignore:.* has no weights for .*cls.predictions")
@pytest.mark.parametrize("kind", [ls.SequenceClassification, ls.TokenClassification, ls.MultipleChoice, ls.MaskedLM])
def test_every_module_of_text_takes_them(kind, tmp_path):
    options = {} if kind is ls.MaskedLM else {"num_labels": 2}
    method = ls.LoRA(["query", "value"], rank=2)
    module = kind(save_tiny_bert(tmp_path / "bert"), method, new_tokens=NEW, **options)
    module.configure_model()
    assert all(layer.texts == tuple(NEW) for _, layer in token_rows_in(module))
    assert [len(list(token_rows_in(module)))] == [2 if kind is ls.MaskedLM else 1]


def test_an_encoder_decoder_takes_them(tmp_path):
    module = ls.Seq2SeqLM(save_tiny_t5(tmp_path / "t5"), ls.LoRA("all-linear", rank=2), new_tokens=NEW)
    module.configure_model()
    assert any(token_rows_in(module))
    qa = ls.QuestionAnswering(save_tiny_bert(tmp_path / "bert"), ls.LoRA(["query"], rank=2), new_tokens=NEW)
    qa.configure_model()
    assert any(token_rows_in(qa))
