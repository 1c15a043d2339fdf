"""lit_sparse.TokenClassification: entities counted as conlleval does, cut words, and the way through the commands."""

# ruff: noqa: S311 - chance for rows, not for secrets
import csv
import json
import random
import sys
from pathlib import Path

import pytest
import torch
import yaml
from programs import launch
from torch.utils.data import DataLoader
from transformers import AutoModelForTokenClassification

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.modules.token_classification import TagScores

NAMES = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
IGNORED = -100


def conlleval(gold, predicted):
    """Entities found, predicted and in the data, in one pass over the tags as conlleval (the Perl script) makes it."""

    def parts(tag):
        return ("O", "") if tag == "O" else tuple(tag.split("-", 1))

    def ends(before, now):
        return before[0] != "O" and (now[0] in ("B", "O") or before[1] != now[1])

    def starts(before, now):
        return now[0] == "B" or (now[0] == "I" and (before[0] == "O" or before[1] != now[1]))

    found = guessed = true = 0
    right, last_gold, last_guess = False, ("O", ""), ("O", "")
    for g, p in [*zip(map(parts, gold), map(parts, predicted), strict=True), (("O", ""), ("O", ""))]:
        if right:
            gold_ends, guess_ends = ends(last_gold, g), ends(last_guess, p)
            if gold_ends and guess_ends:
                found, right = found + 1, False
            elif gold_ends != guess_ends or g[1] != p[1]:
                right = False
        right = right or (starts(last_gold, g) and starts(last_guess, p) and g[1] == p[1])
        true += starts(last_gold, g)
        guessed += starts(last_guess, p)
        last_gold, last_guess = g, p
    return found, guessed, true


def scores_of(rows, names=NAMES):
    """The scores of (gold, predicted) pairs, one at a time."""
    scores = TagScores(names)
    for gold, predicted in rows:
        scores.update(*(torch.tensor([[names.index(tag) for tag in tags]]) for tags in (predicted, gold)))
    return scores


@pytest.mark.parametrize(
    ("gold", "predicted", "counts"),
    [
        ("B-PER I-PER O B-LOC", "B-PER I-PER O B-LOC", (2, 2, 2)),
        ("B-PER I-PER O", "B-PER O O", (0, 1, 1)),  # too short
        ("B-PER O O", "B-PER I-PER O", (0, 1, 1)),  # too long
        ("B-PER I-PER O", "B-LOC I-LOC O", (0, 1, 1)),  # another type
        ("B-PER I-PER O", "I-PER I-PER O", (1, 1, 1)),  # I- after O starts an entity
        ("B-PER B-PER O", "B-PER I-PER O", (0, 1, 2)),  # two adjacent ones, joined
        ("B-PER B-PER O", "B-PER B-PER O", (2, 2, 2)),
        ("B-PER B-LOC O", "B-PER I-LOC O", (2, 2, 2)),  # I- of another type starts an entity
        ("B-PER I-PER I-PER", "B-PER I-LOC I-PER", (0, 3, 1)),
        ("O O O", "O O O", (0, 0, 0)),
        ("B-PER O O", "O O O", (0, 0, 1)),
        ("O O B-PER", "O O B-PER", (1, 1, 1)),  # at the end of the row
    ],
)
def test_entities_begin_and_end_as_for_conlleval(gold, predicted, counts):
    gold, predicted = gold.split(), predicted.split()
    scores = scores_of([(gold, predicted)])
    assert (int(scores.found), int(scores.predicted), int(scores.gold)) == counts
    assert conlleval(gold, predicted) == counts


def test_scores_are_those_of_all_entities_of_the_set():
    """Against conlleval, over rows of all lengths; entities do not reach from row to row."""
    rng = random.Random(0)
    rows = [
        [[rng.choice(["O", "O", *NAMES[1:]]) for _ in range(length)] for _ in range(2)]
        for length in (rng.randint(1, 8) for _ in range(300))
    ]
    rows += [(gold, gold) for gold, _ in rows[:100]]
    found, guessed, true = (sum(column) for column in zip(*(conlleval(*row) for row in rows), strict=True))
    assert 0 < found < guessed != true
    precision, recall = found / guessed, found / true
    words = [pair for gold, predicted in rows for pair in zip(gold, predicted, strict=True)]
    assert scores_of(rows).compute() == pytest.approx(
        {
            "accuracy": sum(g == p for g, p in words) / len(words),
            "precision": precision,
            "recall": recall,
            "f1": 2 * precision * recall / (precision + recall),
        }
    )


def test_nothing_predicted_or_nothing_there_is_zero():
    assert scores_of([(["B-PER"], ["O"])]).compute() == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert scores_of([(["O"], ["B-PER"])]).compute() == {"accuracy": 0, "precision": 0, "recall": 0, "f1": 0}
    assert scores_of([(["O"], ["O"])]).compute() == {"accuracy": 1, "precision": 0, "recall": 0, "f1": 0}


def test_what_is_predicted_beside_the_words_does_not_count():
    scores = TagScores(NAMES)
    scores.update(torch.tensor([[3, 1, 2, 1, 3]]), torch.tensor([[-100, 1, -100, 2, -100]]))
    # B-PER I-PER in the data, B-PER B-PER predicted.
    assert (int(scores.found), int(scores.predicted), int(scores.gold)) == (0, 2, 1)
    assert (int(scores.right), int(scores.words)) == (1, 2)


def test_rows_of_a_batch_are_counted_as_one_by_one():
    rng = random.Random(1)
    rows = [torch.tensor([[rng.randrange(5) for _ in range(8)] for _ in range(2)]) for _ in range(40)]
    for row in rows:
        row[1][torch.tensor([rng.random() < 0.3 for _ in range(8)])] = IGNORED
    alone, together = TagScores(NAMES), TagScores(NAMES)
    for predicted, gold in rows:
        words = gold != IGNORED
        alone.update(predicted[words][None], gold[words][None])
    together.update(torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows]))
    assert together.compute() == alone.compute()
    assert together.found > 0


# A task: first names are B-PER, family names, which only follow those, I-PER.

FIRST, FAMILY = ("dog", "cat", "zoe"), ("house", "river")
OTHERS = "the film was good and it is a story of man with plot".split()  # noqa: SIM905


def sentences(count, seed):
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = []
        for _ in range(rng.randint(3, 7)):
            words += [(rng.choice(FIRST), "B-PER")] if rng.random() < 0.3 else [(rng.choice(OTHERS), "O")]
            if words[-1][1] == "B-PER" and rng.random() < 0.5:
                words.append((rng.choice(FAMILY), "I-PER"))
        rows.append({"tokens": [word for word, _ in words], "ner_tags": [tag for _, tag in words]})
    return rows


def write_sentences(folder):
    """Training rows as JSON Lines, the rest as CoNLL files."""
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sentences(200, seed=0)))
    for seed, split in enumerate(("validation", "test"), start=1):
        lines = [
            "".join(f"{word} {tag}\n" for word, tag in zip(row["tokens"], row["ner_tags"], strict=True))
            for row in sentences(30, seed)
        ]
        (folder / f"{split}.conll").write_text("\n".join(lines))
    files = {"train": "train.jsonl", "validation": "validation.conll", "test": "test.conll"}
    return {split: str(folder / file) for split, file in files.items()}


def tagger(backbone, **options):
    return ls.TokenClassification(backbone, ls.LoRA(rank=2), **options)


@torch.no_grad()
def word_by_word(module, data, rows, limit):
    """Tags predicted for each row, from forward passes of single rows; O for words beyond the limit."""
    module.eval()
    tokenizer, found = data._tokenizer, []
    for row in rows:
        ids, first = [tokenizer.cls_token_id], []
        for word in row["tokens"]:
            first.append(len(ids))
            ids += tokenizer(word, add_special_tokens=False)["input_ids"]
        ids = [*ids[: limit - 1], tokenizer.sep_token_id]
        best = module.model(input_ids=torch.tensor([ids])).logits[0].argmax(-1).tolist()
        kept = len(ids) - 1
        found.append([data.label_names[best[place]] if place < kept else "O" for place in first])
    return found


def test_words_that_are_cut_off_count_as_outside(tiny_bert, tmp_path, trainer):
    files, rows = write_sentences(tmp_path), sentences(30, seed=1)
    data = ls.TokenClassificationData(data_files=files, max_length=7, eval_batch_size=7)
    module, run = tagger(tiny_bert), trainer()
    (logged,) = run.validate(module, data, verbose=False)
    predicted = word_by_word(module, data, rows, limit=7)
    gold = [row["ner_tags"] for row in rows]
    assert any(len(row["tokens"]) > 6 for row in rows)
    counts = [conlleval(*pair) for pair in zip(gold, predicted, strict=True)]
    found, guessed, true = (sum(column) for column in zip(*counts, strict=True))
    assert logged["val_precision"] == pytest.approx(found / guessed)
    assert logged["val_recall"] == pytest.approx(found / true)
    words = [g == p for pair in zip(gold, predicted, strict=True) for g, p in zip(*pair, strict=True)]
    assert logged["val_accuracy"] == pytest.approx(sum(words) / len(words))
    with torch.no_grad():
        whole = [module(**{k: v for k, v in batch.items() if "word" not in k}) for batch in data.val_dataloader()]
    weights = [int((batch["labels"] != IGNORED).sum()) for batch in data.val_dataloader()]
    mean = sum(out.loss.item() * weight for out, weight in zip(whole, weights, strict=True)) / sum(weights)
    assert logged["val_loss"] == pytest.approx(mean, rel=1e-5)


def test_prediction_gives_a_tag_for_each_word(tiny_bert, tmp_path, trainer):
    rows = [{"tokens": row["tokens"]} for row in sentences(5, seed=3)]
    (tmp_path / "predict.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ls.TokenClassificationData(str(tmp_path), labels=NAMES, max_length=8, batch_size=3)
    module = tagger(tiny_bert)
    found = trainer().predict(module, data)
    assert [words for part in found for words in part["words"]] == [row["tokens"] for row in rows]
    assert [tags for part in found for tags in part["tags"]] == word_by_word(module, data, rows, limit=8)


def test_tags_that_are_no_entities_have_an_accuracy_alone(tiny_bert, tmp_path, trainer, recwarn):
    rows = [{"tokens": ["the", "dog", "runs"], "ner_tags": ["DET", "NOUN", "VERB"]}]
    for split in ("validation", "predict"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(rows[0]) + "\n")
    data = ls.TokenClassificationData(str(tmp_path), labels=["DET", "NOUN", "VERB"], max_length=4)
    module, run = tagger(tiny_bert), trainer()
    (logged,) = run.validate(module, data, verbose=False)
    assert sorted(logged) == ["val_accuracy", "val_loss"]
    (predicted,) = word_by_word(module, data, rows, limit=4)
    right = [g == p for g, p in zip(["DET", "NOUN"], predicted, strict=False)]
    assert logged["val_accuracy"] == pytest.approx(sum(right) / 3)  # the third word is cut off, and there is no O
    assert not [w for w in recwarn if "entities" in str(w.message)]
    assert run.predict(module, data)[0]["tags"][0] == [*predicted[:2], None]


def test_tags_of_another_scheme_are_warned_of(tiny_bert):
    module = tagger(tiny_bert, num_labels=2, label_names=["O", "S-PER"])
    with pytest.warns(UserWarning, match=r"tags \['O', 'S-PER'\] are not all written as O, B-… and I-…"):
        module.configure_model()


def test_batches_without_words_are_scored_at_their_labels(tiny_bert, trainer):
    backbone = AutoModelForTokenClassification.from_pretrained(tiny_bert, num_labels=2, id2label={0: "O", 1: "B-X"})
    module = tagger(backbone)
    ids = torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, 0, 1, -100, 1, -100]] * 4)
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}]
    (logged,) = trainer().validate(module, DataLoader(batches, batch_size=None), verbose=False)
    with torch.no_grad():
        best = module.eval().model(input_ids=ids).logits.argmax(-1)
    names = ["O", "B-X"]
    counts = [
        conlleval([names[n] for n in gold if n != -100], [names[n] for n, g in zip(guess, gold, strict=True) if g >= 0])
        for gold, guess in zip(labels.tolist(), best.tolist(), strict=True)
    ]
    found, guessed, true = (sum(column) for column in zip(*counts, strict=True))
    assert logged["val_f1"] == pytest.approx(2 * found / (guessed + true))
    assert logged["val_accuracy"] == pytest.approx(((best == labels) & (labels >= 0)).sum().item() / 16)


def test_rows_without_tags_are_refused(tiny_bert, trainer):
    batch = {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2)}
    module = tagger(tiny_bert, num_labels=2, label_names=["O", "B-X"])
    with pytest.raises(ls.UsageError, match=r"The rows have no labels, .* Use predict"):
        trainer().validate(module, DataLoader([batch], batch_size=None), verbose=False)


# As a user calls it.


def read_metrics(folder):
    with next(Path(folder).glob("*/metrics.csv")).open() as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


@pytest.fixture
def as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def write_config(folder, backbone):
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sparse.TokenClassification",
            "init_args": {
                "backbone": backbone,
                "method": {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 4, "sparsity_weight": 0.1}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
            },
        },
        "data": {
            "class_path": "lit_sparse.TokenClassificationData",
            "init_args": {"data_files": write_sentences(folder), "batch_size": 16},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "kept", "filename": "last"},
                }
            ],
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return str(folder / "config.yaml")


@pytest.mark.slow
def test_entities_are_learned_scored_and_predicted_by_the_commands(tiny_bert, tmp_path, as_from_a_terminal):
    config, kept = write_config(tmp_path, tiny_bert), ["--ckpt_path", "kept/last.ckpt"]
    main(["fit", "--config", config])
    fitted = read_metrics("runs/lightning_logs")
    assert fitted["val_f1"] > 0.9  # all words O: 0
    main(["validate", "--config", config, *kept, "--trainer.logger.init_args.name", "validated"])
    validated = read_metrics("runs/validated")
    assert sorted(k for k in validated if "val" in k) == [
        f"val_{name}" for name in ("accuracy", "f1", "loss", "precision", "recall")
    ]
    assert all(validated[k] == pytest.approx(fitted[k]) for k in validated if "val" in k)
    main(["test", "--config", config, *kept, "--trainer.logger.init_args.name", "tested"])
    assert read_metrics("runs/tested")["test_f1"] > 0.9
    writer = ["--trainer.callbacks+=lit_sparse.PredictionWriter", "--trainer.callbacks.output", "tags.jsonl"]
    main(["predict", "--config", config, *kept, *writer])
    lines = [json.loads(line) for line in Path("tags.jsonl").read_text().splitlines()]
    rows = sentences(30, seed=2)
    assert [line["words"] for line in lines] == [row["tokens"] for row in rows]
    found, guessed, true = (
        sum(column)
        for column in zip(*(conlleval(r["ner_tags"], p["tags"]) for r, p in zip(rows, lines, strict=True)), strict=True)
    )
    assert 2 * found / (guessed + true) == pytest.approx(read_metrics("runs/tested")["test_f1"])
    module = ls.TokenClassification.load_from_checkpoint("kept/last.ckpt")  # without a data module
    assert module.label_names == ["B-PER", "I-PER", "O"]


def test_a_mistake_in_the_data_is_one_line(tiny_bert, tmp_path, as_from_a_terminal, capsys):
    config = write_config(tmp_path, tiny_bert)
    with pytest.raises(SystemExit):
        main(["fit", "--config", config, "--data.init_args.tags", "pos"])
    error = capsys.readouterr().err.splitlines()[-1]
    found = f"['tokens', 'ner_tags'] ({tmp_path}/train.jsonl)"
    assert error == f"error: The split 'train' has no column 'pos'; its columns are {found}."


DDP = """
import json, sys
import lightning as L
import torch
import lit_sparse as ls

if __name__ == "__main__":
    torch.set_num_threads(1)
    backbone, file, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    L.seed_everything(0)
    names = ["B-PER", "I-PER", "O"]
    data = ls.TokenClassificationData(data_files={"validation": file}, labels=names, eval_batch_size=4)
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )
    (found,) = trainer.validate(ls.TokenClassification(backbone, ls.LoRA(rank=2)), data, verbose=False)
    with open(f"{processes}_{trainer.global_rank}.json", "w") as stream:
        json.dump(found, stream)
"""


@pytest.mark.slow
def test_two_processes_find_what_one_finds(tiny_bert, tmp_path):
    (tmp_path / "validate.py").write_text(DDP)
    files = write_sentences(tmp_path)
    for processes in (1, 2):
        done = launch(processes, ["validate.py", tiny_bert, files["validation"], str(processes)], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    alone, first, second = (json.loads((tmp_path / f"{run}.json").read_text()) for run in ("1_0", "2_0", "2_1"))
    assert first == second
    assert first == pytest.approx(alone, rel=1e-5)
    assert 0 < alone["val_f1"] < 1
