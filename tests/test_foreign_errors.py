"""The errors of other libraries are provoked, so that another wording in a new version is noticed."""

from fractions import Fraction
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

import pytest
import torch
from backbones import save_tiny_bert
from jsonargparse import ArgumentParser
from programs import run_all
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from lit_sparse.foreign_errors import (
    is_disk_full,
    is_lost_process,
    is_size_mismatch,
    lacks_model,
    refused_global,
    unknown_choice,
    unknown_class,
    unknown_key,
    without_noise,
)


def test_a_full_disk_by_torch_and_by_safetensors(small_disk):
    def by_torch():
        with (small_disk / "file").open("wb") as stream:
            torch.save({"x": torch.zeros(2**20)}, stream)

    for write in (by_torch, lambda: save_file({"x": torch.zeros(2**20)}, small_disk / "file")):
        with pytest.raises(Exception) as raised:  # noqa: PT011 - of each library's own kind
            write()
        assert is_disk_full(raised.value)
        wrapped = ValueError("not written")
        wrapped.__cause__ = raised.value
        assert is_disk_full(wrapped)
        raised = None
    assert not is_disk_full(OSError(5, "Input/output error"))
    assert not is_disk_full(None)


PEER = """
import os, sys, datetime, torch
from torch import distributed
from lit_sparse.foreign_errors import is_lost_process
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
distributed.barrier()
if rank == 1:
    os._exit(1)
try:
    for _ in range(1000):
        distributed.all_reduce(torch.ones(2**16))
except RuntimeError as error:
    print("lost" if is_lost_process(error) else repr(error))
"""


@pytest.mark.slow
def test_a_process_whose_peer_is_gone(tmp_path):
    words = [["-c", PEER, str(rank), str(tmp_path / "store")] for rank in range(2)]
    first, second = run_all(words, [{}, {}], timeout=120)
    assert first.stdout == "lost\n"
    assert second.returncode == 1


def test_other_errors_are_no_lost_process():
    assert is_lost_process(torch.distributed.DistNetworkError("of the type that NCCL raises"))
    assert not is_lost_process(RuntimeError("The size of tensor a (2) must match the size of tensor b (3)"))
    assert not is_lost_process(KeyError("connection closed"))


def test_what_torch_refuses_to_unpickle_is_named(tmp_path):
    torch.save({"x": Fraction(1, 2)}, tmp_path / "file")
    with pytest.raises(UnpicklingError) as raised:
        torch.load(tmp_path / "file", weights_only=True)
    assert "fractions.Fraction" in refused_global(raised.value)
    assert refused_global(UnpicklingError("pickle data was truncated")) is None


def test_weights_of_another_size(tmp_path):
    folder = save_tiny_bert(tmp_path / "bert", num_labels=2)
    with pytest.raises(RuntimeError) as raised:
        AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert is_size_mismatch(raised.value)
    assert not is_size_mismatch(RuntimeError("mismatch"))


def commands():
    fit = ArgumentParser(exit_on_error=False)
    fit.add_argument("--config", action="config")
    fit.add_subclass_arguments(torch.nn.Module, "model", required=True)
    fit.add_argument("--limit", type=int | float | None)
    fit.add_argument("--form", type=Literal["peft", "gguf"])
    fit.add_argument("--kind", type=Literal["full", "half"] | None)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subcommands().add_subcommand("fit", fit)
    return parser


def refusal(*words):
    with pytest.raises(Exception) as raised:  # noqa: PT011 - ArgumentError, whatever its module
        commands().parse_args(["fit", *words])
    return str(raised.value)


def test_jsonargparse_on_a_missing_model_and_unknown_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("model: torch.nn.ReLU\nlimits: {low: 3}\n")
    assert lacks_model(refusal())
    model = ("--model", "torch.nn.ReLU")
    assert unknown_key(refusal(*model, "--limits", "3")) == ("", "--limits")
    assert unknown_key(refusal("--model", "torch.nn.ReLU", "--model.inplaces", "true")) == (
        "torch.nn.ReLU",
        "inplaces",
    )
    assert unknown_key(refusal("--config", "wrong.yaml")) == ("", "limits.low")
    assert unknown_key(refusal(*model, "--limit", "many")) is None
    assert not lacks_model(refusal(*model, "--limits", "3"))


@pytest.mark.parametrize(("option", "known"), [("--form", ["peft", "gguf"]), ("--kind", ["full", "half"])])
def test_a_choice_that_jsonargparse_refuses(option, known):
    message = refusal("--model", "torch.nn.ReLU", option, "pft")
    assert unknown_choice(message) == ("pft", known)
    assert f"one of {known!r}".replace("[", "").replace("]", "") in without_noise(message)
    assert unknown_choice(refusal("--model", "torch.nn.ReLU", "--limit", "many")) is None


def test_a_class_that_jsonargparse_does_not_find():
    assert unknown_class(refusal("--model", "torch.nn.RLU")) == ("torch.nn", "RLU")
    assert unknown_class(refusal("--model", "RLU")) == ("", "RLU")
    assert unknown_class(refusal("--model", "torch.nn.ReLU", "--limit", "many")) is None


def test_the_noise_of_jsonargparse_is_left_out():
    message = refusal("--model", "torch.nn.ReLU", "--limit", "many")
    assert "Subtypes" in message
    line = without_noise(message)
    assert "\n" not in line
    assert "Subtypes" not in line
    assert "many" in line
