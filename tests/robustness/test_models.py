"""Backbones that are damaged, half there, of another kind, or that ask for code of their own."""

import json
from pathlib import Path

import pytest
import torch
from hostile import (
    DATA,
    MODEL,
    Case,
    evil,
    huge_header,
    replaced,
    require_refused,
    run,
    settings,
    whole,
)
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "bert/model.safetensors", "bert/config.json"
QUERY = "bert.encoder.layer.0.attention.self.query.weight"


def weights(change):
    def prepare():
        found = load_file(WEIGHTS)
        change(found)
        save_file(found, WEIGHTS, {"format": "pt"})

    return prepare


def pickled():
    Path(WEIGHTS).unlink()
    evil("bert/pytorch_model.bin")()


def more_words():
    content = json.loads(Path("bert/tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["film"] = 10_000
    Path("bert/tokenizer.json").write_text(json.dumps(content))


def own_code():
    Path("bert/own.py").write_text("import os\nos.mkdir('code-was-run')\n")
    settings(
        CONFIG, lambda c: c.update(auto_map={"AutoModelForSequenceClassification": "own.Model"}, model_type="own")
    )()


def spoil(found):
    found[QUERY].fill_(float("nan"))


REFUSED = [
    Case("weights cut in half", [], "bert", replaced(WEIGHTS, b"\x10\0\0\0\0\0\0\0{}")),
    Case("weights of no bytes", [], "bert", replaced(WEIGHTS, b"")),
    Case("weights with a huge header", [], "bert", huge_header(WEIGHTS)),
    Case("no weights", [], "bert", lambda: Path(WEIGHTS).unlink()),
    Case("weights that are a pickle of a program", [], "GLOBAL posix.mkdir", pickled),
    Case(
        "a layer's weights are missing",
        [],
        "query.weight",
        weights(lambda f: f.pop("bert.encoder.layer.0.attention.self.query.weight")),
    ),
    Case(
        "weights of another size",
        [],
        "bert",
        weights(lambda f: f.update({QUERY: torch.ones(3, 3)})),
    ),
    Case("weights with NaN", [], "NaN", weights(spoil)),
    Case("no configuration", [], "bert", lambda: Path(CONFIG).unlink()),
    Case("a configuration that is no JSON", [], "bert", replaced(CONFIG, "{")),
    Case("a configuration that is a list", [], "bert", replaced(CONFIG, "[]")),
    Case("an architecture that nobody knows", [], "bert", settings(CONFIG, lambda c: c.update(model_type="berrt"))),
    Case("a model that brings its own code", [], "bert", own_code),
    Case("more heads than fit", [], "bert", settings(CONFIG, lambda c: c.update(num_attention_heads=7))),
    Case("a tokenizer with more words than the model", [], "10000", more_words),
    Case("a tokenizer that is a file", [f"{DATA}tokenizer", "data/train.csv"], "is a file"),
    Case("a quickstart model that there is not", [f"{MODEL}backbone", "quickstart://bert"], "quickstart://bert"),
    Case("arguments that nobody knows", [f"{MODEL}backbone_args", "{dtipe: float32}"], "dtipe"),
    Case("a dtype that there is not", [f"{MODEL}backbone_args", "{dtype: float33}"], "float33"),
    Case("quantization of no kind", [f"{MODEL}backbone_args", "{quantization_config: {a: 1}}"], "quant_method"),
    Case(
        "a language model without text to learn",
        ["--model", "lit_sparse.CausalLM", f"{MODEL}backbone", "llama"],
        "label for every token",
    ),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.what)
def test_it_is_refused(case):
    require_refused(case)
    assert not Path("code-was-run").exists()
    assert not Path("pickle-was-run").exists()


def test_a_part_that_the_files_do_not_have_starts_at_random_and_is_named():
    weights(lambda found: [found.pop(name) for name in list(found) if "pooler" in name])()
    with pytest.warns(UserWarning, match="'bert' has no weights for .*bert.pooler.dense.weight.*train_head"):
        assert run(whole([])).status == 0
