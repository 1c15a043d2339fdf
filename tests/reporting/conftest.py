"""A finished run, with what it leaves on disk."""

import warnings

import lightning.pytorch as pl
import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls

METHOD = {"rank": 4, "alpha": 8, "threshold": 0.12, "overrides": {"query": {"rank": 2}, "output.dense": {"alpha": 2}}}


class Run:
    """Where its files are, and the module that it trained."""

    def __init__(self, folder, module):
        self.logs = folder / "log" / "version_0"
        self.checkpoint = self.logs / "checkpoints" / "last.ckpt"
        self.module = module
        self.adapters = dict(ls.adapters_in(module))


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    backbone = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(folder / "bert"))
    module = ls.SequenceClassification(backbone, ls.SoRA(**METHOD))
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in torch.randint(5, 60, (32, 6))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            logger=CSVLogger(folder, name="log"),
            callbacks=[ModelCheckpoint(filename="last")],
            max_epochs=2,
            log_every_n_steps=2,
            accelerator="cpu",
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(rows, batch_size=4), DataLoader(rows, batch_size=8))
    return Run(folder, module)
