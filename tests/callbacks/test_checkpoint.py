"""lit_sparse.SparseCheckpoint: "last" is the end of the run, "best" is as sparse as it, and every table agrees."""

import csv
import functools
import os
import re
import signal
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from projects import write_config

import lit_sparse as ls
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.cli.inspect import inspect_adapters
from lit_sparse.cli.main import main
from lit_sparse.methods.progress import Progress, left
from lit_sparse.serving.from_checkpoint import export_checkpoint

BATCHES, EPOCHS = 4, 3
STEPS = BATCHES * EPOCHS
METHODS = {
    "SoRA": {"rank": 4, "sparsity_weight": 4.0, "gate_lr": 0.05},
    "RoseLoRA": {"rank": 4, "density": 0.2, "begin": 0.1, "end": 0.6},
    "GatedRoseLoRA": {"rank": 4, "sparsity_weight": 4.0, "gate_lr": 0.05, "density": 0.2, "begin": 0.1, "end": 0.6},
}
SETTLING = {
    "SoRA, budget": {"rank": 4, "budget": 0.4, "begin": 0.1, "end": 0.6},
    "HardConcreteLoRA, budget": {"rank": 4, "budget": 0.4, "begin": 0.1, "end": 0.6},
    "SoRA, refit": {**METHODS["SoRA"], "refit": 0.4},
    "GatedRoseLoRA, refit": {**METHODS["GatedRoseLoRA"], "refit": 0.9},
}
SETTLED = 8  # the step at which RoseLoRA's masks above, and the choices of ranks, are final: 0.6 of 12, rounded up
pytestmark = pytest.mark.filterwarnings("ignore")
by_method = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    save_tiny_bert(folder / "bert")
    for split, count in (("train", 4 * BATCHES), ("validation", 8)):
        with (folder / f"{split}.csv").open("w", newline="") as stream:
            rows = [(f"{('good', 'bad')[i % 2]} film {i}", ("yes", "no")[i % 2]) for i in range(count)]
            csv.writer(stream).writerows([("text", "label"), *rows])
    return folder


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])


class At(Callback):
    """Do something when a batch begins that leads to a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step - 1:
            self.act(trainer)


class Falls(Callback):
    """A metric that is better the earlier it is measured: what chooses by it keeps the first."""

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("early", -float(trainer.global_step))


class Emptied(Callback):
    """Leaves no rank of an adapter."""

    @torch.no_grad()
    def on_train_batch_end(self, trainer, pl_module, *_):
        for _, adapter in ls.adapters_in(pl_module):
            adapter.lora_B_t.zero_()


def fit(project, method, *callbacks, ckpt_path=None, **options):
    """Train for twelve steps; returns the Trainer."""
    L.seed_everything(1, verbose=False)
    arguments = {**METHODS, **SETTLING}.get(method, {"rank": 4})
    module = ls.SequenceClassification(
        str(project / "bert"),
        getattr(ls, method.partition(",")[0])(**arguments),
        optimizer=functools.partial(torch.optim.AdamW, lr=0.02),
    )
    data = ls.TextClassificationData(str(project), batch_size=4, seed=3)
    settings = {"logger": False, "max_epochs": EPOCHS, "num_sanity_val_steps": 0, "log_every_n_steps": 1, **options}
    trainer = L.Trainer(
        accelerator="cpu", callbacks=list(callbacks), enable_progress_bar=False, enable_model_summary=False, **settings
    )
    trainer.fit(module, data, ckpt_path=ckpt_path)
    return trainer


def state_of(file):
    """What the SparseCheckpoint of a run says of itself in a file."""
    states = torch.load(file, weights_only=True)["callbacks"]
    return next(state for name, state in states.items() if name.startswith("SparseCheckpoint"))


def progress_of(file):
    return Progress.in_checkpoint(torch.load(file, weights_only=True))


def same_weights(one, other):
    states = [torch.load(file, weights_only=True)["state_dict"] for file in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def figures(text):
    """Parameters, live ranks, all ranks and share of changed weights, as the one sentence in a text says them."""
    pattern = r"([\d,]+) parameters in ([\d,]+) of ([\d,]+) ranks, ([\d.]+) % of the adapted weights changed"
    (found,) = set(re.findall(pattern, " ".join(text.split())))
    return found


def kill(trainer):
    raise RuntimeError("killed")


# The tables of a run, of its checkpoint and of its exports.


@pytest.mark.parametrize("interrupted", [False, True], ids=["straight", "killed-and-resumed"])
@pytest.mark.parametrize("monitor", [{}, {"monitor": "early", "mode": "max"}], ids=["not-monitored", "monitored"])
@by_method
def test_all_tables_of_a_run_agree(method, monitor, interrupted, project, capsys):
    """The monitor, sparsity.csv, the checkpoint, the exports and inspect of each say the same of ranks and entries."""

    def run(*callbacks, **options):
        keep = ls.SparseCheckpoint("kept", **monitor)
        return fit(project, method, keep, Falls(), *callbacks, logger=CSVLogger("logs"), **options)

    if interrupted:
        with pytest.raises(RuntimeError, match="killed"):
            run(At(STEPS - 1, kill))
        before = STEPS - BATCHES
        assert progress_of("kept/last.ckpt") == Progress(before, STEPS, final=method == "RoseLoRA")
        capsys.readouterr()
    trainer = run(ckpt_path=ls.last_checkpoint("kept") if interrupted else None)
    printed = capsys.readouterr().out
    assert f"The run ended at step {STEPS} of {STEPS}, sparsity final, " in " ".join(printed.split())
    told = figures(printed)
    assert told == figures(left(read_table(Path(trainer.log_dir) / "sparsity.csv")))
    saved = torch.load("kept/last.ckpt", weights_only=True)["lit_sparse"]["progress"]
    assert (saved["step"], saved["total"], saved["final"]) == (STEPS, STEPS, True)
    assert (f"{saved['parameters']:,}", f"{saved['ranks']:,}") == told[:2]
    inspect_adapters("kept/last.ckpt")
    assert told == figures(capsys.readouterr().out)
    for form in ("peft", "sparse"):
        report = export_checkpoint("kept/last.ckpt", form, form)
        assert told == figures(str(report)) == figures(Path(form, "README.md").read_text())
        assert str(report).count(f"step {STEPS} of {STEPS}, sparsity final") == 1
        inspect_adapters(form)
        shown = capsys.readouterr().out
        assert told == figures(shown)
        assert re.search(rf"\nall layers +{told[1]}/{told[2]} ", shown)
        assert f"step {STEPS} of {STEPS}, sparsity final" in shown


def configuration(project):
    """Of a run on the command line, with a metric that falls."""
    method = {"class_path": "lit_sparse.RoseLoRA", "init_args": METHODS["RoseLoRA"]}
    init_args = {"backbone": str(project / "bert"), "method": method}
    model = {"class_path": "lit_sparse.SequenceClassification", "init_args": init_args}
    data = {"class_path": "lit_sparse.TextClassificationData", "init_args": {"path": str(project), "batch_size": 4}}
    keep = {"class_path": "lit_sparse.SparseCheckpoint", "init_args": {"dirpath": "kept", "monitor": "val_accuracy"}}
    return write_config(Path("config.yaml"), model, data, 0.02, max_epochs=EPOCHS, callbacks=[keep])


def test_the_commands_print_what_the_folder_holds(project, capsys):
    """The same from the command line: fit, then the command that exports ``last.ckpt``."""
    main(["fit", "--config", configuration(project)])
    told = figures(capsys.readouterr().out)
    main(["export", "--ckpt_path", "kept/last.ckpt", "--format", "peft", "--require_final", "true", "--output", "lora"])
    assert told == figures(capsys.readouterr().out)
    main(["inspect", "lora"])
    assert told == figures(capsys.readouterr().out)


# What "last" is.


def step_of(file):
    return torch.load(file, weights_only=True)["global_step"]


ENDS = {
    "max_steps": ({"max_steps": 6}, ()),
    "max_epochs": ({}, ()),
    "rare validation": ({"check_val_every_n_epoch": 2}, ()),
    "EarlyStopping": ({}, (lambda: EarlyStopping("early", mode="max", patience=1),)),
    "max_time": ({}, (lambda: At(7, lambda trainer: setattr(trainer, "should_stop", True)),)),
}


@pytest.mark.parametrize("keep", [ls.SparseCheckpoint, ModelCheckpoint])
@pytest.mark.parametrize("end", ENDS)
def test_last_is_the_end_of_the_run_however_it_ends(end, keep, project):
    """Also that of Lightning's own callback, once the run has ended."""
    options, others = ENDS[end]
    callback = keep("kept", monitor="early", mode="max", save_last=True)
    trainer = fit(project, "RoseLoRA", callback, Falls(), *(make() for make in others), **options)
    trainer.save_checkpoint("end.ckpt")
    assert step_of("kept/last.ckpt") == trainer.global_step == step_of("end.ckpt")
    assert same_weights("kept/last.ckpt", "end.ckpt")
    assert progress_of("kept/last.ckpt").step == trainer.global_step


@pytest.mark.parametrize("options", [{}, {"check_val_every_n_epoch": 2}, {"max_steps": 6}], ids=str)
def test_the_checkpoint_of_a_trainer_without_callbacks_is_the_end_of_the_run(options, project, tmp_path):
    trainer = fit(project, "SoRA", default_root_dir=tmp_path, **options)
    (file,) = tmp_path.rglob("*.ckpt")
    assert str(file) == trainer.checkpoint_callback.best_model_path
    assert step_of(file) == trainer.global_step


def test_last_is_rewritten_where_the_metric_did_not_improve_or_is_not_there_yet(project):
    steps = []

    class Read(Callback):
        def on_train_batch_start(self, *_):
            steps.append(step_of("kept/last.ckpt") if Path("kept/last.ckpt").exists() else None)

    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", every_n_train_steps=3)
    fit(project, "LoRA", keep, Falls(), Read())
    # After steps 3, 6, 9; the first validation is after step 4.
    assert steps == [None] * 3 + [3] * 3 + [6] * 3 + [9] * 3
    assert step_of("kept/last.ckpt") == STEPS
    assert step_of(keep.best_model_path) == 6  # where the metric of step 4 was the last known


def test_nothing_is_kept_under_the_name_of_last_but_the_last():
    with pytest.raises(ls.UsageError, match="save_last must be true or false"):
        ls.SparseCheckpoint(save_last="link")
    with pytest.raises(ls.UsageError, match="filename 'last' is reserved for the last state"):
        ls.SparseCheckpoint(filename="last")
    with pytest.raises(ls.UsageError, match="best_of must be 'final' or 'all'; got 'some'"):
        ls.SparseCheckpoint(best_of="some")


def test_any_module_can_use_it(tmp_path):
    keep = ls.SparseCheckpoint(tmp_path, monitor="early", mode="max")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        limit_train_batches=2,
        limit_val_batches=1,
        callbacks=[keep, Falls()],
        **options,
    )
    trainer.fit(BoringModel())
    assert (step_of(keep.best_model_path), step_of(tmp_path / "last.ckpt")) == (2, 6)


def test_a_module_of_the_users_own_records_how_far_it_was(project, tmp_path):
    class Own(BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Sequential(torch.nn.Linear(32, 2))
            ls.inject(self, method)

    method = ls.RoseLoRA(["0"], rank=2, density=0.5, begin=0, end=4)
    keep = ls.SparseCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(
        accelerator="cpu", max_steps=6, limit_val_batches=0, callbacks=[keep, ls.Sparsify(method)], **options
    )
    trainer.fit(Own())
    assert [progress_of(tmp_path / f"step={n}.ckpt").final for n in (2, 4, 6)] == [False, True, True]
    assert str(progress_of(tmp_path / "last.ckpt")) == "step 6 of 6, sparsity final"


# What "best" is.


@pytest.mark.parametrize(
    ("method", "best"),
    [
        ("LoRA", BATCHES),
        ("RoseLoRA", SETTLED),
        ("SoRA", STEPS),
        ("GatedRoseLoRA", STEPS),
        *((name, SETTLED) for name in SETTLING),
    ],
)
def test_best_is_chosen_among_states_whose_sparsity_is_final(method, best, project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max")
    fit(project, method, keep, Falls())
    assert step_of(keep.best_model_path) == best
    assert keep.best_model_score == -best
    assert progress_of(keep.best_model_path).final
    assert len(list(Path("kept").iterdir())) == 2


def test_best_may_be_chosen_among_all_states(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", best_of="all")
    fit(project, "SoRA", keep, Falls())
    assert step_of(keep.best_model_path) == BATCHES
    assert not progress_of(keep.best_model_path).final


def test_all_states_are_kept_but_best_is_one_whose_sparsity_is_final(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", save_top_k=-1, filename="{step}")
    fit(project, "RoseLoRA", keep, Falls())
    assert {step_of(file) for file in Path("kept").glob("step=*")} == {BATCHES, SETTLED, STEPS}
    assert step_of(keep.best_model_path) == SETTLED


def test_a_metric_of_a_validation_before_the_sparsity_was_final_chooses_nothing(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", every_n_train_steps=3)
    fit(project, "RoseLoRA", keep, Falls())
    # Saved after steps 3, 6, 9, 12; validated after 4, 8, 12; final from 8 on.
    assert step_of(keep.best_model_path) == 9


def test_a_state_that_is_saved_before_it_is_validated_may_be_the_best(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", every_n_train_steps=4)
    fit(project, "SoRA", keep, Falls())
    assert step_of(keep.best_model_path) == STEPS
    assert keep.best_model_score == -STEPS


@pytest.mark.parametrize("save_last", [True, False])
def test_where_no_validated_state_was_final_best_is_the_last(save_last, project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", save_last=save_last)
    with pytest.warns(UserWarning, match=r"No state with final sparsity was validated by 'early'"):
        trainer = fit(project, "SoRA", keep, Falls(), max_steps=6, max_epochs=-1, val_check_interval=4)
    assert step_of(keep.best_model_path) == trainer.global_step == 6
    assert (Path(keep.best_model_path).name == "last.ckpt") == save_last


def test_a_metric_that_is_not_logged_is_told_at_the_first_validation(project):
    with pytest.raises(Exception, match="could not find the monitored key"):
        fit(project, "SoRA", ls.SparseCheckpoint("kept", monitor="nothing"), max_epochs=EPOCHS)


def fit_in_stages(project, refit, *callbacks):
    """Train for one epoch with the first threshold, and two with the second."""
    stages = ls.ThresholdStages(0.01, 0.05, count=2, monitor="early", first_epochs=1, epochs=2, folder="stages")
    module = ls.SequenceClassification(str(project / "bert"), ls.SoRA(rank=4, threshold=0.01, refit=refit))
    data = ls.TextClassificationData(str(project), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=3, callbacks=[stages, *callbacks, Falls()], **quiet)
    trainer.fit(module, data)


@pytest.mark.slow
@pytest.mark.parametrize(("refit", "best"), [(0, 2 * BATCHES), (3, 3 * BATCHES)])
def test_the_last_stage_of_thresholds_is_final_or_its_refit(project, refit, best):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max")
    fit_in_stages(project, refit, keep)
    assert not progress_of("stages/stage-1.ckpt").final
    assert progress_of("stages/stage-2.ckpt").final == (refit == 0)  # the best of a stage is its first validation here
    assert step_of(keep.best_model_path) == best


@pytest.mark.slow
def test_a_refit_that_leaves_the_last_stage_no_step_is_refused(project):
    said = "pulls at gates until step 4 of 12, and the last stage begins at step 4. Lower refit, or raise epochs."
    with pytest.raises(ls.UsageError, match=re.escape(said)):
        fit_in_stages(project, 2 * BATCHES)
    fit_in_stages(project, 2 * BATCHES - 1)


def test_a_best_of_lightnings_own_that_is_dense_is_told(project):
    keep = ModelCheckpoint("kept", monitor="early", mode="max", save_last=True)
    with pytest.warns(
        UserWarning, match=r"best checkpoint by 'early' is of step 4 of 12, sparsity not final: .*step=4"
    ):
        fit(project, "SoRA", keep, Falls())


def test_the_score_beside_the_last_is_that_of_the_last(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", every_n_epochs=1)
    fit(project, "LoRA", keep, Falls())

    assert (state_of(keep.best_model_path)["current_score"], state_of("kept/last.ckpt")["current_score"]) == (
        -BATCHES,
        -STEPS,
    )


def test_a_file_holds_the_metrics_of_its_own_validation(project):
    keep = ls.SparseCheckpoint("kept", monitor="val_accuracy", mode="max")
    between = ls.SparseCheckpoint("between", every_n_train_steps=BATCHES + 1, save_top_k=-1)
    trainer = fit(project, "LoRA", keep, between)
    found = {name: float(trainer.callback_metrics[name]) for name in ("val_accuracy", "val_loss")}
    assert state_of("kept/last.ckpt")["metrics"] == found
    report = export_checkpoint("kept/last.ckpt", "lora")
    card = (report.folder / "README.md").read_text()
    assert f"| val_loss | {found['val_loss']:.4g} | validation |" in card
    held = {file.stem.partition("step=")[2]: state_of(file)["metrics"] for file in Path("between").glob("*step=*")}
    assert held == {"5": {}, "10": {}, "12": found}  # the validations were at 4, 8 and 12


# Interruptions.


@pytest.fixture
def _ctrl_c():
    """Python's own handler of Ctrl-C, also where the tests were started with that signal ignored."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


def interrupt(number):
    return lambda trainer: os.kill(os.getpid(), number)


@pytest.mark.usefixtures("_ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_told_to_stop_saves_and_goes_on_exactly(number, project, caplog):
    keep = {"monitor": "early", "mode": "max"}
    with pytest.raises(SystemExit):
        fit(project, "RoseLoRA", ls.SparseCheckpoint("kept", **keep), Falls(), At(7, interrupt(number)))
    assert step_of("kept/last.ckpt") == 7
    assert re.search(r"The last checkpoint is .*last.ckpt of step 7: resume with fit --ckpt_path", caplog.text)
    again = fit(project, "RoseLoRA", ls.SparseCheckpoint("kept", **keep), Falls(), ckpt_path="kept/last.ckpt")
    again.save_checkpoint("again.ckpt")
    fit(project, "RoseLoRA", enable_checkpointing=False).save_checkpoint("straight.ckpt")
    assert same_weights("again.ckpt", "straight.ckpt")


def test_the_command_ends_with_the_status_of_sigterm(project, monkeypatch):
    """With status 0, ``fit … && export …`` would export a part of a run."""
    monkeypatch.setattr(ls.SparseCheckpoint, "on_train_start", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", configuration(project)])
    assert ended.value.code == 143


@pytest.mark.usefixtures("_ctrl_c")
def test_a_second_ctrl_c_stops_at_once_and_saves_nothing(project):
    twice = [At(7, interrupt(signal.SIGINT)), At(7, interrupt(signal.SIGINT))]
    with pytest.raises(SystemExit):
        fit(project, "RoseLoRA", ls.SparseCheckpoint("kept"), *twice)
    assert step_of("kept/last.ckpt") == BATCHES


# What export and merge say of a state that is not final.


@pytest.fixture
def early(project):
    keep = ls.SparseCheckpoint("kept", monitor="early", mode="max", best_of="all", filename="early")
    fit(project, "SoRA", keep, Falls())
    return "kept/early.ckpt"


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_a_state_that_is_not_final_is_told_or_refused(form, early):
    found = r"'kept/early.ckpt' is of step 4 of 12, sparsity not final: it is not as sparse as at the end of the run"
    with pytest.warns(UserWarning, match=found):
        report = export_checkpoint(early, "out", form)
    assert "step 4 of 12, sparsity not final" in str(report)
    assert "Step 4 of 12, sparsity not final" in Path("out/README.md").read_text()
    with pytest.raises(ls.UsageError, match=found + ".*require_final is set"):
        export_checkpoint(early, "other", form, require_final=True)
    assert not Path("other").exists()
    export_checkpoint("kept/last.ckpt", "other", form, require_final=True)


def test_the_end_of_a_run_that_was_stopped_is_told_as_such(early):
    Path(early).rename("kept/last.ckpt")
    stopped = r"'kept/last.ckpt' is of step 4 of 12, sparsity not final: the run was stopped before"
    with pytest.warns(UserWarning, match=stopped) as told:
        export_checkpoint("kept/last.ckpt", "out")
    assert not [warning for warning in told if "keeps the end as last.ckpt" in str(warning.message)]
    with pytest.raises(ls.UsageError, match=stopped + ".*require_final is set. Go on with fit --ckpt_path"):
        export_checkpoint("kept/last.ckpt", "other", require_final=True)


def test_an_adapter_without_ranks_is_told_at_the_end_of_fit_and_in_export(project):
    nothing = "No rank is left: the adapters change nothing"
    with pytest.warns(UserWarning, match=nothing):
        fit(project, "LoRA", ls.SparseCheckpoint("kept"), Emptied())
    with pytest.warns(UserWarning, match=nothing):
        export_checkpoint("kept/last.ckpt", "out")


def test_a_checkpoint_of_an_earlier_version_is_exported_but_not_as_final(early):
    checkpoint = torch.load(early, weights_only=True)
    del checkpoint["lit_sparse"]["progress"], checkpoint["callbacks"]
    torch.save(checkpoint, "old.ckpt")
    export_checkpoint("old.ckpt", "out")
    with pytest.raises(ls.UsageError, match="does not record whether its sparsity was final"):
        export_checkpoint("old.ckpt", "other", require_final=True)


@pytest.mark.parametrize("form", ["peft", "sparse", "merged"])
def test_an_export_to_a_full_disk_is_named_as_such_and_leaves_nothing(form, early, small_disk):
    (small_disk / "full").write_bytes(bytes(280 * 1024))
    with pytest.raises(ls.UsageError, match=r"The disk is full: '.*/out' cannot be written, and nothing of it is left"):
        export_checkpoint(early, str(small_disk / "out"), form)
    assert [file.name for file in small_disk.iterdir()] == ["full"]


# Weights alone.


def test_weights_alone_are_exported_but_not_resumed(project, capsys):
    fit(project, "RoseLoRA", ls.SparseCheckpoint("kept", save_weights_only=True))
    assert progress_of("kept/last.ckpt") == Progress(STEPS, STEPS, final=True)
    export_checkpoint("kept/last.ckpt", "out", require_final=True)
    with pytest.raises(ls.UsageError, match=r"last\.ckpt' holds weights only .*start_from"):
        fit(project, "RoseLoRA", ckpt_path="kept/last.ckpt", enable_checkpointing=False)
