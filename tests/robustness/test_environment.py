"""Machines on which something is missing, full, or forbidden: each command in a process of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import Program, run

PROGRAM = ["-m", "lit_sparse"]
FIT = ["fit", "--config", "config.yaml"]
PLAIN = {key: value for key, value in os.environ.items() if key not in ("HOME", "LC_ALL", "LANG", "COLUMNS")}
pytestmark = pytest.mark.slow


def start_anew(words, **environment):
    """Run in an interpreter of its own: it reads these variables as it starts."""
    variables = {**PLAIN, "HOME": os.environ.get("HOME", "/root"), **environment}
    variables = {key: value for key, value in variables.items() if value is not None}
    return subprocess.run(
        [sys.executable, *PROGRAM, *words], capture_output=True, text=True, env=variables, timeout=300
    )


def refused(done) -> str:
    text = done.stderr
    assert done.returncode in (1, 2), text
    assert "Traceback" not in text, text
    last = text.splitlines()[-1]
    assert last.startswith("error: "), text
    return last


def worked(done) -> None:
    assert done.returncode == 0, done.stderr
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 2


def test_no_home():
    worked(start_anew(FIT, HOME=None))


def test_a_home_that_cannot_be_written():
    worked(start_anew(FIT, HOME="/proc/nowhere", HF_HOME=None))


def test_a_terminal_that_knows_ascii_alone():
    done = start_anew(FIT, PYTHONIOENCODING="ascii", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    worked(done)
    assert done.stdout.isascii()


def test_few_open_files():
    worked(run([*PROGRAM, *FIT], limits={"NOFILE": 64}))


def test_a_terminal_of_twenty_columns():
    worked(run([*PROGRAM, *FIT], env={**os.environ, "COLUMNS": "20"}))


def test_a_reader_that_goes_away():
    reader, end = os.pipe()
    os.close(reader)
    with Path("errors.txt").open("w") as errors:
        Program([*PROGRAM, "fit", "--help"], stdout=end, stderr=errors).wait(120)
    os.close(end)
    text = Path("errors.txt").read_text()
    assert "Traceback" not in text, text


def test_a_folder_that_cannot_be_written():
    message = refused(run([*PROGRAM, *FIT, "--trainer.callbacks.init_args.dirpath", "/proc/kept"]))
    assert "/proc/kept" in message


def test_a_disk_that_is_full():
    """The largest file that may be written is smaller than a checkpoint."""

    Path("kept").mkdir()
    message = refused(run([*PROGRAM, *FIT], limits={"FSIZE": 20_000}))
    assert "kept/last.ckpt' cannot be written (" in message
    assert not list(Path("kept").iterdir()), "half a checkpoint is left"


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from():
    with Path("shown.txt").open("w") as shown:
        process = Program([*PROGRAM, *FIT, "--trainer.max_epochs", "100000"], stdout=shown, stderr=shown)
    try:
        while not Path("kept/last.ckpt").exists():
            time.sleep(0.05)
            assert process.poll() is None
        for _ in range(5):  # as a person would: Python drops one that falls into a destructor
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
                break
    finally:
        process.kill()
    text = Path("shown.txt").read_text()
    assert process.returncode in (1, 130), text
    assert "Traceback" not in text, text
    assert "kept/last" in text, text
    steps = torch.load("kept/last.ckpt", weights_only=True)["global_step"]
    done = run(
        [*PROGRAM, *FIT, "--ckpt_path", "last", "--trainer.max_steps", str(steps + 2), "--trainer.max_epochs", "-1"]
    )
    assert done.returncode == 0, done.stderr
