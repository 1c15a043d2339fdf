"""benchmarks/gpu.py, rehearsed on the CPU: its parts run, and what fails costs its own row alone."""

import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_gpu import fake_gpu

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.py"
sys.path.insert(0, str(SCRIPT.parent))

pytest.importorskip("peft")
gpu_parts = pytest.importorskip("gpu_parts")
Rows = dict[str, dict[str, Any]]


def run(script: Path, folder: Path, *words: str) -> dict[str, Rows]:
    """The rows by part and case; both the interpreter and its children look for modules in ``folder`` first."""
    paths = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, str(script), "--device", "cpu", "--json", str(folder / "gpu.json"), *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((folder / "gpu.json").read_text())
    parts: dict[str, Rows] = {}
    for row in content["results"]:
        parts.setdefault(row.pop("part"), {})[row.pop("case")] = row
    return parts


@pytest.mark.slow
def test_every_part_has_figures(tmp_path: Path) -> None:
    parts = run(SCRIPT, tmp_path, "--tiny", "--minutes", "60")
    versions = json.loads((tmp_path / "gpu.json").read_text())["versions"]
    assert {"torch", "transformers", "lightning", "peft"} <= set(versions)
    assert list(parts)[:3] == ["correctness", "waits", "llama-1b"]
    assert len(parts) == 16
    for part, rows in parts.items():
        for case, row in rows.items():
            assert "error" not in row, (part, case, row)
            if "skipped" in row:
                absent = [f"{name} is not installed" for name in ("bitsandbytes", "torchao") if find_spec(name) is None]
                assert row["skipped"] in (["needs CUDA"] if part == "waits" else absent)
            elif "update" in row and part != "kernels":
                assert row["ms"] > 0
                assert 0 < row["update"] < 1
    assert all(row["as exact as the precision"] for row in parts["correctness"].values())
    assert {"32-true, SoRA, budget", "bf16-mixed, RoseLoRA"} <= set(parts["correctness"])
    for peer in ("SoRA", "RoseLoRA", "PEFT DoRA", "PEFT AdaLoRA", "floor"):
        assert parts["llama-7b"][f"1 × 2048, {peer}"]["/ PEFT LoRA"][0] > 0
    ours, theirs = parts["kernels"]["SoRA"], parts["kernels"]["PEFT LoRA"]
    assert 0 < ours["forward"] < theirs["forward"]
    assert 0 < ours["backward"] < theirs["backward"]
    assert 4 * parts["compaction"]["compact()"]["ranks"] == parts["compaction"]["compact()"]["of"] == 56
    assert set(parts["strategies"]) == {"auto", "ddp", "fsdp", "fsdp2"}
    assert {parts["strategies"][name]["backend"] for name in ("ddp", "fsdp", "fsdp2")} == {"gloo"}
    assert all(row["losses differ by"] < 1e-5 for row in parts["strategies"].values())
    blocks = parts["llama-1b compiled"]
    for name in ("floor", "PEFT LoRA", "SoRA", "RoseLoRA"):
        assert blocks[f"compiled: {name}"]["breaks"] == 0
        assert blocks[f"8 × 512, {name}"]["ms"] > 0
    assert blocks["compiled: SoRA"]["graphs"] == 1  # for all blocks, and for RoseLoRA's, as below
    assert blocks["compiled: RoseLoRA"]["graphs"] == 0
    graphs = parts["reduce-overhead"]["graphs, SoRA"]
    assert (graphs["graphs"], graphs["breaks"], graphs["refused"]) == (1, 0, 0)


class Event:
    """A moment, as CUDA's."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: "Event") -> float:
        return 1000 * (end.at - self.at)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["correctness", "waits", "llama-1b", "compaction", "quantized", "encoders"])
def test_devices_are_not_mixed(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of CUDA itself is answered here; the rest is as on a GPU."""
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"results": []}))
    with fake_gpu() as gpu:
        monkeypatch.setattr(torch.cuda, "Event", Event)
        for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "set_sync_debug_mode"):
            monkeypatch.setattr(torch.cuda, name, lambda *mode: gpu.waits.clear() if mode == ("error",) else None)
        for name in ("memory_allocated", "max_memory_allocated", "get_device_name"):
            monkeypatch.setattr(torch.cuda, name, lambda: 0)
        found = gpu_parts.Run("cuda", True, str(file))
        gpu_parts.PARTS[part].work(found)
        assert part != "waits" or gpu.waits == []  # none in the last step
    rows = found.content["results"]
    assert len(rows) > 4
    assert not [row for row in rows if "error" in row]


WITHOUT = """
import importlib.metadata, sys
names = {"datasets", "jsonargparse", "bitsandbytes", "torchao"}
sys.modules.update(dict.fromkeys(names))
found = importlib.metadata.distribution

def distribution(name):
    if name in names:
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)

importlib.metadata.distribution = distribution
"""


@pytest.mark.slow
def test_it_needs_no_package_but_those_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    parts = run(SCRIPT, tmp_path, "--tiny", "--minutes", "60", "--parts", "waits", "quantized", "strategies")
    assert parts["waits"]["SoRA"] == {"skipped": "needs CUDA"}
    assert parts["quantized"]["nf4"] == {"skipped": "bitsandbytes is not installed"}
    assert parts["quantized"]["int8"] == {"skipped": "torchao is not installed"}
    assert parts["quantized"]["bf16, SoRA"]["ms"] > 0
    assert parts["strategies"]["fsdp2"]["losses differ by"] < 1e-5
    versions = json.loads((tmp_path / "gpu.json").read_text())["versions"]
    assert versions["torchao"] == versions["bitsandbytes"] == "not installed"


PLANTED = f"""
import json, os, sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
import gpu

def three_cases(run):
    for number in range(3):
        with run.case(f"case {{number}}") as row:
            row["ms"] = 1 / (number - 1)

def raises(run):
    raise ValueError("before any case")

def hangs(run):
    with run.case("short") as row:
        row["ms"] = 1.0
    with run.case("long"):
        try:
            time.sleep(60)
        except Exception:
            pass

def dies(run):
    with run.case("first") as row:
        row["ms"] = 1.0
    os._exit(3)

def reads(run):
    with run.case("file") as row:
        row["parts"] = " ".join(row["part"] for row in json.load(open(run.file))["results"])

if "--worker" in sys.argv:  # the process beside it needs no torch
    import gpu_parts

    works = {{"three": three_cases, "raises": raises, "hangs": hangs, "dies": dies, "late": reads, "reads": reads}}
    gpu_parts.PARTS = {{
        name: gpu_parts.Part(work, 600 if name == "late" else 1) for name, work in works.items()
    }}
gpu.main()
"""


@pytest.mark.slow
def test_what_fails_costs_its_own_row(tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    parts = run(script, tmp_path, "--minutes", "5")
    assert list(parts) == ["three", "raises", "hangs", "dies", "late", "reads"]
    assert (parts["three"]["case 0"], parts["three"]["case 2"]) == ({"ms": -1.0}, {"ms": 1.0})
    assert parts["three"]["case 1"]["error"].startswith("ZeroDivisionError: division by zero (planted.py:")
    assert parts["raises"]["the part"]["error"].startswith("ValueError: before any case")
    assert parts["hangs"]["short"] == {"ms": 1.0}
    assert parts["hangs"]["long"] == {"error": "out of time"}
    assert parts["dies"]["first"] == {"ms": 1.0}
    assert parts["dies"]["the part"] == {"error": "the process ended with status 3"}
    assert parts["late"]["the part"]["skipped"].startswith("takes about 600 s, and ")
    # All rows of the parts before it were in the file.
    rows = {"three": 3, "raises": 1, "hangs": 3, "dies": 2, "late": 1}
    assert parts["reads"]["file"]["parts"].split() == [part for part, number in rows.items() for _ in range(number)]
