"""Every test has a cache of its own; those that only read a tokenizer share one."""

import json

import datasets
import pytest
from backbones import save_tiny_tokenizer


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_tokenizer(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def write(tmp_path):
    """Writes rows as JSON Lines, and gives back the file's path."""

    def write_rows(rows, name="rows.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write_rows
