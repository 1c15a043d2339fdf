"""lit_sparse.ExactResume: runs that are killed, and checkpoints that are damaged."""

import csv
import json
import os
import random
import re
import resource
import signal
import time
import zipfile
from contextlib import suppress
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins import TorchCheckpointIO
from programs import Program

import lit_sparse as ls
from lit_sparse.callbacks.checkpoint_files import WholeFiles, furthest_first, is_sound, usable
from lit_sparse.callbacks.resume import GRADIENTS, RANDOM_STATES

METHODS = {
    "SoRA": {"rank": 4, "sparsity_weight": 4.0, "gate_lr": 0.03, "dropout": 0.2, "freeze_zero_after": 3},
    "RoseLoRA": {"rank": 4, "density": 0.2, "begin": 0.1, "end": 0.6, "dropout": 0.2},
    "SHiRA": {"changed": 0.1, "mask": "snip", "start_batches": 3},
    "SpIEL": {"changed": 0.1, "update_every": 4, "window": 3, "replaced": 0.5},
    "HardConcreteLoRA": {"rank": 4, "budget": 0.4},
}
BATCHES, EPOCHS = 9, 4  # an odd number of batches: the last step of an epoch has one batch instead of two

TRAIN = """
import json, sys
from functools import partial

import torch
import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lit_sparse as ls

torch.set_num_threads(1)


class Tell(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        print(json.dumps([trainer.current_epoch, batch_idx]), flush=True)


def train(method, init_args, folder, compact):
    L.seed_everything(1, verbose=False)
    # A name of its own for every start: what is logged comes together from all of them.
    logs = CSVLogger(folder, "logs", flush_logs_every_n_steps=1)
    keep = ModelCheckpoint(
        f"{folder}/kept", monitor="step", mode="max", save_top_k=2, save_last=True, every_n_train_steps=1
    )
    callbacks = [keep, Tell(), *([ls.CompactRanks(2)] if compact else [])]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=%(epochs)d, accumulate_grad_batches=2, gradient_clip_val=0.5, logger=logs,
        callbacks=callbacks, val_check_interval=5, log_every_n_steps=1, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0,
    )
    module = ls.SequenceClassification(
        "bert", getattr(ls, method)(**init_args), optimizer=partial(torch.optim.AdamW, lr=0.02), lr_schedule="cosine"
    )
    data = ls.TextClassificationData("rows", batch_size=8, seed=3)
    trainer.fit(module, data, ckpt_path=ls.last_checkpoint(f"{folder}/kept"))
    trainer.save_checkpoint(f"{folder}/end.ckpt")


train(*json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    save_tiny_bert(folder / "bert")  # with dropout
    (folder / "rows").mkdir()
    draw = random.Random(0)  # noqa: S311
    for split, count in (("train", 8 * BATCHES), ("validation", 16)):
        with (folder / "rows" / f"{split}.csv").open("w", newline="") as stream:
            rows = [(("good", "bad")[i % 2] + " film" * draw.randint(1, 9), ("yes", "no")[i % 2]) for i in range(count)]
            csv.writer(stream).writerows([("text", "label"), *rows])
    (folder / "train.py").write_text(TRAIN % {"epochs": EPOCHS})
    return folder


def train(project, method, folder, kill_at=None, wait=0.0, compact=False):
    """Run until the end, or until some time after batch number ``kill_at``; how the process ended."""
    reader, writer = os.pipe()
    with (project / "errors.txt").open("a") as errors:
        words = ["train.py", json.dumps([method, METHODS[method], folder, compact])]
        process = Program(words, cwd=project, stdout=writer, stderr=errors)
    os.close(writer)
    with os.fdopen(reader) as lines:
        for batch, _ in enumerate((line for line in lines if line.startswith("[")), 1):
            if batch == kill_at:
                time.sleep(wait)
                process.kill()
    return process.wait(60)


def entries(value, path=""):
    """Every tensor and number in a checkpoint, by its place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from entries(inner, f"{path}/{key}")
    elif isinstance(value, (list, tuple)):
        for place, inner in enumerate(value):
            yield from entries(inner, f"{path}/{place}")
    else:
        yield path, value


def logged(folder):
    """Every figure that was logged, by step; where a step was logged again after a kill, the last."""
    figures = {}
    files = sorted(Path(folder).glob("logs/*/metrics.csv"), key=lambda f: int(f.parent.name.removeprefix("version_")))
    for file in files:
        with file.open() as stream:
            for row in csv.DictReader(stream):
                for name, value in row.items():
                    if value and name not in ("step", "epoch"):
                        figures[int(row["step"]), name] = value
    return figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "compact"),
    [
        ("SoRA", False),
        ("RoseLoRA", False),
        ("SHiRA", False),
        ("SpIEL", False),
        ("SoRA", True),
        ("HardConcreteLoRA", True),
    ],
)
def test_a_run_that_is_killed_again_and_again_ends_bit_for_bit_as_one_that_is_not(method, compact, project):
    """Dropout, shuffled rows, accumulation over two batches, validations and checkpoints in the middle of epochs."""
    name = f"{method}{compact}"
    assert train(project, method, f"{name}-whole", compact=compact) == 0, (project / "errors.txt").read_text()[-3000:]
    draw = random.Random(name)  # noqa: S311
    kills = 0
    for _ in range(30):
        left = train(
            project, method, f"{name}-killed", kill_at=draw.randint(2, 6), wait=draw.uniform(0, 0.05), compact=compact
        )
        if left == 0:
            break
        assert left == -signal.SIGKILL, (project / "errors.txt").read_text()[-3000:]
        kills += 1
    assert kills >= (5 if compact else 10)
    ends = [torch.load(project / f"{name}-{kind}" / "end.ckpt", weights_only=True) for kind in ("whole", "killed")]
    whole, killed = (dict(entries({k: v for k, v in end.items() if k != "callbacks"})) for end in ends)
    assert whole.keys() == killed.keys()
    assert any("sensitivity" in key for key in whole) == (method == "RoseLoRA")
    assert any("gate" in key for key in whole) == (method in {"SoRA", "HardConcreteLoRA"})
    for key, value in whole.items():
        same = torch.equal(value, killed[key]) if isinstance(value, torch.Tensor) else value == killed[key]
        assert same or "loops" in key, key
    if method == "SoRA":
        gates = [value for key, value in whole.items() if key.endswith(".gate")]
        ranks = sum(int((gate != 0).sum()) for gate in gates)
        assert 0 < ranks < 13 * 4
        assert not compact or sum(len(gate) for gate in gates) < 13 * 4
    one, other = logged(project / f"{name}-whole"), logged(project / f"{name}-killed")
    # Lightning logs a step after its checkpoint is written: being killed in between costs that line.
    assert other.items() <= one.items()
    assert len({step for step, _ in one.keys() - other.keys()}) <= kills


# What a checkpoint holds for that.


def small_run(folder, **options):
    """A model of one layer, trained for two epochs of four batches; gives the Trainer and its ModelCheckpoint."""
    keep = ModelCheckpoint(folder, save_top_k=-1, every_n_train_steps=1, save_last=True, filename="{step}")
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callbacks = [keep, ls.ExactResume()]
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=4,
        limit_val_batches=0,
        callbacks=callbacks,
        **quiet,
        **options,
    )
    return trainer, keep


def test_every_generator_goes_on_where_it_was(tmp_path):
    draws = {}

    class Draw(L.Callback):
        def __init__(self, name):
            self.name = name

        def on_train_batch_end(self, trainer, *_):
            numbers = torch.rand(1).item(), np.random.rand(), random.random()  # noqa: S311
            draws[self.name, trainer.global_step] = numbers

    trainer, _ = small_run(tmp_path / "kept")
    trainer.callbacks.insert(0, Draw("first"))
    trainer.fit(BoringModel())
    np.random.seed(7)
    random.seed(7)
    torch.manual_seed(7)
    again, _ = small_run(tmp_path / "again")
    again.callbacks.insert(0, Draw("second"))
    again.fit(BoringModel(), ckpt_path=tmp_path / "kept" / "step=5.ckpt")
    for step in (6, 7, 8):
        assert draws["second", step] == draws["first", step]
    assert ("second", 5) not in draws


def test_gradients_are_kept_between_the_batches_of_one_step_only(tmp_path):
    trainer, _ = small_run(tmp_path, accumulate_grad_batches=3)
    saved = {}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / "now.ckpt")
            saved[trainer.current_epoch, batch_idx] = torch.load(tmp_path / "now.ckpt", weights_only=True)

    trainer.callbacks.append(Save())
    trainer.fit(BoringModel())
    accumulating = {place for place, checkpoint in saved.items() if GRADIENTS in checkpoint}
    assert accumulating == {(epoch, batch) for epoch in (0, 1) for batch in (0, 1)}  # 2 ends a step, 3 the epoch
    assert saved[0, 0][GRADIENTS].keys() == {"layer.weight", "layer.bias"}
    assert all(len(checkpoint[RANDOM_STATES]) == 1 for checkpoint in saved.values())


def test_another_number_of_processes_is_pointed_out(tmp_path):
    trainer, _ = small_run(tmp_path)
    trainer.fit(BoringModel())
    checkpoint = torch.load(tmp_path / "step=5.ckpt", weights_only=True)
    checkpoint[RANDOM_STATES] *= 2
    torch.save(checkpoint, tmp_path / "two.ckpt")
    again, _ = small_run(tmp_path / "again")
    with pytest.warns(UserWarning, match="written by 2 processes and is resumed by 1: random numbers"):
        again.fit(BoringModel(), ckpt_path=tmp_path / "two.ckpt")


# Files that are damaged.


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def corrupt(file):
    with zipfile.ZipFile(file) as archive:  # somewhere in a tensor, not in the padding between two
        tensor = next(record for record in archive.infolist() if re.search(r"/data/\d+$", record.filename))
        data = archive.read(tensor)
    content = file.read_bytes()
    place = content.index(data, tensor.header_offset)
    file.write_bytes(content[:place] + bytes([data[0] ^ 1]) + content[place + 1 :])


def empty(file):
    file.write_bytes(b"")


DAMAGES = {"cut": cut, "corrupted": corrupt, "empty": empty}
every_damage = pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)


@pytest.fixture
def kept(tmp_path):
    trainer, _ = small_run(tmp_path / "kept")
    trainer.fit(BoringModel())
    os.utime(tmp_path / "kept" / "step=8.ckpt", (1, 1))  # of the same step as the last
    return tmp_path / "kept"


@every_damage
def test_a_damaged_last_checkpoint_is_passed_over_for_the_one_before(damage, kept):
    assert is_sound(kept / "last.ckpt")
    assert ls.last_checkpoint(kept) == kept / "last.ckpt"
    damage(kept / "last.ckpt")
    damage(kept / "step=8.ckpt")
    assert ls.last_checkpoint(kept) == kept / "step=7.ckpt"
    again, _ = small_run(kept.parent / "again")
    with pytest.warns(UserWarning, match=r"last\.ckpt is damaged, .* Using the older .*step=7\.ckpt"):
        again.fit(BoringModel(), ckpt_path=kept / "last.ckpt")
    assert again.global_step == 8
    (kept / "last.ckpt").unlink()
    assert ls.last_checkpoint(kept) == kept / "step=7.ckpt"


@every_damage
def test_a_damaged_checkpoint_that_was_named_is_an_error(damage, kept):
    damage(kept / "step=8.ckpt")
    (kept / "last.ckpt").unlink()
    with pytest.raises(ls.UsageError, match=r"step=8\.ckpt' is not a checkpoint or is damaged\. The newest .*step=7"):
        small_run(kept.parent / "again")[0].fit(BoringModel(), ckpt_path=kept / "step=8.ckpt")
    for file in filter(is_sound, kept.glob("*.ckpt")):
        damage(file)
    (kept / "last.ckpt").write_bytes(b"")
    with pytest.raises(ls.UsageError, match=r"last\.ckpt' is not a checkpoint .* Its folder has no other"):
        small_run(kept.parent / "again")[0].fit(BoringModel(), ckpt_path=kept / "last.ckpt")
    with pytest.raises(ls.UsageError, match=r"none\.ckpt' does not exist"):
        usable(kept / "none.ckpt")


def test_the_checkpoint_to_resume_from_is_the_furthest_whatever_the_clock_says(kept):
    os.utime(kept / "step=3.ckpt", (2**32, 2**32))
    (kept / "last.ckpt").unlink()
    assert ls.last_checkpoint(kept) == kept / "step=8.ckpt"
    # Files of other programs, which record no step, come after all that do, and among them the newest first.
    torch.save({"weights": torch.ones(2)}, kept / "foreign.ckpt")
    torch.save([1, 2], kept / "list.ckpt")
    (kept / "notes.ckpt").write_text("no checkpoint")
    for number, name in enumerate(("list", "foreign", "notes")):
        os.utime(kept / f"{name}.ckpt", (2**32 + number, 2**32 + number))
    assert ls.last_checkpoint(kept) == kept / "step=8.ckpt"
    for file in kept.glob("step=*"):
        file.unlink()
    assert ls.last_checkpoint(kept) == kept / "foreign.ckpt"


def test_the_step_is_found_without_reading_the_tensors(tmp_path):
    file = tmp_path / "large.ckpt"
    torch.save({"global_step": 7, "weights": torch.ones(2**24)}, file)  # 64 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert [found.name for found in furthest_first([file])] == ["large.ckpt"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**14  # KiB


def test_a_write_that_is_cut_short_leaves_the_old_file(kept, monkeypatch):
    old = (kept / "last.ckpt").read_bytes()

    def fail(checkpoint, stream):
        stream.write(b"the beginning")
        raise OSError("Input/output error")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(
        ls.TrainingError, match=r"cannot be written .Input/output error.\. '.*last\.ckpt' of step 8 is kept"
    ):
        WholeFiles().save_checkpoint({}, kept / "last.ckpt")
    assert (kept / "last.ckpt").read_bytes() == old
    monkeypatch.undo()
    WholeFiles().save_checkpoint({"new": 1}, kept / "last.ckpt")
    assert WholeFiles().load_checkpoint(kept / "last.ckpt") == {"new": 1}
    assert not list(kept.glob(".*"))


WRITER = """
import sys, time
import torch
from lit_sparse.callbacks.checkpoint_files import WholeFiles

def slow(checkpoint, stream):
    stream.write(b"the beginning")
    stream.flush()
    print("writing", flush=True)
    sys.stdin.read()
    stream.truncate(0)
    stream.seek(0)
    save(checkpoint, stream)

save, torch.save = torch.save, slow
WholeFiles().save_checkpoint({"of": "another job"}, "last.ckpt")
"""


@pytest.mark.slow
def test_two_jobs_in_one_folder_leave_each_others_half_written_files_alone(tmp_path):
    """A job that still writes keeps its file; what a killed one left is removed."""
    waiting, go_on = os.pipe()
    told, tell = os.pipe()
    jobs = [Program(["-c", WRITER], cwd=tmp_path, stdin=waiting, stdout=tell) for _ in range(2)]
    os.close(waiting)
    os.close(tell)
    with os.fdopen(told) as lines:
        assert [lines.readline() for _ in jobs] == ["writing\n"] * 2
    assert len(list(tmp_path.glob(".last.ckpt.*.part"))) == 2
    jobs[1].kill()
    jobs[1].wait(30)
    WholeFiles().save_checkpoint({"of": "this job"}, tmp_path / "last.ckpt")
    assert len(list(tmp_path.glob(".last.ckpt.*.part"))) == 1
    assert torch.load(tmp_path / "last.ckpt") == {"of": "this job"}
    os.close(go_on)
    assert jobs[0].wait(30) == 0
    assert torch.load(tmp_path / "last.ckpt") == {"of": "another job"}
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.filterwarnings("ignore")
def test_a_full_disk_is_named_as_such_and_what_was_saved_stays(small_disk):
    module = BoringModel()
    trainer, _ = small_run(small_disk / "kept")
    trainer.callbacks.insert(0, Fill(small_disk, step=5))
    with pytest.raises(ls.TrainingError, match="The disk is full: ") as raised:
        trainer.fit(module)
    message = str(raised.value)
    assert re.search(r"'.*step=5\.ckpt' of step 5 cannot be written\. '.*kept/last\.ckpt' of step 4 is kept", message)
    assert "Free space or set dirpath to a folder on another disk" in message
    assert torch.load(small_disk / "kept" / "last.ckpt")["global_step"] == 4
    assert not list((small_disk / "kept").glob(".*"))
    (small_disk / "filled").unlink()
    again, _ = small_run(small_disk / "kept")
    again.fit(BoringModel(), ckpt_path=ls.last_checkpoint(small_disk / "kept"))
    assert again.global_step == 8


class Fill(L.Callback):
    """Write until a disk is full, at the end of a step."""

    def __init__(self, folder, step):
        self.file, self.step = folder / "filled", step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            with suppress(OSError), self.file.open("wb", buffering=0) as stream:
                while True:
                    stream.write(bytes(1024))


def test_a_checkpoint_plugin_of_the_users_own_stays(tmp_path):
    class Own(TorchCheckpointIO):
        pass

    trainer, _ = small_run(tmp_path, plugins=[Own()])
    trainer.fit(BoringModel())
    assert type(trainer.strategy.checkpoint_io) is Own
