"""The Editor as it is used: under a Trainer and from the command line, killed and resumed, in two processes."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import programs
import pytest
import torch
import yaml
from backbones import save_tiny_llama
from projects import read_lines
from transformers import AutoModelForCausalLM

import lit_sparse as ls
from lit_sparse.cli.main import main
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.edits import EditedModel, load_edit
from lit_sparse.editing.teacher_forcing import collate, encode
from lit_sparse.editing.training import train
from lit_sparse.editing.writing import Writer
from lit_sparse.errors import UsageError

METHOD = ls.RoseLoRA(["v_proj", "down_proj"], rank=4, alpha=16, density=0.2, begin=1, end=4)
WORDS = ["cat", "dog", "river", "film", "house", "city", "man", "tree"]


def adam(parameters):
    return torch.optim.Adam(parameters, lr=3e-2)


def records(count: int) -> list[dict]:
    found = []
    for i in range(count):
        word, other = WORDS[i % 8], WORDS[(i + 3) % 8]
        found.append(
            {
                "prompt": f"the {word} {i} is",
                "target_new": f"a {other}",
                "subject": word,
                "rephrase": f"a {word} {i}: it is",
                "portability": {
                    "Reasoning": [{"prompt": f"who saw the {other}", "ground_truth": [["no one", "a man"]]}]
                },
                "locality": {"Forgetfulness": [{"prompt": "the plot was", "ground_truth": "very dull"}]},
            }
        )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("editing")
    save_tiny_llama(place / "llama")
    (place / "edits.json").write_text(json.dumps(records(20)))
    (place / "texts.jsonl").write_text('{"text": "the man saw the river"}\n')
    return place


def edit(folder, output="out", method=METHOD, data=None, trainer=None, **arguments) -> ls.Editor:
    settings = {
        "steps": 6,
        "optimizer": adam,
        "stop_loss": None,
        "fluency_tokens": 4,
        "generated_tokens": 0,
        **arguments,
    }
    editor = ls.Editor(str(folder / "llama"), method, output, **settings)
    L.Trainer(
        inference_mode=False,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        **(trainer or {}),
    ).test(editor, ls.EditingData(**{"path": str(folder / "edits.json"), "limit": 4, **(data or {})}), verbose=False)
    return editor


def bits(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().view(torch.int32) for name, p in model.named_parameters()}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def plain(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype="float32").eval()


def test_what_a_run_leaves(folder):
    editor = edit(folder, texts=str(folder / "texts.jsonl"), save_edits=True, generated_tokens=4)
    assert same(bits(editor.model), bits(plain(folder)))
    rows = read_lines("out/results.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert rows[0]["prompt"] == "the cat 0 is"
    names = {
        "index", "prompt", "target_new", "steps", "loss", "changed", "changed_share", "edit_success", "rephrase",
        "portability", "portability/Reasoning", "portability_first_name", "portability_first_name/Reasoning",
        "locality", "locality/Forgetfulness", "fluency", "perplexity", "generated_success", "generated_rephrase",
        "generated_portability", "generated_portability/Reasoning", "generated_locality",
        "generated_locality/Forgetfulness", "contained_success", "contained_rephrase", "contained_portability",
        "contained_portability/Reasoning",
    }  # fmt: skip
    assert set(rows[0]) == names
    assert all(row["steps"] == 6 and 0 < row["changed"] < 0.16 * 2 * (16 + 64) * 32 for row in rows)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary == editor.summary
    assert summary["figures"]["edit_success"]["mean"] == pytest.approx(sum(r["edit_success"] for r in rows) / 4)
    assert summary["figures"]["perplexity"]["requests"] == 4
    assert summary["figures"]["edit_success"]["mean"] > 0.5, "the edits should have worked"
    times = read_lines("out/timings.jsonl")
    assert all(0 < time["step_seconds"] <= time["seconds"] for time in times)
    # What the rows say is true of a plain model with the edit in it.
    saved = load_edit("out/edits/000002.safetensors")
    assert saved.requests[0].prompt == rows[2]["prompt"]
    assert saved.metrics[0]["edit_success"] == rows[2]["edit_success"]
    model = plain(folder)
    EditedModel(model).add(saved)
    tokenizer = load_tokenizer(str(folder / "llama"))
    (text,) = Writer(model, tokenizer, 1, 4).answers([rows[2]["prompt"]])
    assert rows[2]["generated_success"] == float(text == rows[2]["target_new"])
    same_options = {"texts": str(folder / "texts.jsonl"), "generated_tokens": 4}
    again = edit(folder, "again", data={"first": 2, "limit": 1}, **same_options)
    assert read_lines("again/results.jsonl") == [rows[2]], "an edit does not depend on those before it"
    assert same(bits(again.model), bits(plain(folder)))


def test_random_answers_are_the_same_in_every_run(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "sharp")
    model = plain(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # few words are likely
    model.save_pretrained(tmp_path / "sharp/llama")
    options = {"generated_tokens": 2, "generated_samples": 8}
    edit(tmp_path / "sharp", data={"side_by_side": 1}, **options)  # alone, for rounding differs side by side
    rows = read_lines("out/results.jsonl")
    assert all(8 * row["sampled_success"] == round(8 * row["sampled_success"]) for row in rows)
    assert any(0 < row["sampled_contained_success"] < 1 for row in rows)
    assert all(row["sampled_success"] <= row["sampled_contained_success"] for row in rows)
    assert not [name for name in rows[0] if name.startswith("sampled") and "locality" in name]
    edit(tmp_path / "sharp", "again", data={"first": 2, "limit": 1}, eval_batch_size=1, **options)
    assert read_lines("again/results.jsonl") == [rows[2]]


@pytest.mark.parametrize(
    "method",
    [
        ls.LoRA(["q_proj"], rank=2),
        ls.SoRA(["q_proj"], rank=2, threshold=1e-3),
        ls.FineTuning(["q_proj"]),
        ls.UltraEdit(["q_proj"]),
    ],
    ids=["lora", "sora", "fine-tuning", "ultraedit"],
)
def test_baselines(folder, method):
    editor = edit(folder, method=method, data={"limit": 2})
    assert same(bits(editor.model), bits(plain(folder)))
    assert [row["changed_share"] > 0.5 for row in read_lines("out/results.jsonl")] == [True, True]


def test_prompts_with_any_ends_of_lines_are_resumed(folder):
    odd = [{**record, "prompt": f"{record['prompt']}\u2028so\x85so"} for record in records(2)]
    Path("odd.json").write_text(json.dumps(odd))
    edit(folder, data={"path": "odd.json"})
    before = Path("out/results.jsonl").read_bytes()
    edit(folder, data={"path": "odd.json"})
    assert Path("out/results.jsonl").read_bytes() == before
    assert [json.loads(line)["prompt"] for line in before.split(b"\n")[:-1]] == [record["prompt"] for record in odd]


def test_edits_side_by_side_are_those_of_one_after_another(folder):
    edit(folder, "whole", data={"limit": 6})
    stop_loss = 1.0001 * sorted(row["loss"] for row in read_lines("whole/results.jsonl"))[2]  # where three get to
    for number in (1, 4):
        edit(folder, f"{number}", data={"limit": 6, "side_by_side": number}, stop_loss=stop_loss, save_edits=True)
    one, many = (read_lines(f"{number}/results.jsonl") for number in (1, 4))
    assert len({row["steps"] for row in one}) > 1
    for a, b in zip(one, many, strict=True):
        assert a.pop("loss") == pytest.approx(b.pop("loss"), rel=1e-5)
        assert a == pytest.approx(b)
    for file in Path("1/edits").iterdir():
        patches = [load_edit(folder / file.name).patch for folder in (Path("1/edits"), Path("4/edits"))]
        assert patches[0].keys() == patches[1].keys()
        for name, entries in patches[0].items():
            assert torch.equal(entries.places, patches[1][name].places)
            torch.testing.assert_close(entries.values, patches[1][name].values, rtol=1e-4, atol=1e-5)


def test_several_at_once(folder):
    edit(folder, data={"batch_size": 3}, save_edits=True)
    rows = read_lines("out/results.jsonl")
    assert [row["index"] for row in rows] == [0, 1, 2, 3]
    assert len({row["changed"] for row in rows[:3]}) == 1
    assert [file.name for file in sorted(Path("out/edits").iterdir())] == ["000000.safetensors", "000003.safetensors"]
    assert len(load_edit("out/edits/000000.safetensors").requests) == 3


def test_breadth_first(folder):
    """Three requests, of which two and one take turns."""
    editor = edit(folder, data={"batch_size": 3}, requests_per_step=2, steps=7, save_edits=True)
    rows = read_lines("out/results.jsonl")
    assert [row["steps"] for row in rows] == [7] * 4
    found = load_edit("out/edits/000000.safetensors")
    assert len(found.requests) == 3
    tokenizer = load_tokenizer(str(folder / "llama"))
    facts = [(request.prompt, request.target_new) for request in found.requests]
    turns = [collate(tokenizer, encode(tokenizer, part)) for part in (facts[:2], facts[2:])]
    torch.manual_seed(0)
    expected = train(editor.model, turns, METHOD, 7, adam, None)
    assert expected.loss == rows[0]["loss"]
    assert found.patch.keys() == expected.patch.keys()
    for name, entries in expected.patch.items():
        assert torch.equal(found.patch[name].values, entries.values)


def test_twenty_edits_in_sequence_are_those_of_their_files(folder):
    after = {}

    class Keep(L.Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            after[batch_idx] = {name: value.clone() for name, value in bits(pl_module.model).items()}

    editor = edit(
        folder, data={"limit": 20, "side_by_side": 1}, sequential=True, retest_every=8, trainer={"callbacks": [Keep()]}
    )
    assert same(bits(editor.model), bits(plain(folder)))
    model = plain(folder)
    edited = EditedModel(model)
    files = sorted(Path("out/edits").iterdir())
    assert len(files) == 20
    for i, file in enumerate(files):
        edited.add(load_edit(file))
        assert same(bits(model), after[i])
    retention = read_lines("out/retention.jsonl")
    assert [row["after"] for row in retention] == [8, 16, 20]
    assert all(len(row["each"]) == row["after"] for row in retention)
    rows = read_lines("out/results.jsonl")
    # Measured right after each edit; the last of them is measured again at once.
    assert retention[0]["each"][7] == rows[7]["edit_success"]
    assert retention[-1]["edit_success"] == pytest.approx(sum(retention[-1]["each"]) / 20)
    edited.restore()
    assert same(bits(model), bits(plain(folder)))


def test_in_sequence_locality_is_against_the_model_before_all_edits(folder):
    edit(folder, data={"limit": 6}, sequential=True, method=ls.LoRA(["q_proj", "v_proj"], rank=2))
    last = read_lines("out/retention.jsonl")[-1]
    rows = read_lines("out/results.jsonl")
    assert last["after"] == 6
    assert rows[-1]["locality"] == pytest.approx(last["locality"]), "all records ask the same unrelated question"


def test_wrong_arguments(folder):
    for arguments, message in (
        ({"steps": 0}, "steps must be at least 1; got 0"),
        ({"fluency_tokens": -1}, "fluency_tokens must be at least 0"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"stop_loss": 0.0}, "stop_loss must be above 0; got 0.0"),
        ({"generated_tokens": -1}, "generated_tokens must be at least 0"),
        ({"generated_samples": -1}, "generated_samples must be at least 0"),
        (
            {"generated_tokens": 0, "generated_samples": 2},
            "generated_samples is for generated answers: set generated_tokens",
        ),
        ({"generated_tokens": 0, "chat_template": True}, "chat_template is for generated answers: set generated"),
        ({"retest_every": 2}, "retest_every .* set sequential to true"),
        ({"sequential": True, "retest_every": 0}, "retest_every must be at least 1; got 0"),
    ):
        with pytest.raises(UsageError, match=message):
            ls.Editor("x", METHOD, "out", **arguments)
    with pytest.raises(UsageError, match="give tokenizer"):
        ls.Editor(plain(folder), METHOD, "out")
    for method in (ls.LoRA(["q_proj"], rank=2, init_weights="gora"), ls.SHiRA(["q_proj"], mask="gradient")):
        with pytest.raises(UsageError, match="starts from training batches, and an edit has none"):
            ls.Editor("x", method, "out")


def test_trainers_that_cannot_edit(folder):
    editor = ls.Editor(str(folder / "llama"), METHOD, "out")
    data = ls.EditingData(str(folder / "edits.json"))
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    with pytest.raises(UsageError, match="inference_mode to false"):
        L.Trainer(**quiet).test(editor, data)
    with pytest.raises(UsageError, match="bf16-true is not for edits: use 32-true"):
        L.Trainer(inference_mode=False, precision="bf16-true", **quiet).test(editor, data)
    with pytest.raises(UsageError, match="needs an EditingData for its requests; got NoneType"):
        L.Trainer(inference_mode=False, **quiet).test(editor, torch.utils.data.DataLoader([1]))


def test_another_run_in_the_same_folder_is_refused(folder):
    edit(folder)
    before = Path("out/results.jsonl").read_bytes()
    with pytest.raises(UsageError, match=r"steps was 6 and is 7\. Name another output"):
        edit(folder, steps=7)
    assert Path("out/results.jsonl").read_bytes() == before
    others = Path("edits.json")
    others.write_text(json.dumps(records(20)))
    edit(folder, "others", data={"path": str(others)})
    others.write_text(json.dumps(records(19)))
    with pytest.raises(UsageError, match="requests was"):
        edit(folder, "others", data={"path": str(others)})
    edit(folder, data={"limit": 5})  # more of the same goes on
    assert [row["index"] for row in read_lines("out/results.jsonl")] == [0, 1, 2, 3, 4]


def test_a_built_model_under_bf16_autocast(folder):
    model = plain(folder)
    settings = {"steps": 4, "optimizer": adam, "fluency_tokens": 0, "tokenizer": str(folder / "llama")}
    editor = ls.Editor(model, METHOD, "out", **settings)
    trainer = L.Trainer(
        inference_mode=False, accelerator="cpu", precision="bf16-mixed", logger=False, enable_progress_bar=False,
        enable_checkpointing=False,
    )  # fmt: skip
    trainer.test(editor, ls.EditingData(str(folder / "edits.json"), limit=2), verbose=False)
    assert len(read_lines("out/results.jsonl")) == 2
    assert same(bits(model), bits(plain(folder)))
    assert trainer.callback_metrics["edit_success"] == pytest.approx(editor.summary["figures"]["edit_success"]["mean"])


def test_answers_in_chat_format(folder, tmp_path):
    with pytest.raises(UsageError, match=r"chat_template is true, and the tokenizer .* has none"):
        edit(folder, generated_tokens=4, chat_template=True)
    save_tiny_llama(tmp_path / "llama")
    tokenizer = load_tokenizer(str(tmp_path / "llama"))
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "llama")
    (tmp_path / "edits.json").write_text(json.dumps([{"prompt": "the dog", "target_new": "was"}]))
    options = {"data": {"path": "edits.json"}, "generated_tokens": 4, "save_edits": True}
    edit(tmp_path, "plain", **options)
    edit(tmp_path, "chat", chat_template=True, **options)
    model = plain(folder)
    EditedModel(model).add(load_edit("chat/edits/000000.safetensors"))
    texts = Writer(model, tokenizer, 1, 4).answers(["the dog", "user: the dog"])
    found = [read_lines(f"{name}/results.jsonl")[0]["contained_success"] for name in ("plain", "chat")]
    assert found == [float("was" in text.split()) for text in texts] == [1, 0]


# The command line.


def config(folder, file="edit.yaml", **changes) -> str:
    rose = {"rank": 4, "alpha": 16, "density": 0.2, "begin": 1, "end": 4}
    rose["target_modules"] = ["v_proj", "down_proj"]
    model = {
        "backbone": str(folder / "llama"),
        "method": {"class_path": "lit_sparse.RoseLoRA", "init_args": rose},
        "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 3e-2}},
        "output": "runs/cli",
        "steps": 6,
        "fluency_tokens": 4,
        "generated_tokens": 0,
        **changes,
    }
    data = {"path": str(folder / "edits.json"), "limit": 12, "side_by_side": 3}
    content = {
        "model": {"class_path": "lit_sparse.Editor", "init_args": model},
        "data": {"class_path": "lit_sparse.EditingData", "init_args": data},
        "trainer": {"accelerator": "cpu", "enable_progress_bar": False},
    }
    Path(file).write_text(yaml.safe_dump(content))
    return file


COMMAND = ["-m", "lit_sparse", "edit"]
LEAST_SQUARES = {
    "method": {
        "class_path": "lit_sparse.UltraEdit",
        "init_args": {"target_modules": ["down_proj"], "normalization": "turn", "lr": 1e-3, "density": 0.3},
    },
    "anchors": {"weight": 100.0, "of_subject": 0, "general": 4},
}


def command(*words: str, code: int = 0) -> str:
    done = programs.run([*COMMAND, *words])
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def two_processes(file: str, *words: str) -> subprocess.CompletedProcess[str]:
    own = ["--config", file, "--trainer.devices=2", "--trainer.strategy=ddp", *words]
    return programs.launch(2, [*COMMAND, *own])


def killed_after(rows: int, file: str) -> Path:
    """Start a run into runs/killed, and kill it when so many requests are measured."""
    process = programs.Program([*COMMAND, "--config", file, "--model.init_args.output=runs/killed"])
    part = Path("runs/killed/parts/0.jsonl")
    while not (part.exists() and part.read_bytes().count(b"\n") >= rows):
        time.sleep(0.01)
        assert process.poll() is None, "it should have been killed before its end"
    process.kill()
    process.wait()
    return part


def test_inspect_lists_what_an_edit_adapts(folder, capsys):
    main(["inspect", "--config", config(folder)])
    out = capsys.readouterr().out
    assert "Adapted: 4 layers" in out
    assert "model.layers.*.mlp.down_proj" in out
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", "--config", config(folder, method={"class_path": "lit_sparse.FineTuning"})])
    assert capsys.readouterr().err.endswith("error: inspect lists adapters, but FineTuning uses none.\n")


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, LEAST_SQUARES], ids=["adapters", "ultraedit"])
def test_the_command_killed_and_resumed_and_in_two_processes(folder, options):
    file = config(folder, **options)
    out = command("--config", file)
    assert "edit_success" in out
    assert "Wrote runs/cli." in out
    assert sorted(p.name for p in Path("runs/cli").iterdir()) == [
        "config.yaml", "parts", "results.jsonl", "run.json", "summary.json", "timings.jsonl",
    ]  # fmt: skip
    undisturbed = Path("runs/cli/results.jsonl").read_bytes()

    part = killed_after(5, file)
    assert part.read_text().count("\n") < 12
    with part.open("ab") as stream:
        stream.write('{"index": 9, "prompt": "é'.encode()[:-1])  # as a kill in the middle of a letter would leave it
    kept = part.read_bytes().split(b"\n")[:5]
    command("--config", file, "--model.init_args.output=runs/killed")
    assert Path("runs/killed/results.jsonl").read_bytes() == undisturbed
    assert part.read_bytes().split(b"\n")[:5] == kept, "what was measured is not measured again"

    done = two_processes(file, "--model.init_args.output=runs/two")
    assert done.returncode == 0, done.stderr
    assert [len(read_lines(f"runs/two/parts/{rank}.jsonl")) for rank in (0, 1)] == [6, 6]
    assert Path("runs/two/results.jsonl").read_bytes() == undisturbed


@pytest.mark.slow
def test_processes_that_edit_do_not_share_gradients(folder):
    spiel = {"target_modules": ["v_proj"], "changed": 0.1, "update_every": 2, "window": 2}
    file = config(folder, method={"class_path": "lit_sparse.SpIEL", "init_args": spiel})
    command("--config", file)
    done = two_processes(file, "--model.init_args.output=runs/two")
    assert done.returncode == 0, done.stderr
    assert Path("runs/two/results.jsonl").read_bytes() == Path("runs/cli/results.jsonl").read_bytes()


@pytest.mark.slow
def test_a_sequence_killed_and_resumed(folder):
    file = config(folder, sequential=True, retest_every=5)
    command("--config", file)
    killed_after(7, file)
    command("--config", file, "--model.init_args.output=runs/killed")
    for name in ("results.jsonl", "retention.jsonl"):
        assert (Path("runs/killed") / name).read_bytes() == (Path("runs/cli") / name).read_bytes()
    for edit_file in Path("runs/cli/edits").iterdir():
        assert edit_file.read_bytes() == (Path("runs/killed/edits") / edit_file.name).read_bytes()


@pytest.mark.slow
def test_edits_are_listed_applied_and_removed(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])

    def own(*words: str) -> str:
        """The command in this process, for each start of Python takes seconds."""
        capsys.readouterr()
        main(["edit", *words])
        return capsys.readouterr().out

    command("--config", config(folder, save_edits=True), "--data.init_args.limit=3")
    listed = own("list", "runs/cli/edits")
    assert [line.split()[0] for line in listed.splitlines()] == [
        "edit", "000000.safetensors", "000001.safetensors", "000002.safetensors",
    ]  # fmt: skip
    assert "the cat 0 is → a film" in listed
    out = command("apply", str(folder / "llama"), "runs/cli/edits", "--output", "edited")
    assert "Wrote edited, with 3 edits in it." in out
    expected = EditedModel(plain(folder))
    for file in sorted(Path("runs/cli/edits").iterdir()):
        expected.add(load_edit(file))
    load = AutoModelForCausalLM.from_pretrained
    assert same(bits(load("edited", dtype="float32")), bits(expected.model))
    assert own("list", "edited") == listed

    own("remove", "edited", "000001.safetensors", "--output", "less")
    expected = EditedModel(plain(folder))
    for number in (0, 2):
        expected.add(load_edit(f"runs/cli/edits/00000{number}.safetensors"))
    assert same(bits(load("less", dtype="float32")), bits(expected.model))
    own("apply", "less", "runs/cli/edits/000001.safetensors", "--output", "more")
    assert [line.split()[0] for line in own("list", "more").splitlines()[1:]] == [
        "000000.safetensors", "000001.safetensors", "000002.safetensors",
    ]  # fmt: skip
    own("remove", "more", "000000.safetensors", "000001.safetensors", "000002.safetensors", "--output", "none")
    assert same(bits(load("none", dtype="float32")), bits(plain(folder)))
    assert not Path("none/edits").exists()

    for words, message in (
        (["apply", "edited", "runs/cli/edits/000001.safetensors", "--output", "x"], "'000001.safetensors' would be in"),
        (["remove", "edited", "nope", "--output", "x"], "has no edit 'nope' in it; it has ['000000"),
        (
            ["apply", str(folder / "llama"), "absent", "--output", "x"],
            "'absent' is neither an edit nor a folder of edits",
        ),
        (["apply", str(folder / "llama"), "runs/cli/edits", "--output", "edited"], "is not empty"),
        (["apply", str(folder / "llama"), "runs/cli/edits"], "the following arguments are required: output"),
        (["list", "edited", "--nope"], "unrecognized arguments: --nope"),
        (["remove", str(folder / "llama"), "a", "--output", "x"], "has no edit 'a' in it; it has []"),
    ):
        with pytest.raises(SystemExit) as end:
            own(*words)
        assert end.value.code == (2 if "arguments" in message else 1)
        last = capsys.readouterr().err.strip().splitlines()[-1]  # other packages have things to say before it
        assert last.startswith("error: ")
        assert message in last
    assert not Path("x").exists()


@pytest.mark.slow
def test_sequences_need_one_process(folder):
    file = config(folder, sequential=True)
    few = two_processes(file, "--data.init_args.limit=1", "--model.init_args.sequential=false")
    assert few.returncode != 0
    assert "error: There are 1 edits to make of 1 requests, and 2 processes: use fewer processes." in few.stderr
    done = two_processes(file)
    assert done.returncode != 0
    assert "error: Edits in sequence build upon each other: use one process, devices=1." in done.stderr
