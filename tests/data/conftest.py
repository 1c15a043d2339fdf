"""Every test has a cache of its own; those that only read a tokenizer share one."""

import datasets
import pytest
from backbones import save_tiny_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("bert"))
