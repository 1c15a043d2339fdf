"""The sbatch file on a real SLURM of two nodes on this machine: same result, and nothing lost when it is pre-empted."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from backbones import save_tiny_bert

ROOT = Path(__file__).parent.parent
CLUSTER = str(ROOT / "examples" / "slurm" / "local_cluster.sh")
SBATCH = str(ROOT / "configs" / "slurm" / "multi_node.sbatch")
STEPS, EPOCHS = 270, 15  # of 18 steps: long enough to be interrupted

# A user's callback, found in the folder that the job was submitted from.
TELL = """
import os
from pathlib import Path
from lightning import Callback

class Places(Callback):
    def on_fit_start(self, trainer, module):
        place = f"{trainer.world_size} {trainer.node_rank} {trainer.local_rank} {os.environ.get('SLURMD_NODENAME')}"
        Path(f"place_{trainer.global_rank}.txt").write_text(place)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="SLURM's daemons need root"),
    pytest.mark.skipif(
        not all(map(shutil.which, ("slurmctld", "slurmd", "munged"))),
        reason="SLURM is not installed (Debian: apt-get install slurm-wlm munge)",
    ),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment in which sbatch finds it."""
    folder = tmp_path_factory.mktemp("cluster")
    # Tests of this file may run in two processes of pytest, each with a cluster of its own.
    port = 16817 + 10 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    environment = {**os.environ, "SLURM_PORT": str(port)}
    up = subprocess.run([CLUSTER, "up", str(folder)], capture_output=True, text=True, timeout=90, env=environment)
    if up.returncode:
        pytest.skip(f"SLURM's daemons do not run on this machine: {up.stderr[-500:]}")
    scripts = str(Path(sys.executable).parent)
    yield {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "SLURM_CONF": str(folder / "slurm.conf"),
        # Both nodes are this machine.
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port + 5),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "SAVE_EVERY": str(STEPS),
    }
    subprocess.run([CLUSTER, "down", str(folder)], check=True, timeout=60)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    save_tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    draw = random.Random(0)  # noqa: S311
    for split, count in (("train", 144), ("validation", 16)):
        rows = [{"text": " ".join(draw.choices(["film", "good", "bad"], k=5)), "label": i % 2} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "tell.py").write_text(TELL)
    return folder


def write_config(folder: Path, name: str, dropout: float, batch_size: int) -> str:
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    arguments = {"rank": 4, "threshold": 0.003, "density": 0.2, "begin": 0.1, "end": 0.6, "dropout": dropout}
    config: dict[str, Any] = {
        "seed_everything": 0,
        "model": {
            "class_path": "lit_sparse.SequenceClassification",
            "init_args": {
                "backbone": str(folder / "bert"),
                "method": {"class_path": "lit_sparse.GatedRoseLoRA", "init_args": arguments},
            },
        },
        "data": {
            "class_path": "lit_sparse.TextClassificationData",
            "init_args": {"data_files": files, "batch_size": batch_size},
        },
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": EPOCHS,
            "check_val_every_n_epoch": EPOCHS,
            "log_every_n_steps": 10,
            "gradient_clip_val": 1.0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
            "callbacks": [
                {"class_path": "lit_sparse.VerifyReplicas", "init_args": {"every_n_steps": 100}},
                {"class_path": "tell.Places"},
            ],
        },
    }
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def submit(cluster: dict[str, str], config: str, strategy: str, *overrides: str) -> str:
    """The number of the job."""
    nodes = ["--ntasks-per-node=1", "--gpus-per-node=0", "--cpus-per-task=1"]
    command = ["sbatch", "--parsable", *nodes, SBATCH, config, strategy, *overrides]
    return subprocess.run(command, env=cluster, check=True, capture_output=True, text=True).stdout.strip()


def field(cluster: dict[str, str], job: str, name: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], env=cluster, check=True, capture_output=True, text=True)
    return next(word.partition("=")[2] for word in shown.stdout.split() if word.startswith(f"{name}="))


def wait_for(happened: Any, what: str, job: str, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"{what} did not happen: {Path(f'slurm-{job}.out').read_text()[-3000:]}"
        time.sleep(0.2)


def trained(job: str, cluster: dict[str, str]) -> dict[str, torch.Tensor]:
    """What the job ends with."""
    wait_for(lambda: field(cluster, job, "JobState") not in ("PENDING", "RUNNING", "COMPLETING"), "the end", job)
    assert field(cluster, job, "JobState") == "COMPLETED", Path(f"slurm-{job}.out").read_text()[-3000:]
    (file,) = Path("runs", job, "checkpoints").glob(f"*step={STEPS}.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]  # type: ignore[no-any-return]


def test_two_nodes_equal_one_process(cluster: dict[str, str], project: Path) -> None:
    shutil.copy(project / "tell.py", ".")
    job = submit(cluster, write_config(project, "two", 0.0, 4), "ddp")
    two = trained(job, cluster)
    places = [Path(f"place_{process}.txt").read_text() for process in (0, 1)]
    assert places == ["2 0 0 n1", "2 1 0 n2"]  # processes, number of the node, number on it, name of the node
    one = write_config(project, "one", 0.0, 8)
    kept = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", "--trainer.callbacks.dirpath=one"]
    command = [sys.executable, "-m", "lit_sparse", "fit", "--config", one, *kept]
    subprocess.run(command, check=True, capture_output=True, timeout=240)
    (file,) = Path("one").glob("*.ckpt")
    alone = torch.load(file, weights_only=True)["state_dict"]
    assert alone.keys() == two.keys()
    for name, value in alone.items():
        torch.testing.assert_close(two[name], value, rtol=0, atol=1e-6)
        assert torch.equal(two[name] == 0, value == 0), name


def test_a_job_that_is_pre_empted_ends_as_one_that_is_not(cluster: dict[str, str], project: Path) -> None:
    shutil.copy(project / "tell.py", ".")
    config = write_config(project, "dropout", 0.2, 4)
    straight = trained(submit(cluster, config, "fsdp2"), cluster)
    job = submit(cluster, config, "fsdp2")
    steps = Path("runs", job)
    wait_for(lambda: any(csv.stat().st_size > 0 for csv in steps.rglob("metrics.csv")), "training", job)
    subprocess.run(["scancel", "--signal=USR1", job], env=cluster, check=True)
    wait_for(lambda: any(steps.glob("hpc_ckpt_*.ckpt")), "the checkpoint", job)
    resumed = trained(job, cluster)
    assert field(cluster, job, "Restarts") == "1"
    log = Path(f"slurm-{job}.out").read_text()
    assert "SLURM ends the job: saving after step" in log
    assert "Restored all states from the checkpoint at" in log
    assert straight.keys() == resumed.keys()
    assert [name for name, value in straight.items() if not torch.equal(value, resumed[name])] == []
