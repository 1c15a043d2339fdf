"""The command line: what users type, what they get, and what they are told when it cannot work."""

import csv
import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import torch
import yaml
from backbones import save_tiny_bert
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar

import lit_sparse as ls
from lit_sparse.cli.main import COMMANDS, lightning_main, main
from lit_sparse.cli.trainer import OneLineBar, SparseTrainer

SCRIPTS = Path(sys.executable).parent
ENTRIES = {
    "lightning": [str(SCRIPTS / "lightning")],
    "lit-sparse": [str(SCRIPTS / "lit-sparse")],
    "python -m lit_sparse": ["-m", "lit_sparse"],
}
METHOD = "--model.init_args.method.init_args"
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="session")
def project(tmp_path_factory):
    """A folder with a backbone, rows and a configuration, as a user has it."""
    folder = tmp_path_factory.mktemp("project")
    save_tiny_bert(folder / "bert")
    for split, count in (("train", 64), ("validation", 16), ("test", 16)):
        rows = [[("a good film", "a bad film")[i % 2], ("yes", "no")[i % 2]] for i in range(count)]
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            csv.writer(stream).writerows([["text", "label"], *rows])
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sparse.SequenceClassification",
            "init_args": {
                "backbone": str(folder / "bert"),
                "method": {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 2, "sparsity_weight": 1.0}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "lit_sparse.TextClassificationData",
            "init_args": {"path": str(folder), "batch_size": 16},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 1,
            "log_every_n_steps": 1,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {"dirpath": "kept", "filename": "last"},
                }
            ],
            **QUIET,
        },
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def config(project):
    return str(project / "config.yaml")


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def start(command):
    """Run a command in the folder of the test."""
    return programs.run(command)


@pytest.fixture
def refuse(capsys):
    """Run the command line in this process and give back the one line in which it refuses, with its status."""

    def run(*args):
        with pytest.raises(SystemExit) as exit_info:
            main(list(args))
        text = capsys.readouterr().err
        error = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        assert text.endswith(f"{error[0]}\n")  # a progress bar may stand above it, nothing below
        assert "Traceback" not in text
        return exit_info.value.code, error[0]

    return run


# Processes of their own.


@pytest.mark.slow
def test_the_three_entries_are_the_same_program(config, monkeypatch, capsys):
    helps, versions = {}, {}
    for name, command in ENTRIES.items():
        done = start([*command, "--help"])
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(f"usage: {name} [")
        helps[name] = re.sub(rf"\b{name} (?=\[|COMMAND|fit)", "", done.stdout)
        argument = "lit_sparse/__main__.py" if name.startswith("python") else command[0]
        monkeypatch.setattr(sys, "argv", [argument])
        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
        versions[name] = capsys.readouterr().out
        assert versions[name] == f"{name} {ls.__version__}\n"
    assert len(set(helps.values())) == 1
    assert "fit" in helps["lightning"]


def read_metrics(folder):
    """The last value of every figure that a CSVLogger wrote."""
    with next(folder.glob("*/metrics.csv")).open() as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


@pytest.mark.slow
def test_fit_validate_test_predict_and_resume(config, project, tmp_path):
    lightning, checkpoint = ENTRIES["lightning"], "kept/last.ckpt"

    def run(*args):
        done = start([*lightning, args[0], "--config", config, *args[1:]])
        assert done.returncode == 0, done.stderr
        return done

    run("fit")
    saved = torch.load(checkpoint, weights_only=True)
    assert (saved["epoch"], saved["global_step"]) == (0, 4)
    (table,) = Path("runs").glob("*/*/sparsity.csv")
    assert len(table.read_text().splitlines()) == 1 + 13

    run("validate", "--ckpt_path", checkpoint, "--trainer.logger.init_args.name", "validated")
    run("test", "--ckpt_path", checkpoint, "--trainer.logger.init_args.name", "tested")
    validated, tested = read_metrics(Path("runs/validated")), read_metrics(Path("runs/tested"))
    assert "test_accuracy" in tested

    # A run of the command line loads in Python, and is the same model.
    module = ls.SequenceClassification.load_from_checkpoint(checkpoint)
    data = ls.TextClassificationData(str(project), batch_size=16)
    (found,) = Trainer(accelerator="cpu", logger=False, **QUIET).validate(module, data, verbose=False)
    assert found["val_loss"] == pytest.approx(validated["val_loss"], rel=1e-5)
    assert found["val_accuracy"] == validated["val_accuracy"]
    assert type(module.method) is ls.SoRA
    assert module.label_names == ["no", "yes"]

    run("predict", "--ckpt_path", checkpoint)
    run("fit", "--ckpt_path", checkpoint, "--trainer.max_epochs", "2")
    resumed = torch.load(sorted(Path("kept").glob("*.ckpt"))[-1], weights_only=True)
    assert (resumed["epoch"], resumed["global_step"]) == (1, 8)
    assert resumed["callbacks"]["Sparsify"]["steps_taken"] == 8


@pytest.mark.slow
def test_last_is_the_newest_checkpoint_that_is_sound(config):
    main(["fit", "--config", config, "--ckpt_path", "last"])  # there is none yet, as when a job starts
    steps = torch.load("kept/last.ckpt", weights_only=True)["global_step"]
    Path("kept/last-v1.ckpt").write_bytes(Path("kept/last.ckpt").read_bytes()[:-1000])
    main(["fit", "--config", config, "--ckpt_path", "last", "--trainer.max_epochs", "2"])
    newest = max(Path("kept").glob("*.ckpt"), key=lambda file: file.stat().st_mtime)
    assert torch.load(newest, weights_only=True)["global_step"] == 2 * steps
    with pytest.warns(UserWarning, match="last-v1.ckpt is damaged, .* Using the older"):
        main(["validate", "--config", config, "--ckpt_path", "kept/last-v1.ckpt"])


@pytest.mark.slow
def test_an_error_is_one_line_in_a_process_of_its_own(config):
    done = start([*ENTRIES["lit-sparse"], "fit", "--config", config, "--data.init_args.text", "txt"])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    expected = "error: The split 'train' has no column 'txt'; its columns are ['text', 'label'] "
    assert done.stderr.splitlines()[-1] == f"{expected}({Path(config).parent / 'train.csv'})."


OWN_CODE = """
import torch
from dataclasses import dataclass
from lightning.pytorch import LightningDataModule, LightningModule


@dataclass
class Narrow:
    narrow: int


@dataclass
class Wide:
    wide: int


class OwnModule(LightningModule):
    def __init__(self, width: int, part: Narrow | Wide | None = None, fail: bool = False):
        super().__init__()
        self.layer, self.part, self.fail = torch.nn.Linear(width, 1), part, fail

    def training_step(self, batch, batch_idx):
        return self.layer(batch).sum() * (1 / (0 if self.fail else 1))

    def on_train_end(self):
        print("FITTED", type(self.trainer.optimizers[0]).__name__, self.trainer.optimizers[0].param_groups[0]["lr"])
        print("PART", self.part)


class OwnData(LightningDataModule):
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=2)
"""
OWN = ["fit", "--model", "own_task.OwnModule", "--model.width", "3", "--data", "own_task.OwnData"]
OWN += ["--optimizer", "torch.optim.SGD", "--optimizer.lr", "0.25", "--trainer.fast_dev_run", "true"]
OWN += ["--trainer.accelerator", "cpu"]


@pytest.mark.slow
def test_a_module_of_the_users_own_is_fitted_from_the_folder_it_lies_in():
    Path("own_task.py").write_text(OWN_CODE)
    done = start([*ENTRIES["lightning"], *OWN])
    assert done.returncode == 0, done.stderr
    assert "FITTED SGD 0.25" in done.stdout


@pytest.fixture
def own_task(tmp_path, monkeypatch):
    (tmp_path / "own_task.py").write_text(OWN_CODE)
    yield
    sys.modules.pop("own_task", None)


def test_an_exception_in_the_users_own_code_is_not_ours_to_hide(own_task):
    with pytest.raises(ZeroDivisionError):
        main([*OWN, "--model.fail", "true"])


def test_the_second_type_of_a_union_is_tried_when_the_first_does_not_fit(own_task, capsys):
    main([*OWN, "--model.part", "{wide: 5}"])
    assert "PART Wide(wide=5)" in capsys.readouterr().out


# Another package's program of the name `lightning`.


@pytest.fixture
def other_lightning(tmp_path, monkeypatch):
    """Another distribution that installs a program of that name, as lightning_sdk does."""
    site = tmp_path / "site"
    information = site / "other_sdk-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: other-sdk\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[console_scripts]\nlightning = other_sdk:run\n")
    (site / "other_sdk.py").write_text("import sys\ndef run():\n    print('OTHER', sys.argv[1:])\n")
    yield str(site)
    sys.modules.pop("other_sdk", None)


@pytest.mark.slow
def test_words_of_another_lightning_program_go_there(other_lightning, monkeypatch, capsys):
    environment = {**os.environ, "PYTHONPATH": other_lightning}
    done = programs.run([*ENTRIES["lightning"], "login", "--key", "x"], env=environment)
    assert (done.returncode, done.stdout) == (0, "OTHER ['login', '--key', 'x']\n")
    monkeypatch.syspath_prepend(other_lightning)
    for words in (["fit", "--help"], ["--help"], ["predict", "--help"]):
        monkeypatch.setattr(sys, "argv", ["lightning", *words])
        with pytest.raises(SystemExit, match="0"):
            lightning_main()
        printed = capsys.readouterr().out
        assert "OTHER" not in printed
        assert printed.startswith("usage: lightning")


def test_without_another_program_an_unknown_word_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lightning", "login"])
    with pytest.raises(SystemExit, match="2"):
        lightning_main()
    assert capsys.readouterr().err.startswith("error: There is no command 'login'. The commands are init, fit, ")


# Help.


def test_help_and_version_need_neither_torch_nor_lightning():
    code = "import sys, lit_sparse.cli.main as cli; sys.argv[0] = 'lit-sparse'\ntry: cli.main([{!r}])\n"
    for word, expected in (("--help", "usage: lit-sparse ["), ("--version", f"lit-sparse {ls.__version__}")):
        script = code.format(word) + "except SystemExit as end: print('torch' in sys.modules, end.code)"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        assert done.stdout.startswith(expected)
        assert done.stdout.endswith("False 0\n"), done.stdout


def helped(capsys, *words):
    with pytest.raises(SystemExit, match="0"):
        main(list(words))
    return capsys.readouterr().out


def test_without_words_the_help_is_shown(capsys):
    shown = helped(capsys)
    assert shown == helped(capsys, "--help")
    assert all(re.search(rf"^  {command} ", shown, re.MULTILINE) for command in COMMANDS)
    assert max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize(("command", "options"), [("init", []), ("inspect", ["x"])])
def test_a_command_is_described_in_its_own_help(capsys, command, options):
    assert COMMANDS[command] in " ".join(helped(capsys, command, *options, "--help").split())


def test_the_help_of_fit_lists_every_public_class_on_one_line(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = helped(capsys, "fit", "--help")
    kinds = (LightningModule, LightningDataModule, ls.Method, Callback)
    public = {name: getattr(ls, name) for name in dir(ls)}
    wanted = [n for n, kind in public.items() if isinstance(kind, type) and issubclass(kind, kinds)]
    assert {"SequenceClassification", "TextClassificationData", "RoseLoRA", "SparsityMonitor"} <= set(wanted)
    for name in wanted:
        assert len(re.findall(rf"^  {name} +\S.*$", shown, re.MULTILINE)) == (name not in ("Method", "SparseMethod")), (
            name
        )
    assert not re.search(r"known\s+subclasses|standardizes|Base class for all|:class:|``", shown)
    assert max(map(len, shown.partition("options:")[0].splitlines())) <= 100


def test_the_help_of_a_class_takes_its_bare_name_and_shows_its_arguments(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    shown = helped(capsys, "fit", "--model.help", "SequenceClassification")
    assert shown == helped(capsys, "fit", "--model.help", "lit_sparse.SequenceClassification")
    assert re.findall(r"^  --model\.(\w+) ", shown, re.MULTILINE)[:3] == ["backbone", "method", "multi_label"]
    assert "torch.nn" not in shown
    assert len(shown.splitlines()) < 100
    assert "--data.text " in helped(capsys, "fit", "--data.help", "TextClassificationData")
    method = helped(capsys, "fit", "--model", "SequenceClassification", "--model.method.help", "SoRA")
    assert "--method.budget " in method


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fti", "--config", "x.yaml"], "There is no command 'fti'. Did you mean 'fit'?"),
        (["--config", "x.yaml"], "A command is missing before or after '--config x.yaml': init, fit, "),
        (["fit", "--model", "SequenceClasification"], ". Did you mean 'SequenceClassification' or "),
        (["fit", "--model", "lit_sparse.CasualLM"], ". Did you mean 'CausalLM'"),
        (["fit", "--model", "CausalLM", "--data", "TextClasificationData"], ". Did you mean 'TextClassificationData' "),
        (["fit", "--model", "CausalLM", "--model.method", "SORA"], ". Did you mean 'SoRA' or "),
        (["fit", "--model", "CausalLM", "--model.bakbone", "x"], ". Did you mean 'backbone' or "),
        (["fit", "--model", "CausalLM", "--trainer.callbacks+", "EarlyStoping"], ". Did you mean 'EarlyStopping'?"),
        (["fit", "--model", "CausalLM", "--model.optimizer", "torch.optim.AdmW"], ". Did you mean 'AdamW' or "),
        (["fit", "--model", "CausalLM", "--model.lr_schedule", "linar"], "Got value: linar. Did you mean 'linear'?"),
        (["fit", "--confg", "own.yaml"], "arguments: --confg own.yaml. Did you mean --config?"),
        (["fit", "--ckpt", "x.ckpt"], ". Did you mean --ckpt_path?"),
        (["fit", "--trainer.acelerator=cpu"], ". Did you mean --trainer.accelerator?"),
        (["fit", "--trainr.max_epochs", "3"], ". Did you mean --trainer?"),
        (["evaluate", "x", "--tasks", "y", "--bach-size", "1"], "--bach-size 1. Did you mean --batch_size?"),
    ],
)
def test_a_misspelt_command_class_or_key_suggests_the_near_one(refuse, words, expected):
    status, error = refuse(*words)
    assert status == 2
    assert expected in error


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("data:", "datas:", "does not accept option 'datas.init_args.batch_size'. Did you mean 'data'?"),
        ("max_epochs:", "max_epoch:", "does not accept option 'trainer.max_epoch'. Did you mean 'max_epochs' or "),
        ("batch_size:", "bach_size:", "Option 'bach_size' is not accepted. Did you mean 'batch_size' or "),
        ("init_args:", "init_arg:", "is not accepted. Did you mean 'init_args'?"),
        ("lit_sparse.SoRA", "lit_sparse.SORA", "has no attribute 'SORA'. Did you mean 'SoRA' or "),
        ("optim.AdamW", "optim.AdamWW", "has no attribute 'AdamWW'. Did you mean 'AdamW' or "),
    ],
)
def test_a_misspelt_key_or_class_of_a_yaml_suggests_the_near_one_of_its_level(config, refuse, old, new, expected):
    text = Path(config).read_text()
    assert old in text
    Path("wrong.yaml").write_text(text.replace(old, new, 1))
    status, error = refuse("fit", "--config", "wrong.yaml")
    assert status == 2
    assert expected in error
    assert "{" not in error
    assert "Namespace" not in error


def test_a_misspelt_strategy_suggests_the_near_one(config, refuse):
    status, error = refuse("fit", "--config", config, "--trainer.strategy", "dpp")
    assert status == 1
    assert error.endswith(" Did you mean 'ddp'?")


def test_a_callback_without_its_argument_is_refused_without_the_forms_of_a_class(config, refuse):
    status, error = refuse("fit", "--config", config, "--trainer.callbacks+=EarlyStopping")
    assert status == 2
    assert error.endswith("'lightning.pytorch.callbacks.EarlyStopping': the following arguments are required: monitor")


def test_what_other_packages_advertise_is_hidden_and_nothing_else(config, caplog):
    with caplog.at_level("INFO"):
        main(["fit", "--config", config])
        logging.getLogger("torchao").warning("Something else")
    assert "litlogger" not in caplog.text
    assert "`Trainer.fit` stopped" in caplog.text
    assert "Something else" in caplog.text


@pytest.mark.parametrize(
    ("callbacks", "bar"),
    [
        (None, OneLineBar),
        ({"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}, OneLineBar),
        ([{"class_path": "lightning.pytorch.callbacks.RichProgressBar"}], RichProgressBar),
        ([{"class_path": "lightning.pytorch.callbacks.TQDMProgressBar"}], TQDMProgressBar),
    ],
)
def test_the_bar_of_one_line_stands_in_for_lightnings_own_only(config, callbacks, bar, monkeypatch):
    changed = yaml.safe_load(Path(config).read_text())
    changed["trainer"] |= {"callbacks": callbacks, "enable_progress_bar": True}
    Path("bars.yaml").write_text(yaml.safe_dump(changed))
    trainers = []
    monkeypatch.setattr(SparseTrainer, "fit", lambda self, *_, **__: trainers.append(self))
    main(["fit", "--config", "bars.yaml"])
    (trainer,) = trainers
    assert [type(c) for c in trainer.callbacks if isinstance(c, ProgressBar)] == [bar]


@pytest.mark.parametrize(("length", "said"), [({"max_steps": 2}, "Epoch 0"), ({"max_epochs": 3}, "Epoch 0/2")])
def test_the_bar_of_a_run_of_steps_counts_no_epochs(config, length, said, monkeypatch):
    changed = yaml.safe_load(Path(config).read_text())
    changed["trainer"] |= {"max_epochs": None, **length, "enable_progress_bar": True}
    Path("bars.yaml").write_text(yaml.safe_dump(changed))
    shown = []
    monkeypatch.setattr(OneLineBar, "_update", lambda self, *_, **__: shown.append(self.progress.tasks[-1].description))
    main(["fit", "--config", "bars.yaml"])
    assert {text.strip() for text in shown if text.startswith("Epoch 0")} == {said}


# Configurations.


@pytest.mark.slow
def test_a_printed_configuration_can_be_fed_back(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["fit", "--config", config, f"{METHOD}.rank", "3", "--print_config"])
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["model"]["init_args"]["method"]["init_args"]["rank"] == 3
    Path("printed.yaml").write_text(printed)
    main(["fit", "--config", "printed.yaml"])
    capsys.readouterr()
    ranks = torch.load("kept/last.ckpt", weights_only=True)["lit_sparse"]["ranks"]
    assert set(ranks.values()) == {3}
    # So can the one that every run writes beside its logs.
    (kept,) = Path("runs").glob("*/*/config.yaml")
    assert yaml.safe_load(kept.read_text())["model"] == yaml.safe_load(printed)["model"]
    main(["validate", "--config", config, "--ckpt_path", "kept/last.ckpt", f"{METHOD}.rank", "3"])


def test_null_on_the_command_line_unsets_an_argument_of_the_method(config):
    main(["fit", "--config", config, f"{METHOD}.sparsity_weight", "null", f"{METHOD}.threshold", "0.25"])
    method = torch.load("kept/last.ckpt", weights_only=True)["lit_sparse"]["method"]["init_args"]
    assert (method["sparsity_weight"], method["threshold"]) == (None, 0.25)


def test_the_loraplus_ratio_of_a_configuration_reaches_the_optimizer(config, project):
    changed = yaml.safe_load(Path(config).read_text())
    changed["model"]["init_args"]["method"]["init_args"]["loraplus_lr_ratio"] = 16
    Path("plus.yaml").write_text(yaml.safe_dump(changed))
    main(["fit", "--config", "plus.yaml", "--trainer.max_steps", "2"])
    (state,) = torch.load("kept/last.ckpt", weights_only=True)["optimizer_states"]
    assert [group["initial_lr"] for group in state["param_groups"]] == [0.01, 0.16, 0.01, 0.01]  # A, B, bias, gates


# Errors.


@pytest.mark.parametrize(
    ("args", "status", "words"),
    [
        (["--trainer.max_epocs", "3"], 2, "unrecognized arguments: --trainer.max_epocs"),
        (["--model.init_args.backbon", "x"], 2, "Option 'backbon' is not accepted"),
        ([f"{METHOD}.rnk", "3"], 2, "'lit_sparse.SoRA': Option 'rnk' is not accepted"),
        (["--model.init_args.lr_schedule", "stairs"], 2, "'constant'. Got value: stairs"),
        (["--model", "lit_sparse.SequenceClasification"], 2, "has no attribute 'SequenceClasification'"),
        (["--config", "nowhere.yaml"], 2, "File does not exist"),
        ([f"{METHOD}.target_modules", "[quer]"], 1, "'quer' matches no linear layer of BertForSequenceClassification"),
        ([f"{METHOD}.threshold", "0.1"], 1, "Give exactly one of budget"),
        ([f"{METHOD}.budget", "0.5"], 1, "got budget and sparsity_weight."),
        (["--model.init_args.warmup", "1.5"], 1, "warmup is a share of the run, in [0, 1); got 1.5."),
        (["--data.init_args.path", "nowhere.csv"], 1, "'nowhere.csv' does not exist"),
        (["--data.init_args.label", "lable"], 1, "no column 'lable'; its columns are ['text', 'label']"),
        (["--model.init_args.backbone", "/nowhere/bert"], 1, "/nowhere/bert"),
        (["--model.init_args.backbone", "nobody/nothing-at-all"], 1, "'nobody/nothing-at-all'"),
        (["--model.init_args.metrics", "[acc]"], 1, "metrics ['acc'] do not exist for"),
        (["--optimizer", "torch.optim.Adam"], 1, "--optimizer does not reach lit_sparse.SequenceClassification"),
        (["--lr_scheduler", "StepLR", "--lr_scheduler.step_size", "1"], 1, "--lr_scheduler does not reach"),
        (["--trainer.callbacks+", "lit_sparse.Sparsify", "--trainer.callbacks.method", "lit_sparse.LoRA"], 1, "brings"),
        (["--trainer.max_epochs", "-1"], 1, "needs the length of the run"),
        (["--ckpt_path", "nowhere.ckpt"], 1, "The checkpoint 'nowhere.ckpt' does not exist."),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else None,
)
def test_what_cannot_work_is_refused_in_one_line(args, status, words, config, refuse):
    code, error = refuse("fit", "--config", config, *args)
    assert words in error
    assert code == status


def test_errors_name_the_key_but_not_the_parsers_innards(config, refuse):
    _, error = refuse("fit", "--config", config, f"{METHOD}.rnk", "3")
    assert error.startswith('error: Parser key "model": - Problem with given class_path')
    assert not any(word in error for word in ("Union", "NoneType", "NestedArg", "Namespace"))


@pytest.mark.slow
def test_a_truncated_and_a_foreign_checkpoint_are_refused(config, refuse):
    main(["fit", "--config", config])
    whole = Path("kept/last.ckpt").read_bytes()
    Path("half.ckpt").write_bytes(whole[: len(whole) // 2])
    Path("garbage.ckpt").write_bytes(b"no checkpoint" * 99)
    for name in ("half.ckpt", "garbage.ckpt"):
        code, error = refuse("fit", "--config", config, "--ckpt_path", name)
        assert code == 1
        assert error == f"error: The file '{name}' is not a checkpoint or is damaged. Its folder has no other."
    code, error = refuse("fit", "--config", config, f"{METHOD}.rank", "3", "--ckpt_path", "kept/last.ckpt")
    assert code == 1
    assert "has rank 2 there and 3 here" in error


def test_a_loss_that_is_no_number_is_one_line_and_a_failure(config, refuse):
    args = ["--model.init_args.optimizer.init_args.lr", "1e30", "--trainer.max_epochs", "5"]
    code, error = refuse("fit", "--config", config, *args)
    assert code == 1
    assert re.search("(The training loss|A gradient) became NaN or infinite at optimizer step", error)


def test_the_traceback_is_there_for_those_who_want_it(config, monkeypatch):
    monkeypatch.setenv("LIT_SPARSE_TRACEBACK", "1")
    with pytest.raises(ls.UsageError, match="no column 'txt'"):
        main(["fit", "--config", config, "--data.init_args.text", "txt"])


def test_no_output_of_ours_comes_before_the_error_of_a_wrong_word():
    """Parsing errors must not wait for anything heavy; and nothing else is printed."""
    stream = io.StringIO()
    original, sys.stderr = sys.stderr, stream
    try:
        with pytest.raises(SystemExit, match="2"):
            main(["fitt"])
    finally:
        sys.stderr = original
    assert stream.getvalue().count("\n") == 1
