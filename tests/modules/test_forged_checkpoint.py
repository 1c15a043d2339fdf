"""A checkpoint that others made must not choose what code runs, unless the caller lets it."""

import functools
import json
import pickle
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from backbones import save_tiny_bert
from torch import nn

import lit_sparse as ls
from lit_sparse.callbacks.checkpoint_files import WholeFiles

MODELING = """
from pathlib import Path
from transformers import BertForSequenceClassification
Path({marker!r}).touch()
class Own(BertForSequenceClassification):
    pass
"""


@pytest.fixture
def forge(tmp_path):
    """Writes the checkpoint of a tiny module, with other hyperparameters; gives back the file."""
    backbone = save_tiny_bert(tmp_path / "bert")
    module = ls.SequenceClassification(backbone, ls.LoRA(["query"], rank=2), num_labels=2)
    module.configure_model()
    whole = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    module.on_save_checkpoint(whole)

    def write(**changes):
        torch.save({**whole, "hyper_parameters": {**whole["hyper_parameters"], **changes}}, tmp_path / "forged.ckpt")
        return tmp_path / "forged.ckpt"

    return write


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """The file that code of the attacker's writes: an importable module, and the modeling file of a backbone."""
    (tmp_path / "evil_module.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("evil_module", None)


def evil_backbone(folder, marker):
    save_tiny_bert(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModelForSequenceClassification": "modeling.Own"}, "architectures": ["Own"]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(MODELING.format(marker=str(marker)))
    return str(folder)


def test_code_of_a_backbone_runs_only_when_the_caller_says_so(forge, marker, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    file = forge(backbone=evil_backbone(tmp_path / "evil", marker), backbone_args={"trust_remote_code": True})
    with pytest.raises(ls.UsageError, match=r"wants to run code that comes with the backbone .*evil"):
        ls.SequenceClassification.load_from_checkpoint(file)
    assert not marker.exists()
    loaded = ls.SequenceClassification.load_from_checkpoint(file, backbone_args={}, backbone=str(tmp_path / "bert"))
    assert not marker.exists()
    assert "trust_remote_code" not in loaded.backbone_args
    loaded = ls.SequenceClassification.load_from_checkpoint(file, trust_remote_code=True)
    assert type(loaded.model).__name__ == "Own"
    assert marker.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"weights_only": False},
        {"attn_implementation": "someone/kernels"},
        {"use_kernels": True},
        {"allow_all_kernels": True},
    ],
)
def test_other_ways_to_code_need_the_same_permission(arguments, forge):
    with pytest.raises(ls.UsageError, match="wants to run code"):
        ls.SequenceClassification.load_from_checkpoint(forge(backbone_args=arguments))


SPEC = {"class_path": "evil_module.Thing", "init_args": {}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": SPEC}, "trained with evil_module.Thing, and 0 classes of this name are known"),
        ({"optimizer": SPEC}, "trained with evil_module.Thing, and 0 classes of this name are known"),
        ({"optimizer": {"class_path": "subprocess.Popen", "init_args": {"args": "true"}}}, "and 0 classes"),
        ({"method": {"class_path": "torch.nn.Linear", "init_args": {}}}, "and 0 classes"),
        ({"method": {"class_path": ["evil_module"]}}, "and 0 classes"),
        ({"method": {"init_args": {}}}, "names no Method by class_path and init_args"),
        ({"method": {"class_path": "lit_sparse.SoRA", "init_args": {"x": 1}}}, "arguments that SoRA cannot take"),
        ({"compile": SPEC}, r"names classes for \['compile'\], which are not made from a file: pass these"),
        ({"backbone_args": {"quantization_config": SPEC}}, r"names classes for \['backbone_args'\]"),
        ({"_class_path": "evil_module.Thing"}, "and 0 classes of this name are known"),
        ({1: 2}, "hyper_parameters that are no arguments"),
    ],
)
def test_nothing_is_imported_that_the_file_names(changes, message, forge, marker, tmp_path):
    keys = {key: value for key, value in changes.items() if isinstance(key, str)}
    file = forge(**keys)
    if len(keys) < len(changes):
        checkpoint = torch.load(file, weights_only=True)
        torch.save({**checkpoint, "hyper_parameters": changes}, file)
    with pytest.raises(ls.UsageError, match=message):
        ls.SequenceClassification.load_from_checkpoint(file)
    assert not marker.exists()
    assert "evil_module" not in sys.modules


def test_strings_and_lightnings_own_keys_import_nothing(forge, marker):
    file = forge(optimizer="evil_module.f", lr_schedule="linear", _instantiator="evil_module.f")
    checkpoint = torch.load(file, weights_only=True)
    legacy = {"hparams": {"compile": SPEC}, "module_arguments": {"compile": SPEC}, "hparams_name": "backbone_args"}
    torch.save({**checkpoint, **legacy}, file)
    loaded = ls.SequenceClassification.load_from_checkpoint(file)
    assert loaded.compile_options is None
    assert not marker.exists()


def test_hparams_files_are_no_better(forge, marker, tmp_path):
    (tmp_path / "hparams.yaml").write_text("method: {class_path: evil_module.Thing}\n")
    with pytest.raises(ls.UsageError, match="0 classes of this name"):
        ls.SequenceClassification.load_from_checkpoint(forge(), hparams_file=tmp_path / "hparams.yaml")
    (tmp_path / "hparams.yaml").write_text("method: !!python/object/apply:evil_module.f []\n")
    with pytest.raises(ls.UsageError, match="cannot be read as hyperparameters"):
        ls.SequenceClassification.load_from_checkpoint(forge(), hparams_file=tmp_path / "hparams.yaml")
    assert not marker.exists()


def test_what_the_caller_passes_wins(forge, tmp_path):
    file = forge(method=SPEC, optimizer=SPEC, warmup=0.5)
    method = ls.LoRA(["query"], rank=2)
    loaded = ls.SequenceClassification.load_from_checkpoint(file, method=method, optimizer=torch.optim.SGD, warmup=0.25)
    assert (loaded.method, loaded.optimizer, loaded.warmup) == (method, torch.optim.SGD, 0.25)


class Mine(ls.SequenceClassification):
    """A module of the user's own, known once it is imported."""

    def __init__(self, loss: nn.Module | None = None, **arguments):
        super().__init__(**arguments)


def test_a_known_subclass_is_built_and_its_objects_are_passed(forge):
    file = forge(_class_path=f"{__name__}.Mine", loss={"class_path": "torch.nn.MSELoss"})
    with pytest.raises(ls.UsageError, match=r"names classes for \['loss'\]"):
        ls.SequenceClassification.load_from_checkpoint(file)
    assert type(ls.SequenceClassification.load_from_checkpoint(file, loss=nn.MSELoss())) is Mine


def test_a_checkpoint_at_a_url_is_no_pickle_either(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "x": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(ls.UsageError, match="cannot be read as a checkpoint"):
        ls.SequenceClassification.load_from_checkpoint((tmp_path / "evil.ckpt").as_uri())
    assert not (tmp_path / "ran").exists()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SimpleHTTPRequestHandler, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(pickle.UnpicklingError):
            WholeFiles().load_checkpoint(f"http://127.0.0.1:{server.server_port}/evil.ckpt")
    finally:
        server.shutdown()
        server.server_close()
    assert not (tmp_path / "ran").exists()
