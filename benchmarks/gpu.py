"""The proof of the library on one GPU, in one run of at most 8 minutes.

Run:  python benchmarks/gpu.py [--json gpu.json] [--parts NAME …] [--minutes 8] [--device cuda] [--tiny]

Parts, most important first: every method against the CPU in float64; waits of the host in a step; the time of a step
and its memory for Llamas of 1B and 7B parameters, eager and with compiled blocks; kernels; compaction; quantized
backbones; strategies in one process; CUDA graphs; BERT-base and MiniLM. Weights are random (but MiniLM's, where its
package is installed), frozen weights in bfloat16 under autocast, rank 32, fused AdamW.

Every row is written as soon as it is there. What fails is a row with its error. A part that does not fit into the time
that is left is skipped, one that takes far more than its own is stopped, and one that ends the process costs nothing
but itself. It needs torch, transformers, lightning and peft; rows of other packages say where one is not installed.
--device cpu --tiny shows that everything runs.
"""

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

GRACE = 20  # seconds after its time is over in which a part may still react to the alarm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", default="gpu.json", help="where the figures are written")
    parser.add_argument("--parts", nargs="+", help="only these, by the names in the table")
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU can bear")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        sys.argv.remove("--worker")
        work(options, parser)
    else:
        sys.exit(supervise(options))


def supervise(options: argparse.Namespace) -> int:
    """Let a process work on the parts, and the next one on those that it left if it ended in one."""
    file = Path(options.json)
    file.write_text(json.dumps({"deadline": time.time() + 60 * options.minutes, "begun": {}, "results": []}))
    while True:
        process = subprocess.Popen([sys.executable, *sys.argv, "--worker"])
        while process.poll() is None:
            time.sleep(0.2)
            if time.time() > _limit(file) + GRACE:
                process.kill()
        content = json.loads(file.read_text())
        begun = [name for name, part in content["begun"].items() if not part["ended"]]
        if not process.returncode or not begun:
            return process.returncode
        for name in begun:
            error = f"the process ended with status {process.returncode}"
            content["results"].append({"part": name, "case": "the part", "error": error})
            content["begun"][name]["ended"] = True
        file.write_text(json.dumps(content, indent=1) + "\n")


def _limit(file: Path) -> float:
    """When the part that is worked on should have ended."""
    with contextlib.suppress(json.JSONDecodeError):  # it is being written
        content = json.loads(file.read_text())
        return min((p["limit"] for p in content["begun"].values() if not p["ended"]), default=content["deadline"])
    return float("inf")


def work(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    import torch
    from gpu_parts import PARTS
    from gpu_run import OutOfTime, Run
    from tables import of_gpu

    chosen = options.parts or list(PARTS)
    if set(chosen) - set(PARTS):
        parser.error(f"there are the parts {list(PARTS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu --tiny shows that everything runs")
    warnings.simplefilter("ignore")

    def over(*_: Any) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, over)
    run = Run(options.device, options.tiny, options.json)
    print(", ".join(f"{name} {value}" for name, value in run.content["versions"].items()), run.content["device"])
    for name in chosen:
        if name not in run.content["begun"]:
            one_part(run, name, PARTS[name])
    print(f"\n{of_gpu(run.content)}")


def one_part(run: Any, name: str, part: Any) -> None:
    import torch
    from gpu_run import OutOfTime, Skip

    left = run.content["deadline"] - time.time()
    limit = left if run.tiny else min(left, 2.0 * part.seconds)
    state = {"limit": time.time() + limit, "ended": False}
    # What is left of the time has to do for the rounds of steps, and then for the rows.
    run.part, run.ready_by, run.stop_at = name, state["limit"] - limit / 4, state["limit"] - limit / 10
    run.content["begun"][name] = state
    run.write()
    torch.manual_seed(0)
    begin = time.time()
    try:
        with run.case("the part", quiet=True):
            if left < part.seconds:
                raise Skip(f"takes about {part.seconds} s, and {left:.0f} s are left")
            signal.setitimer(signal.ITIMER_REAL, limit)
            part.work(run)
    except OutOfTime:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    torch._dynamo.reset()
    run.free()
    run.synchronize()  # fails after an error of the device, of which only another process is free
    state |= {"ended": True, "seconds": time.time() - begin}
    run.write()


if __name__ == "__main__":
    main()
