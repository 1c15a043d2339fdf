"""Tiny backbones and toy batches for the LightningModules."""

import pytest
import torch
from backbones import save_tiny_bert, save_tiny_llama
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset


class ToyRows(Dataset):
    """Rows of six tokens, the second of which tells the label; ``regression`` makes the label a number."""

    def __init__(self, count, regression=False, seed=0, classes=2):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % classes
        self.input_ids = torch.randint(5, 60, (count, 6), generator=generator)
        self.input_ids[:, 1] = 80 + 5 * self.labels
        if regression:
            self.labels = self.labels.float() + 0.1 * torch.rand(count, generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        ids = self.input_ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": self.labels[index]}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A tiny BERT without dropout."""
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="session")
def tiny_bert_with_dropout(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert_dropout"), hidden_dropout_prob=0.3)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def toy_rows():
    return ToyRows


@pytest.fixture
def loader():
    """A data loader of toy rows in a fixed order."""

    def make(count=16, batch_size=8, **options):
        return DataLoader(ToyRows(count, **options), batch_size=batch_size)

    return make


@pytest.fixture
def trainer():
    """A quiet Trainer on one CPU, without logs and checkpoints unless asked for."""

    def make(**options):
        quiet = {
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return Trainer(**{**quiet, **options})

    return make
