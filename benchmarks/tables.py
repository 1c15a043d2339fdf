"""The tables of docs/performance.md, quality.md, editing.md, engines.md, gpu.md and formats.md, from files of results.

Run:  python benchmarks/tables.py

A table stands between ``<!-- results/NAME.json -->`` and ``<!-- end -->``, and is written there anew from
benchmarks/results/NAME.json. That of docs/methods.md, of the source files, follows ``<!-- files of methods -->``.
"""

from __future__ import annotations

import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import method_files
import torch
from torchmetrics.functional import spearman_corrcoef

from lit_sparse.adapters.naming import places

HERE = Path(__file__).parent
NAMES = ("performance", "quality", "editing", "engines", "gpu", "methods", "formats")
PAGES = [HERE.parent / "docs" / f"{name}.md" for name in NAMES]
METHODS = ("LoRA", "LoRA, cap 0.1", "LoRA, cap 0.3", "AdaLoRA", "SoRA", "RoseLoRA", "gated RoseLoRA")
COMPARED = ("LoRA", "LoRA, rank 2", "AdaLoRA", "SoRA", "RoseLoRA")
FEWEST_TASKS = 3  # of the methods in the second table and in the figure of budgets.py
MOST_SEEDS = (1.0, 0.25, 0.02)  # the budgets of that table, which have more seeds than the others


def step_table(backbone: str, rows: int, result: dict[str, Any]) -> str:
    """The table of one setting of step_time.py."""
    depth = f", {result['layers']} layers" if result["layers"] else ""
    lines = [
        f"{backbone}{depth}, rank {result['rank']}, dropout {result['dropout']:g}, {rows} × {result['tokens']} tokens:",
        "",
        "| | ms | wall | / PEFT LoRA (quartiles) | / floor | update | peak, MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    compiled = any("/ eager" in row for row in result["variants"].values())
    if compiled:
        lines[-2:] = [f"{lines[-2]} / not compiled (quartiles) |", f"{lines[-1]}---|"]
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
        if compiled:
            half, low, high = row.get("/ eager", (None, None, None))
            lines[-1] += "  |" if half is None else f" {half:.3f} ({low:.3f} to {high:.3f}) |"
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


def of_entries(content: dict[str, Any]) -> str:
    """Milliseconds of each way to compute with few changed entries, by the shape of the weight."""
    shapes = list(next(iter(content["results"].values())))
    lines = [f"| ms | {' | '.join(shapes)} |", "|---|" + "---|" * len(shapes)]
    rows = ((name, *(f"{found[shape]:.1f}" for shape in shapes)) for name, found in content["results"].items())
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def of_patch_size(content: dict[str, Any]) -> str:
    """Bits of a place and sizes of files, and the time that places take."""
    lines = [
        "| | weights changed | bits of a place | entropy of random places | file / values, float32 | bfloat16 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in content["results"].items():
        lines.append(
            f"| {name} | {row['share']:.1%} | {row['bits']:.2f} | {row['entropy']:.2f} | {row['float32']:.3f} | "
            f"{row['bfloat16']:.3f} |"
        )
    write, read = (content["seconds"][name] for name in ("write", "read"))
    return "\n".join([*lines, "", f"Ten million places are written in {write:.1f} s and read in {read:.1f} s."])


Cells = dict[str, dict[str, Any]]
"""Runs of quality.py and forgetting.py, by their keys."""


def of_quality(cells: Cells) -> str:
    """Scores by task, what was promised of them, learning rates, ranks by kind of layer."""
    final = [cell for cell in cells.values() if cell["phase"] == "final"]
    by: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for cell in sorted(final, key=lambda c: c["seed"]):
        by.setdefault((cell["task"], cell["method"]), []).append(cell)
    seeds = max(map(len, by.values()), default=0)
    by = {group: runs for group, runs in by.items() if len(runs) == seeds}  # others are still being run
    methods = [m for m in METHODS if any(method == m for _, method in by)]
    tasks = sorted({task for task, _ in by if all((task, m) in by for m in methods)})
    if not tasks:
        return "No task has a final run of every method."
    parts = [
        _scores(by, tasks, methods),
        "\n".join(f"- {promise}" for promise in _promises(by, tasks, methods)),
        _grid("Learning rate of the search", tasks, methods, lambda t, m: f"{by[t, m][0]['lr']:g}"),
        *(_kept(by, tasks, m) for m in methods if m in ("AdaLoRA", "SoRA", "gated RoseLoRA")),
    ]
    return "\n\n".join(parts)


def _scores(by: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str], methods: list[str]) -> str:
    lines = [
        f"| | {' | '.join(tasks)} | mean | parameters left | weights changed | CPU seconds |",
        "|---|" + "---|" * (len(tasks) + 4),
    ]
    for method in methods:
        scores = [_spread([cell["score"] for cell in by[task, method]]) for task in tasks]
        runs = [cell for task in tasks for cell in by[task, method]]
        parameters, changed, seconds = (
            statistics.mean(cell[name] for cell in runs) for name in ("parameters", "changed", "seconds")
        )
        lines.append(
            f"| {method} | {' | '.join(scores)} | {_spread(_means(by, tasks, method))} | {parameters:,.0f} | "
            f"{changed:.1%} | {seconds:.0f} |"
        )
    return "\n".join(lines)


def _promises(by: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str], methods: list[str]) -> list[str]:
    """What is asked of SoRA and RoseLoRA, and what came of it."""
    lora = _means(by, tasks, "LoRA")

    def mean(method: str, name: str) -> float:
        return statistics.mean(cell[name] for task in tasks for cell in by[task, method])

    asked = {
        "SoRA": (-0.3, "of LoRA's parameters", 0.7, lambda: mean("SoRA", "parameters") / mean("LoRA", "parameters")),
        "RoseLoRA": (-1.0, "of the adapted weights changed", 0.1, lambda: mean("RoseLoRA", "changed")),
    }
    lines = []
    for method, (points, what, most, size) in asked.items():
        if method in methods:
            gaps = [ours - theirs for ours, theirs in zip(_means(by, tasks, method), lora, strict=True)]
            gap, share = statistics.mean(gaps), size()
            holds = "holds" if gap >= points and share <= most else "**does not hold**"
            lines.append(
                f"{method}: {_signed(gap)} points against LoRA (by seed {', '.join(map(_signed, gaps))}) with "
                f"{share:.1%} {what}; asked were {points:+.1f} and {most:.0%}: {holds}."
            )
    return lines


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # + 0.0: no -0.00


def _means(by: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str], method: str) -> list[float]:
    """The mean over the tasks, of each seed."""
    seeds = zip(*([cell["score"] for cell in by[task, method]] for task in tasks), strict=True)
    return [statistics.mean(scores) for scores in seeds]


def _kept(by: dict[tuple[str, str], list[dict[str, Any]]], tasks: list[str], method: str) -> str:
    """Mean rank that is left, by kind of layer and task."""
    kinds: dict[str, dict[str, list[int]]] = {}
    for task in tasks:
        for cell in by[task, method]:
            for name, (kind, _) in places(cell["ranks"]).items():
                kinds.setdefault(kind, {}).setdefault(task, []).append(cell["ranks"][name])
    title = f"Mean rank left, {method}"
    return _grid(title, tasks, list(kinds), lambda task, kind: f"{statistics.mean(kinds[kind][task]):.1f}")


def _grid(title: str, columns: list[str], rows: list[str], value: Callable[[str, str], str]) -> str:
    lines = [f"| {title} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {row} | {' | '.join(value(c, row) for c in columns)} |" for row in rows)])


def _spread(values: Sequence[float], digits: int = 2) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def of_budgets(cells: Cells) -> str:
    """Scores at equal parameters, differences from SoRA with their standard errors, and what the ranks mean."""
    found, more = compare_budgets(cells), compare_budgets(cells, FEWEST_TASKS, MOST_SEEDS)
    if not found.groups:
        return "No method has a final run on every task."
    parts = [
        f"Seeds: {len(found.seeds)}. The last column is the mean over the tasks of SoRA's score minus the row's, of "
        "the same seed, with its standard error; SoRA's own rows have their difference from the whole LoRA.",
        _scores_at_budgets(found, found.groups),
    ]
    if set(more.groups) - set(found.groups):
        parts += [
            f"The tasks that all methods have, at a quarter of LoRA's parameters; seeds: {len(more.seeds)}.",
            _scores_at_budgets(more, more.groups),
        ]
    return "\n\n".join(part for part in (*parts, _meaning(found)) if part)


def _scores_at_budgets(found: Budgets, groups: Sequence[tuple[str, float]]) -> str:
    by, tasks, _, seeds, means = found
    lines = [
        f"| budget | method | {' | '.join(tasks)} | mean | parameters left | weights changed | SoRA minus this |",
        "|---|---|" + "---|" * (len(tasks) + 4),
    ]
    for method, budget in groups:
        runs = [by[task, method, budget][seed] for task in tasks for seed in seeds]
        scores = [_spread([by[task, method, budget][seed]["score"] for seed in seeds]) for task in tasks]
        own = means[method, budget]
        gap = ""
        if method != "SoRA" and ("SoRA", budget) in groups:
            gap = _error([ours - theirs for ours, theirs in zip(means["SoRA", budget], own, strict=True)])
        elif method == "SoRA":
            whole = _error([ours - theirs for ours, theirs in zip(own, means["LoRA", 1.0], strict=True)])
            gap = f"LoRA: {whole}"
        lines.append(
            f"| {budget:.1%} | {method} | {' | '.join(scores)} | {_spread(own)} | "
            f"{statistics.mean(run['parameters'] for run in runs):,.0f} | "
            f"{statistics.mean(run['changed'] for run in runs):.1%} | {gap} |"
        )
    return "\n".join(lines)


class Budgets(NamedTuple):
    """Final runs that can be compared: every method on every task, with the same seeds."""

    by: dict[tuple[str, str, float], dict[int, dict[str, Any]]]
    tasks: list[str]
    groups: list[tuple[str, float]]
    seeds: list[int]
    means: dict[tuple[str, float], list[float]]
    """By method and budget: the mean over the tasks, of each seed."""


def compare_budgets(cells: Cells, fewest: int | None = None, budgets: Sequence[float] | None = None) -> Budgets:
    """What the tables and the figure of budgets.py are made of.

    Args:
        cells: The results.
        fewest: Compare all methods that have so many tasks, on the tasks that they share. None: compare on all tasks;
            what lacks one is left out.
        budgets: Budgets to compare at, on the seeds that all runs there have; None: at all budgets.
    """
    by = {group: runs for group, runs in _by_budget(cells).items() if budgets is None or group[2] in budgets}
    tasks = [task for task in sorted({t for t, _, _ in by}) if (task, "LoRA", 1.0) in by]
    if fewest is not None:
        shared = [[t for t in tasks if (t, *group) in by] for group in _groups(by)]
        tasks = [t for t in tasks if all(t in own for own in shared if len(own) >= fewest)]
    groups = [g for g in _groups(by) if tasks and all((task, *g) in by for task in tasks)]
    runs = [set(by[(task, *group)]) for task in tasks for group in groups]
    seeds = sorted(set.intersection(*runs)) if runs else []
    means = {
        group: [statistics.mean(by[(task, *group)][seed]["score"] for task in tasks) for seed in seeds]
        for group in groups
    }
    return Budgets(by, tasks, groups, seeds, means)


def _by_budget(cells: Cells) -> dict[tuple[str, str, float], dict[int, dict[str, Any]]]:
    """Final runs by task, method and budget, and in each by seed; a LoRA that was cut counts as a method."""
    by: dict[tuple[str, str, float], dict[int, dict[str, Any]]] = {}
    for cell in cells.values():
        if cell["phase"] != "final":
            continue
        by.setdefault((cell["task"], cell["method"], cell["budget"]), {})[cell["seed"]] = cell
        for budget, cut in cell.get("truncated", {}).items():
            by.setdefault((cell["task"], "truncated", float(budget)), {})[cell["seed"]] = cut
    return by


def _groups(by: dict[tuple[str, str, float], dict[int, dict[str, Any]]]) -> list[tuple[str, float]]:
    order = (
        *("LoRA", "SoRA", "uniform", "truncated", "AdaLoRA", "SoRA, λ", "HardConcreteLoRA", "GoRA", "LoRA-GA", "EVA"),
        *("RoseLoRA", "SHiRA", "LIFT", "SpIEL"),
    )
    return sorted({group[1:] for group in by}, key=lambda group: (-group[1], order.index(group[0])))


def _error(gaps: Sequence[float]) -> str:
    if len(gaps) < 2:
        return _signed(gaps[0])
    return f"{_signed(statistics.mean(gaps))} ± {statistics.stdev(gaps) / math.sqrt(len(gaps)):.2f}"


def _meaning(found: Budgets) -> str:
    """Spearman's correlation of the layers' ranks, between seeds and with the loss that a layer's adapter saves."""
    by, tasks, _, seeds, _ = found
    lines = ["| Spearman's correlation of layers' ranks | between seeds | with ablation |", "|---|---|---|"]
    for task in tasks:
        runs = [by[task, "SoRA", 0.25][seed] for seed in seeds if seed in by.get((task, "SoRA", 0.25), {})]
        pairs = [_spearman(one["ranks"], other["ranks"]) for one, other in itertools.combinations(runs, 2)]
        rises = [_spearman(run["ranks"], run["ablation"]) for run in runs if "ablation" in run]
        if pairs and rises:
            lines.append(f"| {task} | {statistics.mean(pairs):.2f} | {statistics.mean(rises):.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _spearman(one: dict[str, float], other: dict[str, float]) -> float:
    values = [[float(each[name]) for name in one] for each in (one, other)]
    return float(spearman_corrcoef(torch.tensor(values[0]), torch.tensor(values[1])))


def of_forgetting(cells: Cells) -> str:
    """Task score and probes before and after, by method and learning rate."""
    probes = list(next(iter(cells.values()))["before"])
    before = {probe: next(iter(cells.values()))["before"][probe] for probe in probes}
    titles = [f"{probe} (before {before[probe]:.2f})" for probe in probes]
    lines = [
        f"| | lr | task | {' | '.join(titles)} | weights changed |",
        "|---|---|---|" + "---|" * (len(probes) + 1),
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells.values():
        groups.setdefault((cell["method"], cell["lr"]), []).append(cell)
    for method, lr in sorted(groups, key=lambda group: (METHODS.index(group[0]), group[1])):
        runs = groups[method, lr]
        after = " | ".join(_spread([cell["after"][probe] for cell in runs]) for probe in probes)
        changed = statistics.mean(cell["changed"] for cell in runs)
        score = _spread([cell["score"] for cell in runs])
        lines.append(f"| {method} | {lr:g} | {score} | {after} | {changed:.1%} |")
    return "\n".join([*lines, *_at_equal_score(groups, probes)])


def _at_equal_score(groups: dict[tuple[str, float], list[dict[str, Any]]], probes: list[str]) -> list[str]:
    """The probes of every method beside those of a LoRA that scores the same.

    LoRA's are read off the line between the two of its learning rates whose scores lie around the method's. Rates above
    its best one are left out, with which it scores less and forgets more. A score that LoRA has on neither side has no
    line.
    """
    points = {
        group: (
            statistics.mean(c["score"] for c in runs),
            *(statistics.mean(c["after"][p] for c in runs) for p in probes),
        )
        for group, runs in groups.items()
    }
    lora = [points[group] for group in sorted(points) if group[0] == "LoRA"]
    best = max(range(len(lora)), key=lambda i: lora[i][0], default=0)
    rising = list(itertools.pairwise(lora[: best + 1]))
    lines = []
    for method, lr in sorted(points, key=lambda group: (METHODS.index(group[0]), group[1])):
        score, *own = points[method, lr]
        around = next(((low, high) for low, high in rising if low[0] <= score <= high[0] and low[0] < high[0]), None)
        if method == "LoRA" or around is None:
            continue
        low, high = around
        way = (score - low[0]) / (high[0] - low[0])
        theirs = [a + way * (b - a) for a, b in zip(low[1:], high[1:], strict=True)]
        probed = "; ".join(f"{p} {o:.2f}, LoRA's {t:.2f}" for p, o, t in zip(probes, own, theirs, strict=True))
        lines.append(f"- {method} at {lr:g}, and LoRA where it scores {score:.2f} as well: {probed}.")
    return ["", *lines] if lines else []


_OF_MANY = {
    "edit_success": "edit success",
    "contained_success": "contained success",
    "rephrase": "rephrase",
    "contained_rephrase": "contained rephrase",
    "locality": "locality",
}


def of_many_edits(cells: Cells) -> str:
    """What changes of more and more facts do, by each method, then what learning rates were chosen by."""
    plain = cells["final/none/0/0"]["figures"]
    final = [cell for cell in cells.values() if cell["phase"] == "final" and cell["facts"]]
    lines = [
        f"| | facts | lr | {' | '.join(_OF_MANY.values())} | perplexity | questions | steps | s per fact | MiB |",
        "|---|" + "---|" * (len(_OF_MANY) + 7),
    ]
    for cell in sorted(final, key=lambda cell: (cell["method"], cell["facts"])):
        figures = cell["figures"]
        shown = " | ".join(f"{figures[name]['mean']:.3f}" if name in figures else "" for name in _OF_MANY)
        more = round(figures["perplexity"]["mean"] / plain["perplexity"]["mean"] - 1, 3) + 0.0  # not -0.0
        right = f"{100 * figures['question']['mean']:.1f}" if "question" in figures else ""
        lines.append(
            f"| {cell['method']} | {cell['facts']:,} | {cell['lr']:g} | {shown} | {more:+.1%} | {right} | "
            f"{cell['mean_steps']:.1f} | {cell['seconds_per_edit']:.2f} | {cell['MiB']:.1f} |"
        )
    before = f"{plain['perplexity']['mean']:.1f} | {100 * plain['question']['mean']:.1f}"
    lines.append(f"| no edit | | | {' | ' * len(_OF_MANY)}{before} | | | |")
    return "\n\n".join(["\n".join(lines), _tried([c for c in cells.values() if c["phase"] == "search"])])


EACH = ("edit_success", "rephrase", "portability", "locality")
"""Metrics of which the value of each request is kept."""
_FIGURES = (*EACH, "fluency")


def of_editing(cells: Cells) -> str:
    """What was measured of the edits by each method, then what their settings were chosen by."""
    final = [cell for cell in cells.values() if cell["phase"] == "final"]
    sources = list(dict.fromkeys(cell["source"] for cell in final))
    parts = []
    if sources and all(source.startswith("seed ") for source in sources):
        parts.append(_edits_by(final, f"{len(sources)} seeds, ± standard deviation over them", _over_seeds))
    else:
        for source in sources:
            own = [cell for cell in final if cell["source"] == source]
            parts.append(_edits_by(own, f"{source}, ± standard error", _of_requests))
        parts.append(_edits_compared(final))
    curve = [cell for cell in cells.values() if cell["phase"] == "curve"]
    if curve:
        parts.append(_curve(curve))
    search = [cell for cell in cells.values() if cell["phase"] == "search"]
    parts.append(_tried(search))
    return "\n\n".join(part for part in parts if part)


def _edits_by(cells: list[dict[str, Any]], title: str, figure: Callable[[list[dict[str, Any]], str], str]) -> str:
    names = [name for name in _FIGURES if any(name in cell["figures"] for cell in cells)]
    measured = " | ".join(name.replace("_", " ") for name in names)
    lines = [
        f"| {title} | lr | edits | {measured} | weights changed | steps | s per edit |",
        "|---|---|---|" + "---|" * (len(names) + 3),
    ]
    for method, lr in dict.fromkeys((cell["method"], cell["lr"]) for cell in cells):
        own = [cell for cell in cells if (cell["method"], cell["lr"]) == (method, lr)]
        changed, steps, seconds = (
            statistics.mean(cell[name] for cell in own)
            for name in ("mean_changed_share", "mean_steps", "seconds_per_edit")
        )
        figures = " | ".join(figure(own, name) for name in names)
        edits = sum(cell["figures"]["edit_success"]["requests"] for cell in own)
        lines.append(f"| {method} | {lr:g} | {edits} | {figures} | {changed:.1%} | {steps:.1f} | {seconds:.2f} |")
    return "\n".join(lines)


def _of_requests(cells: list[dict[str, Any]], name: str) -> str:
    """The mean over requests, and its standard error; of each request, over the seeds."""
    if all(name in cell.get("each", {}) for cell in cells):
        return _mean_and_error(list(_over_requests(cells, name).values()))
    found = cells[0]["figures"].get(name)
    return "" if found is None else f"{found['mean']:.3f} ± {found['standard_error']:.3f}"


def _over_requests(cells: list[dict[str, Any]], name: str) -> dict[tuple[str, int], float]:
    """Source and number of each request that has a metric to its mean over the seeds."""
    found: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        for number, value in enumerate(cell["each"][name]):
            if value is not None:
                found.setdefault((cell["source"], number), []).append(value)
    return {request: statistics.mean(values) for request, values in found.items()}


def _mean_and_error(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) / len(values) ** 0.5:.3f}"


def _edits_compared(cells: list[dict[str, Any]]) -> str:
    """What RoseLoRA from keys is ahead of others by, on the same requests of all sources."""
    cells = [cell for cell in cells if "each" in cell]
    methods = list(dict.fromkeys(cell["method"] for cell in cells))
    ours = [method for method in methods if "from keys" in method]
    if not ours:
        return ""
    requests = len(_over_requests(cells, "edit_success"))
    lines = [
        f"| {requests} requests, difference ± paired standard error | {' | '.join(EACH).replace('_', ' ')} |",
        "|---|" + "---|" * len(EACH),
    ]
    for method in ours:
        for other in methods:
            if other not in ours:
                ahead = " | ".join(_ahead(cells, method, other, name) for name in EACH)
                lines.append(f"| {method}, minus {other} | {ahead} |")
    return "\n".join(lines)


def _ahead(cells: list[dict[str, Any]], ours: str, other: str, name: str) -> str:
    both = [_over_requests([cell for cell in cells if cell["method"] == method], name) for method in (ours, other)]
    return _mean_and_error([both[0][request] - both[1][request] for request in both[0] if request in both[1]])


def _over_seeds(cells: list[dict[str, Any]], name: str) -> str:
    means = [cell["figures"][name]["mean"] for cell in cells]
    return f"{statistics.mean(means):.3f} ± {statistics.stdev(means):.3f}" if len(means) > 1 else f"{means[0]:.3f}"


def _curve(cells: list[dict[str, Any]]) -> str:
    lines = ["| RoseLoRA's density | edit success | locality | weights changed |", "|---|---|---|---|"]
    for density in sorted({cell["density"] for cell in cells}):
        own = [cell for cell in cells if cell["density"] == density]
        success, locality = success_and_locality(own)
        changed = statistics.mean(cell["mean_changed_share"] for cell in own)
        lines.append(f"| {density:g} | {success:.3f} | {locality:.3f} | {changed:.1%} |")
    return "\n".join(lines)


def _tried(cells: list[dict[str, Any]]) -> str:
    """Edit success and locality of every learning rate, on the requests that settings were chosen on."""
    lines = ["| tried | lr | edit success | locality |", "|---|---|---|---|"]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["lr"]), []).append(cell)
    for (method, lr), own in sorted(groups.items()):
        success, locality = success_and_locality(own)
        lines.append(f"| {method} | {lr:g} | {success:.3f} | {locality:.3f} |")
    return "\n".join(lines)


def success_and_locality(cells: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Means over some runs of editing.py, each of which counts as much as another."""
    success, locality = (
        statistics.mean(cell["figures"][name]["mean"] for cell in cells) for name in ("edit_success", "locality")
    )
    return success, locality


def of_engines(content: dict[str, Any]) -> str:
    ranks: list[int] = content["ranks"]
    lines = [
        f"{len(ranks)} layers with ranks {ranks[0]} to {ranks[-1]} of {content['rank']}; without the adapter log "
        f"probabilities differ by {content['effect']:.2g}. llama.cpp {content['llama.cpp']}, transformers "
        f"{content['transformers']}.",
        "",
        f"| engine | format, layout | max difference of log probabilities | {content['tokens']} tokens equal |",
        "|---|---|---|---|",
    ]
    for row in content["results"]:
        equal = "yes" if row["tokens_equal"] else "no"
        lines.append(f"| {row['engine']} | {row['layout']} | {row['difference']:.1e} | {equal} |")
    return "\n".join(lines)


def of_method_comparison(cells: Cells) -> str:
    """Score, rise of the loss on other text, and sizes, by method and learning rate."""
    before = statistics.mean(cell["before"] for cell in cells.values())
    lines = [
        f"| | lr | right answers, % | rise of the loss (from {before:.3f}) | trained | stored |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for cell in cells.values():
        groups.setdefault((cell["method"], cell["lr"]), []).append(cell)
    for method, lr in sorted(groups, key=lambda group: (COMPARED.index(group[0]), group[1])):
        runs = groups[method, lr]
        score, rise = _spread([c["score"] for c in runs]), _spread([c["after"] - c["before"] for c in runs], digits=3)
        trained, stored = (round(statistics.mean(cell[key] for cell in runs)) for key in ("trained", "stored"))
        lines.append(f"| {method} | {lr:g} | {score} | {rise} | {trained:,} | {stored:,} |")
    return "\n".join(lines)


def of_preferences(content: dict[str, Any]) -> str:
    """What DPO does to held-out pairs, and its memory beside that of fine-tuning."""
    lines = [
        "| | right answer likelier before | after | reward accuracy | reward margin | peak of memory, MiB |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["results"]:
        shares = [_share(row[name]) for name in ("preferred_before", "preferred_after", "reward_accuracy")]
        margin = "" if row["reward_margin"] is None else f"{row['reward_margin']:.2f}"
        lines.append(
            f"| {row['objective']}, {row['method']} | {' | '.join(shares)} | {margin} | {row['peak_mib']:,.0f} |"
        )
    return "\n".join(lines)


def of_combining(content: dict[str, Any]) -> str:
    """What each task has left of its adapter in the sums, by the weight of both adapters."""
    rows = content["results"]
    tasks = [key for key in rows[0] if key not in ("rule", "weight", "bytes")]
    weights = list(dict.fromkeys(row["weight"] for row in rows))
    head = " | ".join(f"{task}, weights {weight:g}" for weight in weights for task in tasks)
    lines = [f"| | KiB | {head} |", "|---" * (2 + len(weights) * len(tasks)) + "|"]
    by: dict[str, dict[float, dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["rule"], {})[row["weight"]] = row
    for rule, found in by.items():
        scores = [f"{found[w][task]:.3f}" if w in found else "" for w in weights for task in tasks]
        lines.append(f"| {rule} | {next(iter(found.values()))['bytes'] / 1024:,.0f} | {' | '.join(scores)} |")
    return "\n".join(lines)


def _share(value: float | None, pairs: int = 60) -> str:
    """A share of some pairs with its standard error."""
    return "" if value is None else f"{value:.2f} ± {math.sqrt(value * (1 - value) / pairs):.2f}"


def of_packing(content: dict[str, Any]) -> str:
    """How many tokens of rows a second are trained, packed and padded."""
    lines = ["| | tokens per CPU-second | padding | / padded, shuffled (quartiles) |", "|---|---|---|---|"]
    for name, row in content["kinds"].items():
        half, low, high = row["ratio"]
        lines.append(f"| {name} | {row['speed']:.0f} | {row['padding']:.0%} | {half:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def of_precision(content: dict[str, Any]) -> str:
    """The relative error of every path, by precision and method."""
    lines: list[str] = []
    for name, row in content["results"].items():
        for method, errors in row["errors"].items():
            if not lines:
                lines = [f"| | rounding | method | {' | '.join(errors)} |", "|---" * (3 + len(errors)) + "|"]
            lines.append(
                f"| {name} | {row['eps']:.1e} | {method} | {' | '.join(f'{e:.1e}' for e in errors.values())} |"
            )
    return "\n".join(lines)


def of_gpu(content: dict[str, Any]) -> str:
    """The rows of every part of gpu.py, in columns of its own."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in content["results"]:
        parts.setdefault(row["part"], []).append(row)
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    made = [f"{content['device']}, {versions}."]
    for part, rows in parts.items():
        keys = list(dict.fromkeys(key for row in rows for key in row if key not in ("part", "case")))
        lines = [f"| {part} | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
        lines += [f"| {row['case']} | {' | '.join(figure(key, row.get(key)) for key in keys)} |" for row in rows]
        made.append("\n".join(lines))
    return "\n\n".join(made)


def figure(name: str, value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"{value[0]:.3f} ({value[1]:.3f} to {value[2]:.3f})"
    if isinstance(value, float):
        return f"{value:.2%}" if name == "update" else f"{value:.1e}" if 0 < abs(value) < 0.01 else f"{value:.4g}"
    return "" if value is None else " ".join(str(value).replace("|", "/").split())


KINDS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step_time": of_step_time,
    "compaction": of_compaction,
    "overhead": of_overhead,
    "startup": of_startup,
    "entries": of_entries,
    "patch_size": of_patch_size,
    "quality": of_quality,
    "budgets": of_budgets,
    "forgetting": of_forgetting,
    "packing": of_packing,
    "preferences": of_preferences,
    "editing": of_editing,
    "many_edits": of_many_edits,
    "method_comparison": of_method_comparison,
    "engines": of_engines,
    "gpu": of_gpu,
    "precision": of_precision,
    "combining": of_combining,
}


def table(name: str) -> str:
    """What stands in the page for a file of results."""
    file = HERE / "results" / f"{name}.json"
    if name == "gpu" and not file.exists():
        return "Not measured."
    content = json.loads(file.read_text())
    made = KINDS[name.partition("-")[0]](content)
    return f"{made}\n\n{_source(content)}."


def _source(content: dict[str, Any]) -> str:
    """Where a file comes from; those of many runs say it of each, and their commands stand in the page."""
    if "command" in content:
        source = ", ".join(f"{key} {content[key]}" for key in ("torch", "peft", "cpu", "threads", "commit"))
        return f"Command: `{content['command']}`; {source}"
    keys = ("torch", "peft", "cpu", "commit")
    found = {key: ", ".join(sorted({str(cell[key]) for cell in content.values()})) for key in keys}
    return f"{len(content)} runs; {', '.join(f'{key} {values}' for key, values in found.items())}"


def written(page: str) -> str:
    """The page with all its tables."""
    pattern = re.compile(r"(<!-- results/(.+?)\.json -->\n).*?(<!-- end -->)", re.DOTALL)
    page = pattern.sub(lambda found: f"{found[1]}\n{table(found[2])}\n\n{found[3]}", page)
    pattern = re.compile(r"(<!-- files of methods -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda found: f"{found[1]}\n{method_files.table()}\n\n{found[2]}", page)


def write() -> None:
    """Write the tables of all pages anew."""
    for page in PAGES:
        page.write_text(written(page.read_text()))


if __name__ == "__main__":
    write()
