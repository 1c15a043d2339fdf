"""Checkpoints, folders of adapters and edits that are damaged, forged, or of another model."""

import json
import struct
from pathlib import Path

import pytest
import torch
from hostile import (
    METHOD,
    MODEL,
    Case,
    cut,
    evil,
    flipped,
    huge_header,
    make_trained_project,
    plain_pickle,
    replaced,
    require_refused,
    settings,
)
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return make_trained_project(tmp_path_factory.mktemp("project"))


CHECKPOINT = Path("kept/last.ckpt")
RESUME = ["--ckpt_path", "kept/last.ckpt", "--trainer.max_epochs", "2"]
VALIDATE = ["validate", "--config", "config.yaml", "--ckpt_path", "kept/last.ckpt"]
EXPORT = ["export", "--ckpt_path", "kept/last.ckpt", "--format", "peft", "--output", "made"]
FROM_PEFT = [f"{MODEL}start_from", "peft"]
APPLY = ["edit", "apply", "llama", "an.edit.safetensors", "--output", "made"]


def checkpoint(change):
    """The checkpoint, changed and written again."""

    def prepare():
        content = torch.load(CHECKPOINT, weights_only=True)
        change(content)
        torch.save(content, CHECKPOINT)

    return prepare


def tensors(file: str, change):
    """A file of tensors, changed and written again with what it said of itself."""

    def prepare():
        found = load_file(file)
        change(found)
        size = struct.unpack("<Q", Path(file).read_bytes()[:8])[0]
        header = json.loads(Path(file).read_bytes()[8 : 8 + size])
        save_file(found, file, header.get("__metadata__"))

    return prepare


def first(found: dict, part: str) -> str:
    return next(name for name in sorted(found) if part in name)


def halve(found):
    name = first(found, "lora_A")
    found[name] = found[name][:, :-1].clone()


def spoil(found):
    found[first(found, "lora_A")].fill_(float("nan"))


def as_integers(found):
    name = first(found, "lora_A")
    found[name] = found[name].to(torch.int64)


def in_state(change):
    return checkpoint(lambda content: change(content["state_dict"]))


PEFT = "peft/adapter_model.safetensors"
PEFT_CONFIG = "peft/adapter_config.json"
DELTA = "delta/adapter.safetensors"

REFUSED = [
    # Checkpoints.
    Case("a checkpoint cut in half", RESUME, "last.ckpt", cut("kept/last.ckpt")),
    Case("a checkpoint that lacks its last byte", RESUME, "last.ckpt", cut("kept/last.ckpt", 0.999)),
    Case("an empty checkpoint", RESUME, "last.ckpt", replaced("kept/last.ckpt", b"")),
    Case("a text named .ckpt", RESUME, "last.ckpt", replaced("kept/last.ckpt", "state_dict: {}")),
    Case("a bit of a checkpoint's data is flipped", RESUME, "last.ckpt", flipped("kept/last.ckpt", 0.3)),
    Case("a checkpoint that runs a program", VALIDATE, "last.ckpt", evil("kept/last.ckpt")),
    Case("a pickle that runs a program", VALIDATE, "last.ckpt", plain_pickle("kept/last.ckpt")),
    Case("export of a checkpoint that runs a program", EXPORT, "last.ckpt", evil("kept/last.ckpt")),
    Case("inspect of one", ["inspect", "kept/last.ckpt"], "last.ckpt", evil("kept/last.ckpt")),
    Case("a checkpoint of tensors alone", VALIDATE, "no state_dict", lambda: torch.save({"a": 1}, CHECKPOINT)),
    Case("a checkpoint that is a list", VALIDATE, "last.ckpt", lambda: torch.save([1, 2], CHECKPOINT)),
    Case("a checkpoint without an adapter", VALIDATE, "lora_A", in_state(lambda s: s.pop(first(s, "lora_A")))),
    Case(
        "a checkpoint with a layer more",
        VALIDATE,
        "layer9",
        in_state(lambda s: s.update(layer9=torch.ones(2))),
    ),
    Case("a checkpoint with a narrower matrix", VALIDATE, "lora_A", in_state(halve)),
    Case("a checkpoint of another method", [*VALIDATE, f"{MODEL}method", "lit_sparse.LoRA"], "trained with SoRA"),
    Case("a checkpoint of another rank", [*VALIDATE, f"{METHOD}rank", "5"], "rank"),
    Case("a checkpoint of other layers", [*VALIDATE, f"{METHOD}target_modules", "[query]"], "it has one at"),
    Case("a checkpoint of another backbone", [*VALIDATE, f"{MODEL}backbone", "llama"], "it has none at"),
    Case("export of half a checkpoint", EXPORT, "last.ckpt", cut("kept/last.ckpt")),
    Case("export of a checkpoint with NaN", EXPORT, "not finite", in_state(spoil)),
    Case("merge where something is", ["merge", "--ckpt_path", "kept/last.ckpt", "--output", "peft"], "peft"),
    Case("export into a file", [*EXPORT[:-1], "config.yaml"], "config.yaml"),
    # Folders of adapters.
    Case("an adapter cut in half", FROM_PEFT, "adapter_model.safetensors", cut(PEFT)),
    Case("an adapter with a huge header", FROM_PEFT, "adapter_model.safetensors", huge_header(PEFT)),
    Case("an adapter of no bytes", FROM_PEFT, "adapter_model.safetensors", replaced(PEFT, b"")),
    Case("a pickle named .safetensors", FROM_PEFT, "adapter_model.safetensors", evil(PEFT)),
    Case("an adapter without its configuration", FROM_PEFT, "adapter_config.json", lambda: Path(PEFT_CONFIG).unlink()),
    Case("an adapter without its weights", FROM_PEFT, "adapter_model", lambda: Path(PEFT).unlink()),
    Case("an adapter's configuration that is no JSON", FROM_PEFT, "adapter_config.json", replaced(PEFT_CONFIG, "{")),
    Case("an adapter's configuration that is a list", FROM_PEFT, "adapter_config.json", replaced(PEFT_CONFIG, "[]")),
    Case("an adapter of another kind", FROM_PEFT, "IA3", settings(PEFT_CONFIG, lambda c: c.update(peft_type="IA3"))),
    Case("an adapter with DoRA", FROM_PEFT, "dora", settings(PEFT_CONFIG, lambda c: c.update(use_dora=True))),
    Case("a rank that is a word", FROM_PEFT, "r", settings(PEFT_CONFIG, lambda c: c.update(r="two"))),
    Case(
        "a rank that is not the tensors'",
        FROM_PEFT,
        "rank",
        settings(PEFT_CONFIG, lambda c: c.update(r=7)),
    ),
    Case(
        "an adapter without one B",
        FROM_PEFT,
        "two matrices A and B",
        tensors(PEFT, lambda f: f.pop(first(f, "lora_B"))),
    ),
    Case("an adapter with a tensor more", FROM_PEFT, "extra", tensors(PEFT, lambda f: f.update(extra=torch.ones(1)))),
    Case("an adapter with a narrower A", FROM_PEFT, "31 features to 32", tensors(PEFT, halve)),
    Case("an adapter with NaN", FROM_PEFT, "finite", tensors(PEFT, spoil)),
    Case("an adapter of integers", FROM_PEFT, "int64", tensors(PEFT, as_integers)),
    Case("inspect of half an adapter", ["inspect", "peft"], "adapter_model.safetensors", cut(PEFT)),
    Case("inspect of half a sparse folder", ["inspect", "sparse"], "sparse", cut("sparse/adapter.safetensors")),
    Case("inspect of half a delta", ["inspect", "delta"], "delta", cut(DELTA)),
    # Edits.
    Case("an edit cut in half", APPLY, "an.edit", cut("an.edit.safetensors")),
    Case("an edit with a huge header", APPLY, "an.edit", huge_header("an.edit.safetensors")),
    Case("an edit that is a pickle", APPLY, "an.edit", evil("an.edit.safetensors")),
    Case("an edit of a model that has no such layers", [*APPLY[:2], "bert", *APPLY[3:]], "another model"),
    Case("an edit without its values", APPLY, "an.edit", tensors("an.edit.safetensors", lambda f: f.pop(sorted(f)[0]))),
    Case("an adapter in the place of an edit", [*APPLY[:3], PEFT, *APPLY[4:]], "adapter_model"),
    Case("two edits of one name", [*APPLY[:3], "an.edit.safetensors", *APPLY[3:]], "an.edit"),
    Case("remove of an edit that is not there", ["edit", "remove", "llama", "x", "--output", "made"], "llama"),
    Case("remove of a name that is a path", ["edit", "remove", "llama", "../x", "--output", "made"], "llama"),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_it_is_refused(case):
    require_refused(case)
    assert not Path("pickle-was-run").exists()
    assert not Path("made").exists()
