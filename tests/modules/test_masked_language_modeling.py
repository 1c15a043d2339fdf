"""lit_sparse.MaskedLM: figures against a loop over hidden tokens, and a tiny BERT that learns to find them."""

import functools
import json
import math
import sys

import pytest
import torch
from backbones import save_tiny_bert
from projects import last_figures, read_lines, write_config
from transformers import AutoModelForMaskedLM, AutoTokenizer

import lit_sparse as ls
from lit_sparse.cli.main import main

NOUNS = "man dog cat house tree river city woman".split()  # noqa: SIM905
TEXTS = ["a good film", "the dog likes the cat and the woman likes the house", "why", "one two three one two"]


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A tiny BERT with the head of a masked language model, and embeddings that tell tokens apart."""
    folder = save_tiny_bert(
        tmp_path_factory.mktemp("bert"),
        initializer_range=0.3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForMaskedLM.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    return str(tmp_path)


def masked_lm(backbone, lr=1e-2):
    return ls.MaskedLM(backbone, ls.LoRA(rank=4), optimizer=functools.partial(torch.optim.AdamW, lr=lr))


@torch.no_grad()
def token_by_token(model, batches):
    """The loss of every hidden token and whether it is found, row by row without padding."""
    model.eval()
    losses, right = [], []
    for batch in batches:
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            logits = model(input_ids=ids[mask == 1][None]).logits[0]
            for scores, label in zip(logits, labels[mask == 1].tolist(), strict=True):
                if label != -100:
                    losses.append(-math.log(scores.double().softmax(-1)[label]))
                    right.append(int(scores.argmax()) == label)
    return losses, right


def test_figures_are_those_over_all_hidden_tokens(backbone, rows, trainer):
    module, run = masked_lm(backbone), trainer(max_epochs=3)
    data = ls.MaskedLMData(rows, mlm_probability=0.4, batch_size=3)
    run.fit(module, data)
    losses, right = token_by_token(module.model, data.val_dataloader())
    mean = sum(losses) / len(losses)
    assert run.callback_metrics["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert run.callback_metrics["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert run.callback_metrics["val_token_accuracy"] == pytest.approx(sum(right) / len(right))
    (tested,) = run.test(module, data, verbose=False)
    assert tested["test_loss"] == pytest.approx(mean, rel=1e-5)


def test_short_rows_train_although_few_of_their_tokens_are_hidden(backbone, tmp_path, trainer):
    """A batch in which nothing is hidden would have no number as its loss, which FiniteLoss ends the run for."""
    (tmp_path / "rows.json").write_text(json.dumps([{"text": "dog"}] * 24))
    data = ls.MaskedLMData(data_files={"train": "rows.json", "validation": "rows.json"}, batch_size=1)
    run = trainer(max_epochs=1)
    run.fit(masked_lm(backbone), data)
    assert run.global_step == 24


def test_every_mask_is_filled_with_its_likeliest_token(backbone, tmp_path, trainer):
    texts = ["the [MASK] likes a [MASK]", "[MASK] it is", "[MASK] [MASK] [MASK] cat"]
    (tmp_path / "predict.json").write_text(json.dumps([{"text": text} for text in texts]))
    module, run = masked_lm(backbone), trainer()
    (found,) = run.predict(module, ls.MaskedLMData(str(tmp_path)))
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    for text, tokens, filled in zip(texts, found["tokens"], found["text"], strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            likeliest = module.model(input_ids=ids).logits[0].argmax(-1)
        places = (ids[0] == tokenizer.mask_token_id).nonzero().flatten()
        assert tokens == likeliest[places].tolist()
        expected = ids[0].clone()
        expected[places] = likeliest[places]
        assert filled == tokenizer.decode(expected, skip_special_tokens=True)
    assert [len(tokens) for tokens in found["tokens"]] == [2, 1, 3]


@pytest.mark.slow
def test_a_user_teaches_a_model_to_find_words(backbone, tmp_path, monkeypatch):
    """Each row repeats one of eight words, so that what is hidden stands beside it."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(4, 13, (96,), generator=generator).tolist()
    texts = [" ".join([NOUNS[number % 8]] * count) for number, count in enumerate(counts)]
    for split, part in {"train": texts[:64], "validation": texts[64:80], "test": texts[80:]}.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"sentence": text}) + "\n" for text in part))
    asked = [{"sentence": f"{word} [MASK] {word} {word} [MASK]"} for word in NOUNS]
    (tmp_path / "predict.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    arguments = {"path": str(tmp_path), "text": "sentence", "batch_size": 8}
    config = write_config(
        tmp_path / "config.yaml",
        {"class_path": "lit_sparse.MaskedLM", "init_args": {"backbone": backbone}},
        {"class_path": "lit_sparse.MaskedLMData", "init_args": arguments},
        lr=1e-2,
        max_epochs=30,
        log_every_n_steps=1,
    )
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    main(["fit", "--config", config])
    fitted = last_figures()
    weights = ["--ckpt_path", "kept/last.ckpt"]
    main(["validate", "--config", config, *weights])
    validated = last_figures()
    assert validated["val_loss"] == pytest.approx(fitted["val_loss"], rel=1e-5)  # the same tokens are hidden
    main(["test", "--config", config, *weights])
    tested = last_figures()
    data = ls.MaskedLMData(**arguments, tokenizer=backbone)
    for stage, found, batches in (
        ("validate", validated["val_token_accuracy"], data.val_dataloader),
        ("test", tested["test_token_accuracy"], data.test_dataloader),
    ):
        data.setup(stage)
        labels = torch.cat([batch["labels"].flatten() for batch in batches()])
        most_frequent = labels[labels != -100].bincount().max() / (labels != -100).sum()
        assert most_frequent < 0.35
        assert found > 0.7
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "filled.jsonl"]
    main(["predict", "--config", config, *weights, *writer])
    filled = [row["text"] for row in read_lines("filled.jsonl")]
    assert sum(text == " ".join([word] * 5) for text, word in zip(filled, NOUNS, strict=True)) >= 6


def test_prediction_needs_to_know_the_mask_token(backbone, trainer):
    batch = {"input_ids": torch.tensor([[2, 4, 3]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    with pytest.raises(ls.UsageError, match="a data module that has mask_token_id and decode"):
        trainer().predict(masked_lm(backbone), torch.utils.data.DataLoader([batch], batch_size=None))
