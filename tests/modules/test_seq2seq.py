"""lit_sparse.Seq2SeqLM: figures by token and by text against loops, and tiny T5 and BART that learn from files."""

import json
import math
import sys

import pytest
import torch
from backbones import save_tiny_bart, save_tiny_llama, save_tiny_t5
from programs import launch
from projects import last_figures, read_lines, write_config
from torch.utils.data import DataLoader
from torchmetrics.text import ROUGEScore
from transformers import AutoModelForCausalLM, AutoTokenizer, MT5Config, MT5ForConditionalGeneration

import lit_sparse as ls
from lit_sparse.cli.main import main

WORDS = {
    "man": "woman",
    "dog": "house",
    "cat": "tree",
    "river": "city",
    "good": "bad",
    "sad": "funny",
    "warm": "cold",
    "one": "two",
}
OTHERS = "good bad great awful fine dull best worst".split()  # noqa: SIM905
PAIRS = [
    {"article": "the cat sat", "summary": "a cat and a dog and a man"},
    {"article": "what was the worst film", "summary": "this"},
    {"article": "it is so", "summary": "not true, so false"},
    {"article": "the dog runs", "summary": "the dog"},
    {"article": "why", "summary": "one two three"},
]
COLUMNS = {"source": "article", "target": "summary"}


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return save_tiny_t5(tmp_path_factory.mktemp("t5"), dropout_rate=0.0)


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    # With larger embeddings than BART's own before training, which make every token about as likely as any other.
    return save_tiny_bart(tmp_path_factory.mktemp("bart"), dropout=0.0, init_std=0.3)


@pytest.fixture
def pairs(tmp_path):
    """A folder of rows with targets of very different lengths, for every split."""
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(PAIRS))
    return tmp_path


@torch.no_grad()
def token_by_token(model, tokenizer, start, limit):
    """The loss of every token of each target and whether it is the likeliest, from one forward pass each."""
    model.eval()
    losses, right = [], []
    for row in PAIRS:
        source = tokenizer(row["article"], return_tensors="pt")["input_ids"]
        written = [start]
        for token in tokenizer(row["summary"])["input_ids"][:limit]:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits[0, -1]
            losses.append(-math.log(logits.double().softmax(-1)[token]))
            right.append(int(logits.argmax()) == token)
            written.append(token)
    return losses, right


@pytest.mark.parametrize("kind", ["t5", "mt5", "bart"])
def test_figures_are_those_over_all_tokens_of_the_targets(kind, t5, bart, pairs, trainer):
    folder = bart if kind == "bart" else t5
    backbone = folder
    if kind == "mt5":
        # Its output embeddings are its own, where T5's are those of the input.
        config = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        backbone = MT5ForConditionalGeneration(MT5Config(vocab_size=256, decoder_start_token_id=0, **config))
    data = ls.Seq2SeqData(str(pairs), **COLUMNS, tokenizer=folder, max_target_length=6, batch_size=2)
    module, run = ls.Seq2SeqLM(backbone, ls.LoRA(rank=4), max_new_tokens=3), trainer(max_epochs=2)
    run.fit(module, data)
    assert "val_loss" in run.callback_metrics
    assert "val_rouge1" not in run.callback_metrics  # generation is dear: only where it is asked for
    losses, right = token_by_token(
        module.model, AutoTokenizer.from_pretrained(folder), {"bart": 1}.get(kind, 0), limit=6
    )
    (found,) = run.validate(module, data, verbose=False)
    mean = sum(losses) / len(losses)
    assert found["val_loss"] == pytest.approx(mean, rel=1e-5)
    assert found["val_perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)
    assert found["val_token_accuracy"] == pytest.approx(sum(right) / len(right))
    assert run.callback_metrics["val_loss"] == pytest.approx(mean, rel=1e-5)


def test_prediction_writes_greedily_token_by_token(bart, pairs, trainer):
    data = ls.Seq2SeqData(str(pairs), **COLUMNS)
    module, run = ls.Seq2SeqLM(bart, ls.LoRA(rank=4), max_new_tokens=5), trainer()
    (found,) = run.predict(module, data)
    tokenizer = AutoTokenizer.from_pretrained(bart)
    assert found["prompt"] == [row["article"] for row in PAIRS]
    for row, tokens, text in zip(PAIRS, found["tokens"], found["text"], strict=True):
        source = tokenizer(row["article"], return_tensors="pt")["input_ids"]
        written = [tokenizer.eos_token_id]
        # Four of the five tokens: the last one is the eos that BART's configuration asks for.
        while len(written) <= 4 and (len(written) == 1 or written[-1] != tokenizer.eos_token_id):
            with torch.no_grad():
                logits = module.model(input_ids=source, decoder_input_ids=torch.tensor([written])).logits[0, -1]
            written.append(int(logits.argmax()))
        assert tokens[: len(written) - 1].tolist() == written[1:]
        assert text == tokenizer.decode(written, skip_special_tokens=True)


def test_each_set_is_measured_anew(bart, pairs, trainer):
    """On its own texts a model is always right, whatever it was measured on before."""
    data = ls.Seq2SeqData(str(pairs), **COLUMNS)
    module, run = ls.Seq2SeqLM(bart, ls.LoRA(rank=4), max_new_tokens=5), trainer()
    (found,) = run.predict(module, data)
    own = [{**row, "summary": f" {text.strip()} "} for row, text in zip(PAIRS, found["text"], strict=True)]
    (pairs / "own.json").write_text(json.dumps(own))
    own_data = ls.Seq2SeqData(data_files={"validation": "own.json"}, **COLUMNS)
    exact = [run.validate(module, d, verbose=False)[0]["val_exact_match"] for d in (own_data, data, own_data)]
    assert exact == [1, 0, 1]


def test_texts_are_compared_in_a_fit_that_asks_for_it(t5, pairs, trainer):
    data = ls.Seq2SeqData(str(pairs), **COLUMNS)
    module, run = ls.Seq2SeqLM(t5, ls.LoRA(rank=4), max_new_tokens=2, generate_in_fit=True), trainer(max_epochs=1)
    run.fit(module, data)
    assert {"val_exact_match", "val_rouge1", "val_rouge2", "val_rougeL"} <= set(run.callback_metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "lr"), [("t5", 1e-2), ("bart", 5e-3)])
def test_a_user_teaches_words_and_reads_what_was_written(kind, lr, request, tmp_path, monkeypatch):
    """The target depends on one word of the source; of eight, the most frequent one is right in an eighth of rows."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()
    combinations = [(a, b) for a in WORDS for b in OTHERS]
    rows = [
        {"source": f"the {a} was {b}", "target": f"a {WORDS[a]}"} for a, b in (combinations[number] for number in order)
    ]
    # Some targets of the test set are not what is learned, in part or altogether, and one is long.
    changed = [
        {**row, "target": row["target"] + (" runs", "", " and a " + "cat " * 20)[i % 3]}
        for i, row in enumerate(rows[48:])
    ]
    splits = {"train": rows[:48], "validation": rows[48:], "test": changed}
    for split, part in splits.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    config = write_config(
        tmp_path / "config.yaml",
        {
            "class_path": "lit_sparse.Seq2SeqLM",
            "init_args": {"backbone": request.getfixturevalue(kind), "max_new_tokens": 8},
        },
        {
            "class_path": "lit_sparse.Seq2SeqData",
            "init_args": {
                "path": str(tmp_path),
                "prefix": "so ",
                "max_target_length": 8,
                "batch_size": 8,
                "eval_batch_size": 5,
            },
        },
        lr=lr,
        max_epochs=40,
        log_every_n_steps=1,
    )
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    main(["fit", "--config", config])
    weights = ["--ckpt_path", "kept/last.ckpt"]
    main(["validate", "--config", config, *weights])
    validated = last_figures()
    assert validated["val_exact_match"] > 0.9  # 1/8 by the most frequent target
    main(["test", "--config", config, *weights])
    tested = last_figures()
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "written.jsonl"]
    main(["predict", "--config", config, *weights, *writer])
    texts = [row["text"] for row in read_lines("written.jsonl")]
    targets = [row["target"] for row in changed]
    same = [text == target.strip() for text, target in zip(texts, targets, strict=True)]
    assert tested["test_exact_match"] == pytest.approx(sum(same) / len(same))
    assert 0 < sum(same) < len(same)
    rouge = ROUGEScore(rouge_keys=("rouge1", "rouge2", "rougeL"))
    rouge.update(texts, targets)
    for name, value in rouge.compute().items():
        if name.endswith("_fmeasure"):
            assert tested[f"test_{name.removesuffix('_fmeasure')}"] == pytest.approx(value.item(), rel=1e-5)


TWO_PROCESSES = """
import json
import lightning as L
import torch
import lit_sparse as ls

if __name__ == "__main__":
    torch.set_num_threads(1)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    module = ls.Seq2SeqLM("t5", ls.LoRA(rank=4), max_new_tokens=4)
    (found,) = trainer.validate(module, ls.Seq2SeqData("rows", batch_size=2), verbose=False)
    if trainer.global_rank == 0:
        print("FOUND", json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_find_the_figures_of_one(tmp_path, trainer):
    t5 = save_tiny_t5(tmp_path / "t5")
    module = ls.Seq2SeqLM(t5, ls.LoRA(rank=4), max_new_tokens=4)
    module.configure_model()
    module.eval()
    tokenizer = AutoTokenizer.from_pretrained(t5)
    rows = []
    for text in [*WORDS, *OTHERS]:
        tokens = module.model.generate(**tokenizer(text, return_tensors="pt"), max_new_tokens=4)
        written = tokenizer.decode(tokens[0], skip_special_tokens=True)
        if written.strip():  # one process has the targets that are met, the other longer and longer ones
            rows.append({"source": text, "target": written + " cat dog" * (len(rows) % 2) * len(rows)})
    rows = rows[: len(rows) // 2 * 2]
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "validation.json").write_text(json.dumps(rows))
    (alone,) = trainer().validate(module, ls.Seq2SeqData("rows", tokenizer=t5, batch_size=4), verbose=False)
    assert alone["val_exact_match"] == 0.5
    assert len(rows) >= 4
    (tmp_path / "validate.py").write_text(TWO_PROCESSES)
    done = launch(2, ["validate.py"])
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    assert json.loads(line.removeprefix("FOUND ")) == pytest.approx(alone, rel=1e-5)


def test_a_decoder_alone_is_refused(tmp_path, trainer):
    llama = save_tiny_llama(tmp_path / "llama")
    with pytest.raises(ls.UsageError, match=r"LlamaConfig.* for this kind of AutoModel: AutoModelForSeq2SeqLM"):
        ls.Seq2SeqLM(llama, ls.LoRA(rank=4)).configure_model()
    built = AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(ls.UsageError, match="encoder-decoder such as T5 or BART, but LlamaForCausalLM is none"):
        ls.Seq2SeqLM(built, ls.LoRA(rank=4)).configure_model()


def test_what_cannot_be_generated_is_refused(t5, pairs, trainer):
    with pytest.raises(ls.UsageError, match="max_new_tokens must be at least 1; got 0"):
        ls.Seq2SeqLM(t5, ls.LoRA(rank=4), max_new_tokens=0)
    data = ls.Seq2SeqData(str(pairs), **COLUMNS, tokenizer=t5)
    data.setup("validate")
    loader = DataLoader(list(data.val_dataloader()), batch_size=None)
    with pytest.raises(ls.UsageError, match=r"data module that has decode\(tokens\)"):
        trainer().validate(ls.Seq2SeqLM(t5, ls.LoRA(rank=4)), loader, verbose=False)
