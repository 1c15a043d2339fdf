"""PredictionWriter through a real Trainer."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from backbones import save_tiny_bert
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls


def quiet(*callbacks: pl.Callback) -> pl.Trainer:
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return pl.Trainer(callbacks=list(callbacks), accelerator="cpu", **options)


def test_every_row_becomes_a_line(tmp_path: Path) -> None:
    backbone = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "bert", num_labels=3))
    module = ls.SequenceClassification(backbone, ls.LoRA(rank=2))
    tokens = torch.randint(5, 60, (10, 6))
    rows = DataLoader([{"input_ids": row} for row in tokens], batch_size=4)
    (tmp_path / "out.jsonl").write_text("old\n")
    quiet(ls.PredictionWriter(str(tmp_path / "out.jsonl"))).predict(module, rows)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with torch.no_grad():
        expected = module.model.eval()(input_ids=tokens).logits.softmax(-1)
    assert [line["prediction"] for line in lines] == expected.argmax(-1).tolist()
    torch.testing.assert_close(torch.tensor([line["probabilities"] for line in lines]), expected)


def test_several_sets_follow_each_other(tmp_path: Path) -> None:
    backbone = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "bert"))
    module = ls.SequenceClassification(backbone, ls.LoRA(rank=2))
    sets = [DataLoader([{"input_ids": torch.tensor([5, n])}] * n) for n in (2, 3)]
    quiet(ls.PredictionWriter(str(tmp_path / "out.jsonl"))).predict(module, sets)
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ls.UsageError, match=r"folder of output='.*nowhere/out.jsonl' does not exist"):
        ls.PredictionWriter(str(tmp_path / "nowhere" / "out.jsonl"))

    class Bare(pl.LightningModule):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return batch

    writer = ls.PredictionWriter(str(tmp_path / "out.jsonl"))
    with pytest.raises(ls.UsageError, match="predict_step of Bare returned Tensor"):
        quiet(writer).predict(Bare(), DataLoader(torch.ones(2, 2)))
