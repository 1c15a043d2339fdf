"""What the parts of gpu.py share: rows that are written as they come, backbones, and steps timed on the device."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import platform
import random
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tables import figure
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from variants import Batch, Variant, make_batch, minilm, provenance, ratio, write_json

import lit_sparse as ls

PACKAGES = "torch", "transformers", "lightning", "peft", "bitsandbytes", "torchao", "triton"
LLAMAS = {
    "llama-1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "llama-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
}
BERTS = {
    "bert-base": {},
    "minilm": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
}


class Skip(Exception):  # noqa: N818 - nothing went wrong
    """A case that cannot be measured here, and why."""


class OutOfTime(BaseException):
    """The time of a part is over; no ``except Exception`` of a package holds it up."""


class Timed(NamedTuple):
    """Milliseconds of a step."""

    step: float
    update: float
    """What follows the backward pass."""


class Run:
    """The device, and the file of results.

    Args:
        device: Where it is measured.
        tiny: Whether only to show that everything runs, with shapes that a CPU can bear.
        file: Written after every row; what it holds of an earlier process is kept.
    """

    def __init__(self, device: str, tiny: bool, file: str) -> None:
        self.device, self.tiny, self.file = device, tiny, file
        self.part, self.ready_by, self.stop_at = "", float("inf"), float("inf")
        self.rank, self.rounds, self.warm = (4, 2, 1) if tiny else (32, 10, 2)
        self.content: dict[str, Any] = json.loads(Path(file).read_text())
        if "versions" not in self.content:
            name = torch.cuda.get_device_name() if device == "cuda" else device
            self.content |= {**provenance(), "rank": self.rank, "versions": versions()}
            self.content["device"] = f"{name}, tiny shapes" if tiny else name

    def write(self) -> None:
        """All at once, as another process reads it."""
        write_json(f"{self.file}.new", self.content)
        Path(f"{self.file}.new").replace(self.file)

    def add(self, row: Mapping[str, Any]) -> None:
        self.content["results"].append({"part": self.part, **row})
        self.write()
        figures = ", ".join(f"{key} {figure(key, value)}" for key, value in row.items() if key != "case")
        print(f"{self.part} | {row['case']} | {figures}", flush=True)

    @contextmanager
    def case(self, name: str, quiet: bool = False) -> Iterator[dict[str, Any]]:
        """A row to fill, which says what went wrong if something did; ``quiet`` has a row only then."""
        row: dict[str, Any] = {}
        try:
            yield row
        except Skip as reason:
            row = {"skipped": str(reason)}
        except OutOfTime:
            row, quiet = {**row, "error": "out of time"}, False
            raise
        except Exception as error:
            row["error"] = described(error)
        finally:
            if not quiet or "error" in row or "skipped" in row:
                self.add({"case": name, **row})

    def require_time(self) -> None:
        """Leave out what would have to be measured in the rest of the part's time."""
        if time.time() > self.ready_by:
            raise Skip("no time is left for it")

    def free(self) -> None:
        """Give back what a part or a case held."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device, torch.bfloat16)

    def backbone(self, name: str, checkpointing: bool = True, **changes: Any) -> nn.Module:
        """A backbone in bfloat16, with random weights but for MiniLM where its package is installed."""
        with torch.device(self.device), _default(torch.bfloat16):
            model = (self._llama(name, changes) if name in LLAMAS else self._bert(name, changes)).train()
        if checkpointing:
            # The second is its name in older releases of transformers.
            enable: Any = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        return model

    def _llama(self, name: str, changes: dict[str, Any]) -> nn.Module:
        shape: dict[str, Any] = {**LLAMAS[name], "num_attention_heads": 32, "vocab_size": 32000, **changes}
        if self.tiny:
            shape |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
            shape["num_key_value_heads"] = 2
        return LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=2, pad_token_id=0, use_cache=False))

    def _bert(self, name: str, changes: dict[str, Any]) -> nn.Module:
        shape = {**BERTS[name], **changes}
        if self.tiny:
            shape |= {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
        elif name == "minilm":
            try:
                return minilm().to(self.device, torch.bfloat16)
            except ls.UsageError:  # not installed
                self.content["minilm"] = "random weights"
        return BertForSequenceClassification(BertConfig(**shape))

    def batch(self, rows: int, tokens: int) -> Batch:
        rows, tokens = (2, tokens // 64) if self.tiny else (rows, tokens)
        return {key: value.to(self.device) for key, value in make_batch(rows, tokens).items()}

    def mark(self) -> Any:
        """A moment on the stream."""
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def loss(self, variant: Variant, batch: Batch) -> torch.Tensor:
        with self.autocast():
            return variant.model(**batch).loss  # type: ignore[no-any-return]

    def step(self, variant: Variant, batch: Batch) -> Timed:
        """A training step, at whose end the host waits for the device."""
        begin = self.mark()
        self.loss(variant, batch).backward()
        passed = self.mark()
        variant.update()
        end = self.mark()
        variant.optimizer.zero_grad()
        self.synchronize()
        if self.device == "cpu":
            return Timed(1000 * (end - begin), 1000 * (end - passed))
        return Timed(begin.elapsed_time(end), passed.elapsed_time(end))

    def peak(self, variant: Variant, batch: Batch) -> float | None:
        """MiB of the parameters that are trained, their states, and the most that a step takes beside them."""
        if self.device == "cpu":
            return None
        own = [p for group in variant.optimizer.param_groups for p in group["params"]]
        states = [t for state in variant.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(variant, batch)
        return (torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in (*own, *states))) / 2**20

    def make(self, makers: Mapping[str, Callable[[], Variant]], label: str = "") -> dict[str, Variant]:
        """The variants that can be made."""
        made = {}
        for name, maker in makers.items():
            with self.case(f"{label}{name}", quiet=True):
                made[name] = maker()
        return made

    def compare(self, variants: Mapping[str, Variant], batch: Batch, label: str = "", **figures: Any) -> None:
        """Rows of the time of a step, interleaved, and its memory, for all variants that can take one."""
        ready = {}
        for name, variant in variants.items():
            with self.case(f"{label}{name}", quiet=True):
                self.require_time()
                for _ in range(self.warm):
                    self.step(variant, batch)
                ready[name] = variant
        times: dict[str, list[Timed]] = {name: [] for name in ready}
        for number in range(self.rounds):
            if number >= 3 and time.time() > self.stop_at:
                break
            for name in random.sample(list(ready), len(ready)):
                times[name].append(self.step(ready[name], batch))
        for name, own in times.items():
            with self.case(f"{label}{name}") as row:
                row |= {"ms": statistics.median(t.step for t in own), **figures}
                for peer in ("PEFT LoRA", "floor"):
                    if peer in times and len(times) > 1:
                        row[f"/ {peer}"] = ratio([t.step for t in own], [t.step for t in times[peer]])
                row["update"] = statistics.median(t.update / t.step for t in own)
                row["peak_MiB"] = self.peak(ready[name], batch)

    def launches(self, work: Callable[[], Any]) -> int:
        """Kernels that the work launches; on a CPU, operators."""
        kind = {"cpu": "cpu_op", "cuda": "kernel"}[self.device]
        both = [ProfilerActivity.CPU, ProfilerActivity.CUDA]  # without the first, kernels are lost now and then
        with profile(activities=both if self.device == "cuda" else both[:1]) as trace:
            work()
            self.synchronize()
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            trace.export_chrome_trace(file.name)
            events = json.loads(Path(file.name).read_bytes())["traceEvents"]
        return sum(event.get("cat") == kind for event in events)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "CUDA": str(torch.version.cuda)}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def described(error: Exception) -> str:
    """What went wrong, and the last place outside of torch."""
    places = [p for p in traceback.extract_tb(error.__traceback__) if "/torch/" not in p.filename] or [None]
    where = f" ({Path(places[-1].filename).name}:{places[-1].lineno})" if places[-1] else ""
    return f"{type(error).__name__}: {str(error).strip()[:300]}{where}"


@contextmanager
def _default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
