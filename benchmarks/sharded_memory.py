"""Host memory of each process while a backbone is loaded, adapted and sharded, up to where training begins.

Run:  python benchmarks/sharded_memory.py [--strategies ddp fsdp fsdp2] [--dtypes bfloat16] [--layers 22]

A Llama of 1.1 billion random parameters (22 layers) is written to a temporary folder in bfloat16, 2.2 GB, and loaded
from there by two processes on the CPU, with SoRA on all linear layers, by a command of its own for each row. What is
counted is memory that the process itself has allocated (RssAnon, sampled every 5 ms) beyond what it had before the
Trainer began; pages of the files that are only mapped are shared by all processes and can be dropped at any time, and
are shown apart.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lit_sparse as ls

STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp": ls.SparseFSDPStrategy,
    "fsdp2": ls.SparseFSDP2Strategy,
}


class Memory(threading.Thread):
    """Peaks of this process's memory in MiB since the last look."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_at = self.now()["RssAnon"]
        self.peak = {"RssAnon": 0.0, "RssFile": 0.0}
        self.start()

    def now(self) -> dict[str, float]:
        lines = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return {name: int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")}

    def run(self) -> None:
        while True:
            for name, value in self.now().items():
                self.peak[name] = max(self.peak[name], value)
            time.sleep(0.005)

    def look(self) -> dict[str, float]:
        now = self.now()
        seen = {
            "peak": self.peak["RssAnon"] - self.start_at,
            "held": now["RssAnon"] - self.start_at,
            "mapped": self.peak["RssFile"],
        }
        self.peak = now
        return seen


class Watch(L.Callback):
    def __init__(self) -> None:
        self.memory, self.began = Memory(), time.monotonic()
        self.told: dict[str, Any] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.told = {**self.memory.look(), "seconds": time.monotonic() - self.began}


def worker(folder: str, strategy: str, dtype: str) -> None:
    method = ls.SoRA(rank=8, threshold=1e-3)
    module = ls.SparseModule(folder, method, backbone_args={"dtype": dtype})
    rows = [{"input_ids": torch.arange(16), "labels": torch.arange(16)}] * 2
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=STRATEGIES[strategy](),
        max_steps=0,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=1))
    Path(f"told_{trainer.global_rank}.json").write_text(json.dumps(watch.told))


def save_backbone(folder: str, layers: int) -> int:
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        dtype="bfloat16",
    )
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size="1GB")
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strategies", nargs="+", default=list(STRATEGIES))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16"])
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(*options.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        parameters = save_backbone(folder, options.layers)
        print(
            f"{parameters:,} parameters, two processes, torch {torch.__version__}; MiB and seconds of process 0 and 1"
        )
        for strategy in options.strategies:
            for dtype in options.dtypes:
                launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
                command = [sys.executable, *launch, str(Path(__file__).resolve()), "--worker", folder, strategy, dtype]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(command, check=True, cwd=folder, env=environment, capture_output=True)
                told = [json.loads(Path(folder, f"told_{rank}.json").read_text()) for rank in (0, 1)]
                figures = {key: [round(t[key], 1) for t in told] for key in told[0]}
                print(f"{strategy:6} {dtype:9} {figures}", flush=True)


if __name__ == "__main__":
    main()
