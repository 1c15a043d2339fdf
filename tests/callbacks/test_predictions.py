"""PredictionWriter through a real Trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from backbones import save_tiny_bert
from datasets import load_dataset
from pyarrow import parquet
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


class Rows(pl.LightningModule):
    """Predicts what the batch holds, through ``change``."""

    def __init__(self, change: Callable[[torch.Tensor], dict[str, Any]]) -> None:
        super().__init__()
        self.change = change

    def predict_step(self, batch: torch.Tensor, batch_idx: int) -> dict[str, Any]:
        return self.change(batch)


def test_parquet_holds_the_rows_of_the_lines(tmp_path: Path) -> None:
    batches = DataLoader(torch.arange(10), batch_size=4)
    module = Rows(lambda n: {"label": n, "probabilities": n[:, None] / torch.tensor([2.0, 4.0]), "text": n.tolist()})
    lines, columns = (ls.PredictionWriter(str(tmp_path / f"out.{ending}")) for ending in ("jsonl", "parquet"))
    quiet(lines, columns).predict(module, batches)
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    file = parquet.ParquetFile(tmp_path / "out.parquet")
    assert file.read().to_pylist() == expected
    assert [row["label"] for row in expected] == list(range(10))
    assert load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train")[3] == expected[3]


def test_parquet_of_no_rows_can_be_read(tmp_path: Path) -> None:
    writer = ls.PredictionWriter(str(tmp_path / "out.parquet"))
    quiet(writer).predict(Rows(lambda n: {"n": n[:0]}), DataLoader(torch.arange(4)))
    assert parquet.read_table(tmp_path / "out.parquet").num_rows == 0


def test_rows_that_have_no_common_type_are_written_as_lines(tmp_path: Path) -> None:
    module = Rows(lambda n: {"n": n.tolist() if int(n[0]) == 0 else ["words"] * len(n)})
    with pytest.raises(ls.UsageError, match=r"out.parquet cannot hold the predictions in columns: .*out.jsonl"):
        quiet(ls.PredictionWriter(str(tmp_path / "out.parquet"))).predict(module, DataLoader(torch.arange(3)))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert lines == [{"n": 0}, {"n": "words"}, {"n": "words"}]


def test_a_column_that_some_rows_lack_is_null_there(tmp_path: Path) -> None:
    module = Rows(lambda n: {"n": n, **({"more": n} if int(n[0]) else {})})
    quiet(ls.PredictionWriter(str(tmp_path / "out.parquet"))).predict(module, DataLoader(torch.arange(2)))
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows == [{"n": 0, "more": None}, {"n": 1, "more": 1}]


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_the_rows_before_an_error_are_kept(ending: str, tmp_path: Path) -> None:
    def predict(n: torch.Tensor) -> dict[str, Any]:
        if int(n[0]) == 2:
            raise RuntimeError("a fault")
        return {"n": n}

    with pytest.raises(RuntimeError, match="a fault"):
        quiet(ls.PredictionWriter(str(tmp_path / f"out.{ending}"))).predict(Rows(predict), DataLoader(torch.arange(4)))
    kind = "json" if ending == "jsonl" else ending
    rows = load_dataset(kind, data_files=str(tmp_path / f"out.{ending}"), split="train", cache_dir=str(tmp_path))
    assert rows["n"][:] == [0, 1]


def test_errors(tmp_path: Path) -> None:
    for name in ("out.csv", "out", "out.JSONL"):
        with pytest.raises(ls.UsageError, match=rf"output must end in .jsonl or .parquet; got '{name}'"):
            ls.PredictionWriter(name)
    with pytest.raises(ls.UsageError, match=r"folder of output='.*nowhere/out.jsonl' does not exist"):
        ls.PredictionWriter(str(tmp_path / "nowhere" / "out.jsonl"))

    class Bare(pl.LightningModule):
        def predict_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return batch

    writer = ls.PredictionWriter(str(tmp_path / "out.jsonl"))
    with pytest.raises(ls.UsageError, match="predict_step of Bare returned Tensor"):
        quiet(writer).predict(Bare(), DataLoader(torch.ones(2, 2)))
