"""``lit-sparse export`` and ``lit-sparse merge``: from a checkpoint alone to folders that others load."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import peft
import programs
import pytest
import torch
from backbones import (
    build_tiny,
    save_tiny_bert,
    save_tiny_gpt2,
    save_tiny_llama,
    save_tiny_t5,
    save_tiny_vit,
    save_tiny_wav2vec2,
)
from lightning.pytorch import Trainer
from projects import write_config
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from trained import save_checkpoint
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertForMaskedLM,
    BertForSequenceClassification,
)

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.cli.main import COMMANDS, main
from lit_sparse.editing.edits import Edit
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.serving.from_checkpoint import restore

METHOD = ls.SoRA(rank=2, threshold=0.1)
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a backbone, and ``kept/last.ckpt`` of a run from the command line."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_bert(folder / "bert")
    for split, count in (("train", 64), ("validation", 16)):
        rows = [[("a good film", "a bad film", "so so")[i % 3], ("yes", "no", "maybe")[i % 3]] for i in range(count)]
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *rows])
    method = {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 4, "sparsity_weight": 6.0, "gate_lr": 0.05}}
    model = {"class_path": "lit_sparse.SequenceClassification"}
    model["init_args"] = {"backbone": str(folder / "bert"), "method": method}
    data = {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": str(folder), "batch_size": 8}}
    kept = {"dirpath": str(folder / "kept"), "filename": "last", "monitor": "val_accuracy", "mode": "max"}
    callbacks = [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}]
    config = write_config(folder / "config.yaml", model, data, 0.01, max_epochs=2, callbacks=callbacks, logger=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lit-sparse"])
        patch.chdir(folder)
        main(["fit", "--config", config])
    return folder


@pytest.fixture
def checkpoint(project):
    return str(project / "kept" / "last.ckpt")


@pytest.fixture(scope="module")
def expected(project):
    """Logits of the run, and how much remains of its adapters."""
    module = ls.SequenceClassification.load_from_checkpoint(project / "kept" / "last.ckpt", map_location="cpu")
    ranks = {layer.name: layer.rank for layer in layer_sparsity(module.model)}
    assert 0 < sum(ranks.values()) < 4 * len(ranks)  # some are pruned, not all
    return logits(module.model)


@pytest.fixture
def refuse(capsys):
    """Run the command line and give back the one line in which it refuses, with its status."""

    def run(*args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main(list(args))
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        return exit_info.value.code, error[0]

    return run


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def base(project):
    return AutoModelForSequenceClassification.from_pretrained(
        project / "bert", num_labels=3, ignore_mismatched_sizes=True
    )


TITLES = ("Checkpoint", "Exported folders", "Edits")


def keys_in(text):
    """The names in the first columns of the tables of a page."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.MULTILINE)
    return {name for row in rows for name in re.findall(r"`(\w+)`", row)}


# From a run of the command line to every format.


@pytest.mark.slow
def test_every_format_is_written_and_loads_back(project, checkpoint, expected, capsys):
    for form in ("peft", "sparse", "delta", "merged"):
        main(["export", "--ckpt_path", checkpoint, "--format", form, "--output", f"out/{form}"])
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Wrote"))
        pattern = rf"Wrote out/{form} \({form}\): [\d,]+ bytes of weights; step 8 of 16, sparsity not final, "
        pattern += r"[\d,]+ parameters in \d+ of \d+ ranks, [\d.]+ % of the adapted weights changed; "
        pattern += r"99 parameters trained whole\."
        assert re.match(pattern, line)
        difference, tolerance = re.search(r"live model's by (\S+) at most \(tolerance (\S+)\)", line).groups()
        assert float(difference) < 1e-6 < float(tolerance) < 1e-3
        card = Path(f"out/{form}/README.md").read_text()
        assert re.search(r"\| val_accuracy \| [01]\.?\d* \|", card)
        assert "| val_accuracy, best of the run |" in card
        assert "| sparsity_weight | `6.0` |" in card

    loaded = {
        "peft": peft.PeftModel.from_pretrained(base(project), "out/peft"),
        "merged": AutoModelForSequenceClassification.from_pretrained("out/merged"),
    }
    for form in ("sparse", "delta"):
        loaded[form] = base(project)
        ls.load_adapter(loaded[form], f"out/{form}")
    for model in loaded.values():
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    assert loaded["merged"].config.id2label == {0: "maybe", 1: "no", 2: "yes"}
    assert AutoTokenizer.from_pretrained("out/merged")("a good film").input_ids


@pytest.mark.slow
def test_the_page_on_formats_names_what_the_files_hold(checkpoint):
    page = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")
    stored, described, edit = (page.split(f"\n## {title}\n")[1].split("\n## ")[0] for title in TITLES)
    assert keys_in(stored) == set(torch.load(checkpoint, weights_only=True)["lit_sparse"])
    found, forms = set(), ("peft", "sparse", "delta", "merged")
    for form in forms:
        main(["export", "--ckpt_path", checkpoint, "--format", form, "--output", f"out/{form}"])
        found |= set(json.loads(Path(f"out/{form}/lit_sparse.json").read_text()))
    main(["combine", "out/delta", "out/delta", "--output", "out/sum"])
    found |= set(json.loads(Path("out/sum/lit_sparse.json").read_text()))
    assert keys_in(described.split("`lit_sparse.json`")[1]) == found
    for form in forms:
        (file,) = Path(f"out/{form}").glob("*.safetensors")
        assert re.search(rf"^\| `{form}` \| `{file.name}`", described, re.MULTILINE)
    ends = {"sparse": r"\.lora_(A|B_t)(\.indices|\.values)?", "delta": r"\.weight\.(places|values)"}
    for form, end in ends.items():
        names = load_file(f"out/{form}/adapter.safetensors")
        assert all(re.search(f"^head\\.|{end}$", name) for name in names)
    Edit(patch={}).save("edit.safetensors")
    with safe_open("edit.safetensors", "pt") as kept:
        assert set(json.loads(kept.metadata()["lit_sparse_edit"])) <= set(re.findall(r"`(\w+)`", edit))


def test_merge_is_an_export_of_the_whole_model(checkpoint, expected, capsys):
    main(["merge", "--ckpt_path", checkpoint, "--output", "whole", "--dtype", "bfloat16"])
    assert "Wrote whole (merged)" in capsys.readouterr().out
    model = AutoModelForSequenceClassification.from_pretrained("whole", dtype="auto")
    assert model.dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), expected, rtol=0, atol=0.1)


def test_options_reach_the_export(project, checkpoint, expected):
    options = ["--layout", "ragged", "--with_head", "false", "--license", "mit", "--tolerance", "1e-3"]
    main(["export", "--ckpt_path", checkpoint, "--output", "lora", *options])
    config = json.loads(Path("lora/adapter_config.json").read_text())
    assert len(config["target_modules"]) < 13  # layers without a rank are left out
    assert config["modules_to_save"] is None
    assert "license: mit" in Path("lora/README.md").read_text()


def test_a_backbone_that_was_moved(project, checkpoint, expected, refuse, tmp_path):
    shutil.copytree(project / "bert", tmp_path / "elsewhere")
    read = checkpoints.read(checkpoint)
    read[checkpoints.KEY]["backbone"] = "/not/here/bert"
    torch.save(read, "moved.ckpt")
    status, error = refuse("export", "--ckpt_path", "moved.ckpt", "--output", "out")
    assert status == 1
    assert "'/not/here/bert' does not exist" in error
    assert "If the backbone was moved, give its place as backbone" in error
    main(["export", "--ckpt_path", "moved.ckpt", "--output", "out", "--backbone", str(tmp_path / "elsewhere")])
    loaded = peft.PeftModel.from_pretrained(base(project), "out")
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_another_backbone_is_named_as_the_cause(project, checkpoint, refuse, tmp_path):
    llama = str(save_tiny_llama(tmp_path / "llama"))
    _, error = refuse("merge", "--ckpt_path", checkpoint, "--output", "out", "--backbone", llama)
    assert f"it was trained on {str(project / 'bert')!r}, this is {llama!r}" in error
    assert "Give the backbone that it was trained on." in error
    assert "use the same arguments" not in error


# Truncated to a budget.


@pytest.fixture
def dense(project, tmp_path):
    """A checkpoint of a dense LoRA, and its module."""
    module = ls.SequenceClassification(str(project / "bert"), ls.LoRA(rank=4), num_labels=3)
    return save_checkpoint(module, tmp_path / "dense.ckpt"), module


@pytest.mark.parametrize(("budget", "parameters"), [("0.1", 384), ("1k", 1000), ("3kB", 750)])
def test_a_budget_truncates_the_adapters_before_the_export(budget, parameters, project, dense, capsys):
    checkpoint, module = dense
    before = logits(module.model)
    main(["export", "--ckpt_path", checkpoint, "--output", "lora", "--layout", "ragged", "--budget", budget])
    ranks = sum(ls.truncate(module.model, budget).values())
    assert (logits(module.model) - before).abs().max() > 1e-3
    note = rf"truncated after the run from 52 to {ranks} ranks \(budget {budget}\), so this is no longer the model"
    card = Path("lora/README.md").read_text()
    assert re.search(note, capsys.readouterr().out)
    assert re.search(note, card)
    assert f"in {ranks} of 52 ranks" in card
    loaded = peft.PeftModel.from_pretrained(base(project), "lora")
    torch.testing.assert_close(logits(loaded), logits(module.model), rtol=0, atol=1e-5)
    held = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert parameters - 96 < held <= parameters


@pytest.mark.slow
def test_every_format_takes_a_budget(project, dense):
    checkpoint, module = dense
    ranks = sum(ls.truncate(module.model, 0.25).values())
    words = ["--ckpt_path", checkpoint, "--budget", "0.25", "--output"]
    for form in ("peft", "sparse", "delta"):
        done = programs.run(["-m", "lit_sparse", "export", *words, form, "--format", form])
        assert done.returncode == 0, done.stderr
        assert f"truncated after the run from 52 to {ranks} ranks (budget 0.25)" in done.stdout
    done = programs.run(["-m", "lit_sparse", "merge", *words, "merged"])
    assert done.returncode == 0, done.stderr
    loaded = {"merged": AutoModelForSequenceClassification.from_pretrained("merged")}
    for form in ("sparse", "delta"):
        loaded[form] = base(project)
        ls.load_adapter(loaded[form], form)
    loaded["peft"] = peft.PeftModel.from_pretrained(base(project), "peft")
    for model in loaded.values():
        torch.testing.assert_close(logits(model), logits(module.model), rtol=0, atol=1e-5)


# Any module.


def save_masked(folder):
    """With the weights of its head, which is no task's and stays frozen."""
    build_tiny(BertForMaskedLM).save_pretrained(folder)
    return str(folder)


MODULES = {
    "CausalLM": (save_tiny_llama, lambda name: ls.CausalLM(name, METHOD)),
    "Seq2SeqLM": (save_tiny_t5, lambda name: ls.Seq2SeqLM(name, METHOD, max_new_tokens=5)),
    "MaskedLM": (save_masked, lambda name: ls.MaskedLM(name, METHOD)),
    "MultipleChoice": (save_tiny_bert, lambda name: ls.MultipleChoice(name, METHOD, num_labels=2)),
    "QuestionAnswering": (save_tiny_bert, lambda name: ls.QuestionAnswering(name, METHOD)),
    "TokenClassification": (save_tiny_bert, lambda name: ls.TokenClassification(name, METHOD, num_labels=3)),
    "ImageClassification": (save_tiny_vit, lambda name: ls.ImageClassification(name, METHOD, num_labels=3)),
    "AudioClassification": (save_tiny_wav2vec2, lambda name: ls.AudioClassification(name, METHOD, num_labels=3)),
    "SparseModule": (save_tiny_bert, lambda name: ls.SparseModule(name, METHOD, backbone_args={"dtype": "bfloat16"})),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The tags")
@pytest.mark.parametrize(("save_backbone", "build"), MODULES.values(), ids=MODULES)
def test_a_checkpoint_of_any_module_is_enough(save_backbone, build, tmp_path):
    module = build(save_backbone(tmp_path / "base"))
    file = save_checkpoint(module, tmp_path / "some.ckpt")
    restored = restore(checkpoints.read(file), file)
    assert type(restored) is type(module)
    state = module.model.state_dict()
    assert restored.model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in restored.model.state_dict().items())
    for form in ("peft", "merged"):
        main(["export", "--ckpt_path", file, "--format", form, "--output", str(tmp_path / form)])
    assert type(module.model).from_pretrained(tmp_path / "merged").dtype == module.model.dtype


def test_a_lora_file_for_llama_cpp(capsys, tmp_path):
    pytest.importorskip("gguf")
    checkpoint = save_checkpoint(ls.CausalLM(save_tiny_llama(tmp_path / "base"), METHOD), tmp_path / "run.ckpt")
    main(["export", "--ckpt_path", checkpoint, "--format", "gguf", "--output", "lora"])
    assert re.search(r"Wrote lora \(gguf\): [\d,]+ bytes of weights.*\nFor llama.cpp and", capsys.readouterr().out)
    assert (tmp_path / "lora" / "adapter.gguf").stat().st_size > 1000


def test_a_padding_that_was_learned_from_the_data_is_kept(tmp_path):
    module = ls.SequenceClassification(save_tiny_gpt2(tmp_path / "gpt2"), METHOD, num_labels=2)
    module.configure_model()
    module.model.config.pad_token_id = 2
    file = save_checkpoint(module, tmp_path / "some.ckpt")
    main(["merge", "--ckpt_path", file, "--output", str(tmp_path / "merged")])
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert logits(model).shape == (2, 2)


def test_a_checkpoint_of_a_fit_in_python(project, tmp_path):
    rows = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(IDS.repeat(4, 1))]
    module = ls.SequenceClassification(str(project / "bert"), ls.RoseLoRA(rank=2, density=0.1), num_labels=2)
    trainer = Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    trainer.save_checkpoint("python.ckpt")
    assert ls.export_checkpoint("python.ckpt", "out", format="sparse").difference < 1e-5
    plain = BertForSequenceClassification.from_pretrained(project / "bert")
    ls.load_adapter(plain, "out")
    torch.testing.assert_close(logits(plain), logits(module.model), rtol=0, atol=1e-5)


MINE = """
import lit_sparse as ls

class Widened(ls.SequenceClassification):
    def __init__(self, width=1, **arguments):
        super().__init__(**arguments)
        self.width = width
"""


def test_a_module_of_the_users_own_is_imported_when_they_say_so(project, refuse, tmp_path, monkeypatch):
    (tmp_path / "my_modules.py").write_text(MINE)
    read = checkpoints.read(project / "kept" / "last.ckpt")
    read[checkpoints.KEY]["module"] = "my_modules.Widened"
    read["hyper_parameters"]["width"] = 3
    torch.save(read, "mine.ckpt")
    status, error = refuse("export", "--ckpt_path", "mine.ckpt", "--output", "out")
    assert (status, "my_modules" in sys.modules) == (1, False)
    assert (
        "trained with my_modules.Widened, and 0 classes of this name are known. Import the one that is meant" in error
    )
    assert (
        "import_modules names 'nowhere', which cannot be imported"
        in refuse("export", "--ckpt_path", "mine.ckpt", "--output", "out", "--import_modules", "[nowhere]")[1]
    )
    main(["export", "--ckpt_path", "mine.ckpt", "--output", "out", "--import_modules", "[my_modules]"])
    kind = sys.modules["my_modules"].Widened
    for script in ("my_modules", "__main__"):  # a class of a script that is imported later
        read[checkpoints.KEY]["module"] = f"{script}.Widened"
        module = restore(read, "mine.ckpt")
        assert (type(module), module.width, module.num_labels) == (kind, 3, 3)
    del sys.modules["my_modules"]
    read[checkpoints.KEY]["module"] = "other_modules.Widened"  # the same name does not make it the same class
    with pytest.raises(ls.UsageError, match=r"other_modules\.Widened, and 0 classes"):
        restore(read, "mine.ckpt")


# What is refused, in one line.


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--formt", "peft"], 2, "unrecognized arguments: --formt peft. Did you mean --format?"),
        (["--ckp", "x"], 2, "unrecognized arguments: --ckp x. Did you mean --ckpt_path?"),
        (["--colour", "red"], 2, "unrecognized arguments: --colour red. --help lists the known ones."),
        (
            ["--format", "onnx"],
            2,
            "Parser key \"format\": Expected one of 'peft', 'gguf', 'sparse', 'delta', 'merged'. Got value: onnx",
        ),
        (["--format", "pft"], 2, "Got value: pft. Did you mean 'peft'?"),
        (["--format", "gguf"], 1, "No LoRA file for llama.cpp can be written for BertForSequenceClassification"),
        (["--tolerance", "small"], 2, 'Parser key "tolerance"'),
        (["--tolerance", "-1"], 1, "tolerance must be at least 0; got -1.0"),
        (["--budget", "half"], 1, "budget must be a share in (0, 1] such as 0.25"),
        (["--budget", "1G"], 1, "parameters, and the adapters have"),
        (["--dtype", "float16"], 1, "dtype is for the format merged; peft keeps the precision of the adapters."),
        (
            ["--format", "delta", "--layout", "ragged"],
            1,
            "layout and with_head are for the format peft; this is delta.",
        ),
        (["--format", "sparse", "--with_head", "false"], 1, "layout and with_head are for the format peft"),
    ],
)
def test_options_that_do_not_fit(options, status, message, checkpoint, refuse, tmp_path):
    found = refuse("export", "--ckpt_path", checkpoint, "--output", "out", *options)
    assert found[0] == status
    assert message in found[1]
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_named(checkpoint, refuse):
    assert refuse("export", "--ckpt_path", checkpoint)[1].endswith("the following arguments are required: output")
    assert "ckpt_path" in refuse("merge", "--output", "out")[1]
    assert (
        "unrecognized arguments: --layout"
        in refuse("merge", "--ckpt_path", checkpoint, "--output", "out", "--layout", "padded")[1]
    )


def test_a_full_folder_is_refused_before_anything_is_loaded(refuse, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    status, error = refuse("export", "--ckpt_path", "absent.ckpt", "--output", "out")
    assert (status, "'out' is not empty: name a new folder" in error) == (1, True)


def change(checkpoint, file, *keys, value):
    """Save a copy with another value, or without one."""
    read = checkpoints.read(checkpoint)
    place = read
    for key in keys[:-1]:
        place = place[key]
    if value is None:
        del place[keys[-1]]
    else:
        place[keys[-1]] = value
    torch.save(read, file)


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        ((checkpoints.KEY, "module"), None, "does not say which module wrote it: it is of an earlier version"),
        ((checkpoints.KEY, "built"), True, "was given to its run as a model that was already built.*call export_peft"),
        ((checkpoints.KEY, "module"), "os.system", "trained with os.system, and 0 classes of this name are known"),
        (("state_dict", "head.weight"), torch.ones(1), r"holds \['head.weight'\], which lie outside the backbone"),
        (("hyper_parameters", "backbone_args"), {"trust_remote_code": True}, "wants to run code that comes with"),
        ((checkpoints.KEY,), None, "was not written by a lit_sparse module"),
        (
            (checkpoints.KEY, "method", "init_args", "target_modules"),
            r"([a-z0-9._]+)+\d!",  # would keep re busy for minutes
            "matches no linear layer",
        ),
    ],
)
def test_checkpoints_that_cannot_be_exported(keys, value, message, checkpoint, refuse, tmp_path):
    change(checkpoint, tmp_path / "other.ckpt", *keys, value=value)
    status, error = refuse("export", "--ckpt_path", "other.ckpt", "--output", "out")
    assert status == 1
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_code_of_the_backbone_runs_when_the_user_trusts_it(checkpoint, tmp_path):
    change(checkpoint, tmp_path / "other.ckpt", "hyper_parameters", "backbone_args", value={"trust_remote_code": True})
    main(["export", "--ckpt_path", "other.ckpt", "--output", "out", "--trust_remote_code", "true"])


def test_files_that_are_no_checkpoints(refuse, tmp_path):
    assert (
        "'absent.ckpt' cannot be read as a checkpoint"
        in refuse("export", "--ckpt_path", "absent.ckpt", "--output", "out")[1]
    )
    (tmp_path / "text.ckpt").write_text("hello")
    assert "'text.ckpt' cannot be read" in refuse("export", "--ckpt_path", "text.ckpt", "--output", "out")[1]
    error = refuse("export", "--ckpt_path", ".", "--output", str(tmp_path / "out"))[1]
    assert "'.' is a folder: give a checkpoint file in it, such as last.ckpt" in error


def test_a_run_with_a_built_model_says_so(project, refuse, tmp_path):
    model = BertForSequenceClassification.from_pretrained(project / "bert")
    save_checkpoint(ls.SparseModule(model, METHOD), tmp_path / "built.ckpt")
    assert "already built" in refuse("merge", "--ckpt_path", "built.ckpt", "--output", "out")[1]


class Needy(ls.SequenceClassification):
    """Wants an argument that no checkpoint holds."""

    def __init__(self, tool, **arguments):
        super().__init__(**arguments)


def test_a_module_that_needs_more_than_a_checkpoint_holds(checkpoint, refuse, tmp_path):
    change(checkpoint, tmp_path / "needy.ckpt", checkpoints.KEY, "module", value=f"{__name__}.Needy")
    error = refuse("export", "--ckpt_path", "needy.ckpt", "--output", "out")[1]
    assert "cannot be made of 'needy.ckpt' alone" in error
    assert "'tool'" in error


# Help.


def test_the_commands_are_shown(capsys):
    assert {"export", "merge"} <= set(COMMANDS)
    for words, shown in (
        (["--help"], ["export", "merge", "Export the adapters of a checkpoint."]),
        (
            ["export", "--help"],
            ["usage: lit-sparse export", "{peft,gguf,sparse,delta,merged}", "--push_to_hub", "--budget"],
        ),
        (["merge", "--help"], ["usage: lit-sparse merge", "--dtype", "--tolerance", "--budget"]),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(words)
        text = " ".join(capsys.readouterr().out.split())
        assert all(part in text for part in shown)
