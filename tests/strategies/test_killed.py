"""One of two processes is killed: the job ends, or torchrun starts it again and it ends as if nothing had been."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import save_tiny_bert
from programs import Program, launch
from projects import write_config

pytestmark = pytest.mark.slow

SORA = {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 4, "threshold": 0.003, "dropout": 0.2}}


def project(epochs: int) -> str:
    """A configuration of two processes that saves every 20 steps, of 16 an epoch."""
    save_tiny_bert("bert")
    words = ("good film", "bad film", "the dog runs", "a sad cat")
    for split, count in (("train", 128), ("validation", 8)):
        rows = "".join(f'{{"text": "{words[i % 4]} {words[i % 3]}", "label": {i % 2}}}\n' for i in range(count))
        Path(f"{split}.jsonl").write_text(rows)
    model = {"class_path": "lit_sparse.SequenceClassification", "init_args": {"backbone": "bert", "method": SORA}}
    files = {split: f"{split}.jsonl" for split in ("train", "validation")}
    data: dict[str, Any] = {
        "class_path": "lit_sparse.TextClassificationData",
        "init_args": {"data_files": files, "batch_size": 4},
    }
    saved = {"dirpath": "kept", "every_n_train_steps": 20}
    return write_config(
        Path("config.yaml"),
        model,
        data,
        lr=0.01,
        devices=2,
        max_epochs=epochs,
        check_val_every_n_epoch=epochs,
        logger=False,
        callbacks=[{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": saved}],
    )


def start(command: list[str], *overrides: str, **environment: str) -> Program:
    with Path("log.txt").open("a") as log:
        words = [*command, "fit", "--config", "config.yaml", *overrides]
        return Program(words, env={**os.environ, **environment}, stdout=log, stderr=log)


def children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(happened: Any, what: str) -> None:
    end = time.monotonic() + 180
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen: {Path('log.txt').read_text()[-3000:]}"
        time.sleep(0.1)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
@pytest.mark.parametrize(("strategy", "victim"), [("ddp", "first"), ("fsdp", "second")])
def test_the_job_ends_when_a_process_is_killed(strategy: str, victim: str) -> None:
    project(epochs=1000)
    process = start(["-m", "lit_sparse"], "--trainer.strategy", strategy)
    wait_until(lambda: any(Path().glob("kept/*.ckpt")), "training")
    (second,) = [pid for pid in children(process.pid) if b"lit_sparse" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    killed = time.monotonic()
    os.kill(process.pid if victim == "first" else second, signal.SIGKILL)
    assert process.wait(timeout=60) != 0
    wait_until(lambda: not Path(f"/proc/{second}").exists() or is_zombie(second), "the end of the other")
    assert time.monotonic() - killed < 60
    log = Path("log.txt").read_text()
    noticed = f"Process {int(victim == 'first')} of 2 lost another process, which was killed or failed"
    by_launcher = f"Child process with PID {second} terminated with code -9"  # Lightning looks every five seconds
    assert noticed in log or (victim == "second" and by_launcher in log)


def is_zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="children are found in Linux's /proc")
def test_torchrun_starts_again_and_ends_as_an_undisturbed_run() -> None:
    project(epochs=10)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    overrides = ["--trainer.strategy", "fsdp2", "--ckpt_path", "last"]
    # As in configs/slurm/torchrun.sbatch, for https://github.com/pytorch/pytorch/issues/135712
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = launch(2, ["-m", "lit_sparse", "fit", "--config", "config.yaml", *overrides])
    assert done.returncode == 0, done.stderr
    (file,) = Path("kept").glob("*step=160.ckpt")
    straight = torch.load(file, weights_only=True)["state_dict"]
    Path("kept").rename("straight")
    process = start([*torchrun, "-m", "lit_sparse"], *overrides, **own_store)
    wait_until(lambda: any(Path("kept").glob("*.ckpt")), "training")
    os.kill(children(process.pid)[-1], signal.SIGKILL)
    assert process.wait(timeout=300) == 0, Path("log.txt").read_text()[-3000:]
    assert "Restored all states from the checkpoint at" in Path("log.txt").read_text()
    (file,) = Path("kept").glob("*step=160.ckpt")
    resumed = torch.load(file, weights_only=True)["state_dict"]
    assert straight.keys() == resumed.keys()
    assert [name for name, value in straight.items() if not torch.equal(value, resumed[name])] == []
