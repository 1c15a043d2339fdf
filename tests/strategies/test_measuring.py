"""What callbacks measure in two real processes: the training rows of all, other data in each, one decision to save."""

import json

import pytest
from programs import launch

SCRIPT = """
import json
from pathlib import Path
import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification
import lit_sparse as ls
from lit_sparse.callbacks.measuring import measured

torch.set_num_threads(1)
rows = [{"input_ids": torch.arange(2, 8) + i, "labels": torch.tensor(i % 2)} for i in range(32)]
others = [{"input_ids": torch.arange(30, 36) + i, "labels": torch.tensor(i % 2)} for i in range(6)]


class Other(L.LightningDataModule):
    def prepare_data(self):
        with open("prepared.txt", "a") as file:
            file.write("once ")

    def setup(self, stage):
        assert Path("prepared.txt").exists()

    def val_dataloader(self):
        return DataLoader(others, batch_size=4)


class Unlike(ls.SequenceClassification):
    "Each process logs a score of its own: one rises, the other falls."

    def on_validation_epoch_end(self):
        super().on_validation_epoch_end()
        sign = 1 if self.global_rank == 0 else -1
        self.log("val_own", float(sign * self.current_epoch), sync_dist=False, rank_zero_only=False)


torch.manual_seed(0)
config = BertConfig(
    vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, num_labels=2
)
module = Unlike(BertForSequenceClassification(config), ls.SoRA(rank=4, threshold=0.0), num_labels=2)
stages = ls.ThresholdStages(
    first=0.0, last=0.01, count=2, monitor="val_own", first_epochs=2, epochs=2, folder="stages"
)
probe = ls.ForgettingProbe(Other(), "other")
trainer = L.Trainer(
    accelerator="cpu", devices=2, strategy="ddp", max_epochs=4, callbacks=[stages, probe], logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)
trainer.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=4))
told = {
    "rows": stages.rows,
    "probe": probe.after,
    "train": measured(module, DataLoader(rows, batch_size=32)),
    "other": measured(module, DataLoader(others, batch_size=6)),
}
Path(f"told_{trainer.global_rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_two_processes_measure_and_save_as_one(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = launch(2, ["script.py"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (json.loads((tmp_path / f"told_{rank}.json").read_text()) for rank in (0, 1))
    assert first["rows"] == second["rows"]
    assert [row["epoch"] for row in first["rows"]] == [1, 3]  # the first process's score is what counts
    last = first["rows"][-1]
    assert last["train_loss"] == pytest.approx(first["train"]["loss"], rel=1e-5)
    assert last["train_accuracy"] == pytest.approx(first["train"]["accuracy"])
    for told in (first, second):
        assert told["probe"] == pytest.approx(first["other"], rel=1e-5)
    before_and_after = 2
    assert (tmp_path / "prepared.txt").read_text() == "once " * before_and_after
    assert {path.name for path in (tmp_path / "stages").iterdir()} >= {"stage-1.ckpt", "stage-2.ckpt", "stages.csv"}
