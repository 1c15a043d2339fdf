"""What the Trainer adds to a bare loop, and what adapters add to inference.

Run:  python benchmarks/overhead.py [--rank 8] [--rows 32] [--tokens 64] [--rounds 60] [--threads 1] [--json FILE]

MiniLM-L6 with its real weights, float32 on the CPU, CPU times, interleaved. Loop: the time between two batches of a fit
by the Trainer with our module, all its callbacks and a CSV logger, against the same steps in a bare loop, both with
SoRA; and the part of it that the monitor of sparsity takes, which logs at every 50th step. Inference: the adapted
model, after compaction to 30 % of its ranks, and merged, against the frozen backbone.
"""

import argparse
import copy
import tempfile
import time
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from variants import Batch, fill, make_batch, minilm, provenance, ratio, twin, with_method, write_json

import lit_sparse as ls


class Classifier(ls.SparseModule):
    """The module, with the batch as it is."""


class Repeat(torch.utils.data.IterableDataset[Batch]):
    """One batch over and over."""

    def __init__(self, batch: Batch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Any:
        return iter([self.batch] * self.times)


class TakeTurns(L.Callback):
    """Lets another loop take a step after each of the Trainer's, and times both."""

    def __init__(self, other: Any, batch: Batch) -> None:
        self.other, self.batch = other, batch
        self.trainer_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.since: float | None = None
        self.monitor_seconds = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, ls.SparsityMonitor))
        act = monitor.on_train_batch_end

        def timed(*args: Any, **kwargs: Any) -> None:
            start = time.process_time()
            act(*args, **kwargs)
            self.monitor_seconds += time.process_time() - start

        monitor.on_train_batch_end = timed  # type: ignore[method-assign]

    def on_train_batch_end(self, *args: Any) -> None:
        if self.since is not None:
            self.trainer_seconds.append(time.process_time() - self.since)
            self.bare_seconds.append(self.other.step(self.batch).step)
        self.since = time.process_time()


def loop(options: argparse.Namespace, batch: Batch, plain: nn.Module) -> dict[str, tuple[float, float, float]]:
    method = ls.SoRA(rank=options.rank, threshold=1e-7)
    bare = with_method(twin(plain), method)
    turns = TakeTurns(bare, batch)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=options.rounds + 4,
            logger=CSVLogger(folder),
            callbacks=[turns],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        module = Classifier(twin(plain), ls.SoRA(rank=options.rank, threshold=1e-7))
        trainer.fit(module, torch.utils.data.DataLoader(Repeat(batch, options.rounds + 4), batch_size=None))
    share = turns.monitor_seconds / sum(turns.trainer_seconds)
    return {
        "Trainer / bare loop": ratio(turns.trainer_seconds[3:], turns.bare_seconds[3:]),
        "monitor / step": (share, share, share),
    }


def inference(options: argparse.Namespace, batch: Batch, plain: nn.Module) -> dict[str, tuple[float, float, float]]:
    def adapted() -> nn.Module:
        model = twin(plain)
        ls.inject(model, ls.SoRA(rank=options.rank, threshold=1e-7))
        fill(adapter.lora_B_t for _, adapter in ls.adapters_in(model))
        return model.eval()

    small = adapted()
    with torch.no_grad():
        for _, adapter in ls.adapters_in(small):
            adapter.gate[max(1, int(0.3 * options.rank)) :] = 0
    ls.compact(small)
    models = {"frozen": twin(plain).eval(), "all ranks": adapted(), "compacted": small}
    models["merged"] = ls.merge(copy.deepcopy(adapted())).eval()  # its weights change
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for number in range(2 * options.rounds + 3):
            names = list(models)
            for name in names[number % 4 :] + names[: number % 4]:
                start = time.process_time()
                models[name](**batch)
                if number >= 3:
                    times[name].append(time.process_time() - start)
    return {f"inference, {name} / frozen": ratio(seconds, times["frozen"]) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    batch, plain = make_batch(options.rows, options.tokens), minilm()
    results = {**inference(options, batch, plain), **loop(options, batch, plain)}
    for name, (half, quarter, three) in results.items():
        print(f"{name}: {half:.4f} ({quarter:.4f} to {three:.4f})")
    write_json(options.json, {**provenance(), **vars(options), "results": results})


if __name__ == "__main__":
    main()
