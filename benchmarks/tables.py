"""The tables of docs/performance.md, from the files that the benchmarks wrote.

Run:  python benchmarks/tables.py

A table stands between ``<!-- results/NAME.json -->`` and ``<!-- end -->``, and is written there anew from
benchmarks/results/NAME.json.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


def step_table(backbone: str, rows: int, result: dict[str, Any]) -> str:
    """The table of one setting of step_time.py."""
    depth = f", {result['layers']} layers" if result["layers"] else ""
    lines = [
        f"{backbone}{depth}, rank {result['rank']}, dropout {result['dropout']:g}, {rows} × {result['tokens']} tokens:",
        "",
        "| | ms | wall | / PEFT LoRA (quartiles) | / floor | update | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        against = ["", ""]
        if "/ PEFT LoRA" in row:
            half, low, high = row["/ PEFT LoRA"]
            against[0] = f"{half:.3f} ({low:.3f} to {high:.3f})"
        if "/ floor" in row:
            against[1] = f"{row['/ floor'][0]:.3f}"
        lines.append(
            f"| {name} | {row['ms']:.0f} | {row['wall_ms']:.0f} | {against[0]} | {against[1]} | {row['update']:.1%} | "
            f"{row['peak_MiB']:.0f} |"
        )
    return "\n".join(lines)


def slopes(results: Sequence[dict[str, Any]]) -> str:
    """How the time of a step grows with tokens and layers, where results differ in one of them alone."""
    lines = []
    for axis in ("tokens", "layers", "rank"):
        values = sorted({result[axis] for result in results})
        if len(values) < 3 or len(values) < len(results):
            continue
        for name in results[0]["variants"]:
            found = [result["variants"][name]["ms"] for result in sorted(results, key=lambda r: r[axis])]
            lines.append(f"| {name} | {axis}: {', '.join(map(str, values))} | {_slope(values, found):.2f} |")
    return "\n".join(["| | over | slope |", "|---|---|---|", *lines]) if lines else ""


def _slope(values: Sequence[float], milliseconds: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(v) for v in values], [math.log(m) for m in milliseconds]).slope


def of_step_time(content: dict[str, Any]) -> str:
    tables = [step_table(content["backbone"], content["rows"], result) for result in content["results"]]
    grown = slopes(content["results"])
    return "\n\n".join([*tables, grown] if grown else tables)


def compaction_table(result: dict[str, Any]) -> str:
    """The table of one rank of compaction.py."""
    lines = [
        f"Rank {result['rank']}:",
        "",
        "| | ranks | ms | / all ranks (quartiles) | / PEFT LoRA |",
        "|---|---|---|---|---|",
    ]
    for name, ms in result["ms"].items():
        half, low, high = result["/ all ranks"][name]
        peer = result["/ PEFT LoRA"][name][0]
        lines.append(
            f"| {name} | {result['ranks'][name]} | {ms:.0f} | {half:.3f} ({low:.3f} to {high:.3f}) | {peer:.3f} |"
        )
    steps = result["break_even_steps"]
    pays = "which no step saves" if steps is None else f"which {steps:.2f} steps save"
    return "\n".join([*lines, "", f"To take the ranks out costs {result['compact_ms']:.1f} ms, {pays}."])


def of_compaction(content: dict[str, Any]) -> str:
    return "\n\n".join(compaction_table(result) for result in content["results"])


def of_overhead(content: dict[str, Any]) -> str:
    lines = ["| | ratio | quartiles |", "|---|---|---|"]
    for name, (half, low, high) in content["results"].items():
        spread = "" if low == high else f"{low:.3f} to {high:.3f}"
        lines.append(f"| {name} | {half:.3g} | {spread} |")
    return "\n".join(lines)


def of_startup(content: dict[str, Any]) -> str:
    lines = ["| | seconds |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {seconds:.2f} |" for name, seconds in content["results"].items())])


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_time": of_step_time,
    "compaction": of_compaction,
    "overhead": of_overhead,
    "startup": of_startup,
}


def table(name: str) -> str:
    """What stands in the page for a file of results."""
    content = json.loads((HERE / "results" / f"{name}.json").read_text())
    made = KINDS[name.partition("-")[0]](content)
    source = ", ".join(f"{key} {content[key]}" for key in ("torch", "peft", "cpu", "threads", "commit"))
    return f"{made}\n\nCommand: `{content['command']}`; {source}."


def written(page: str) -> str:
    """The page with all its tables."""
    pattern = re.compile(r"(<!-- results/(.+?)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
