"""Machines on which something is missing, full, or forbidden: each command in a process of its own."""

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

PROGRAM = [sys.executable, "-m", "lit_sparse"]
FIT = ["fit", "--config", "config.yaml"]
PLAIN = {key: value for key, value in os.environ.items() if key not in ("HOME", "LC_ALL", "LANG", "COLUMNS")}
pytestmark = pytest.mark.slow


def start(words, before=None, **environment):
    variables = {**PLAIN, "HOME": os.environ.get("HOME", "/root"), **environment}
    variables = {key: value for key, value in variables.items() if value is not None}
    return subprocess.run(
        [*PROGRAM, *words], capture_output=True, env=variables, preexec_fn=before, timeout=300, check=False
    )  # fmt: skip


@contextlib.contextmanager
def launched(words):
    """A command as a terminal starts it: a shell's background jobs, these tests among them, ignore Ctrl-C."""
    process = subprocess.Popen(
        [*PROGRAM, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    with process:
        try:
            yield process
        finally:
            process.kill()


def refused(done) -> str:
    text = done.stderr.decode()
    assert done.returncode in (1, 2), text
    assert "Traceback" not in text, text
    last = text.splitlines()[-1]
    assert last.startswith("error: "), text
    return last


def worked(done) -> None:
    assert done.returncode == 0, done.stderr.decode()
    assert torch.load("kept/last.ckpt", weights_only=True)["global_step"] == 2


def test_no_home():
    worked(start(FIT, HOME=None))


def test_a_home_that_cannot_be_written():
    worked(start(FIT, HOME="/proc/nowhere", HF_HOME=None))


def test_a_terminal_that_knows_ascii_alone():
    done = start(FIT, PYTHONIOENCODING="ascii", LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
    worked(done)
    done.stdout.decode("ascii")


def test_few_open_files():
    worked(start(FIT, before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))))


def test_a_terminal_of_twenty_columns():
    worked(start(FIT, COLUMNS="20"))


def test_a_reader_that_goes_away():
    process = subprocess.Popen(
        [*PROGRAM, "fit", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    )
    process.stdout.close()
    text = process.stderr.read().decode()
    process.wait()
    assert "Traceback" not in text, text


def test_a_folder_that_cannot_be_written():
    message = refused(start([*FIT, "--trainer.callbacks.init_args.dirpath", "/proc/kept"]))
    assert "/proc/kept" in message


def test_a_disk_that_is_full():
    """The largest file that may be written is smaller than a checkpoint."""

    def small():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    Path("kept").mkdir()
    message = refused(start(FIT, before=small))
    assert "kept/last.ckpt' cannot be written (" in message
    assert not list(Path("kept").iterdir()), "half a checkpoint is left"


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from():
    with launched([*FIT, "--trainer.max_epochs", "100000"]) as process:
        while not Path("kept/last.ckpt").exists():
            time.sleep(0.05)
            assert process.poll() is None
        for _ in range(5):  # as a person would: Python drops one that falls into a destructor
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                out, err = (text.decode() for text in process.communicate(timeout=30))
                break
    assert process.returncode in (1, 130), err
    assert "Traceback" not in err, err
    assert "kept/last" in out + err, err
    steps = torch.load("kept/last.ckpt", weights_only=True)["global_step"]
    done = start([*FIT, "--ckpt_path", "last", "--trainer.max_steps", str(steps + 2), "--trainer.max_epochs", "-1"])
    assert done.returncode == 0, done.stderr.decode()
