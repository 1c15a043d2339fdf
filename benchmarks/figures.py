"""The figures of docs/quality.md and editing.md, from the results of quality.py, budgets.py and many_edits.py."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from tables import FEWEST_TASKS, METHODS, MOST_SEEDS, compare_budgets

from lit_sparse.adapters.naming import places
from lit_sparse.figures.canvas import COLOURS, INK, new_figure, open_axes, save

DOCS = Path(__file__).parents[1] / "docs"
MARKERS = ("o", "s")  # one for each round of colours


def draw_quality(cells: dict[str, dict[str, Any]]) -> None:
    """Points from LoRA by task, and the ranks that SoRA leaves in every layer by task."""
    final = [cell for cell in cells.values() if cell["phase"] == "final"]
    tasks = sorted({cell["task"] for cell in final})
    if final:
        save(_scores(final, tasks), DOCS / "quality.png")
    if sora := [cell for cell in final if cell["method"] == "SoRA"]:
        save(_ranks(sora, sorted({cell["task"] for cell in sora})), DOCS / "quality_ranks.png")


def draw_budgets(cells: dict[str, dict[str, Any]]) -> None:
    """The mean score over parameters left, with its standard error, and the best score for at most so many."""
    found = compare_budgets(cells, FEWEST_TASKS)
    more = compare_budgets(cells, FEWEST_TASKS, MOST_SEEDS)
    tasks, groups = found.tasks, found.groups
    if not groups:
        return
    figure = new_figure(8, 4)
    axes = figure.add_subplot()
    open_axes(axes)
    points = []
    for i, method in enumerate(dict.fromkeys(method for method, _ in groups)):
        line = []
        for name, budget in groups:
            if name == method:
                own = more if budget in MOST_SEEDS else found
                runs = [own.by[task, method, budget][seed]["parameters"] for task in tasks for seed in own.seeds]
                line.append((statistics.mean(runs), *_mean_and_error(own.means[method, budget])))
        points += line
        size, score, error = zip(*sorted(line), strict=True)
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS)]
        axes.errorbar(size, score, error, marker=marker, ms=4, lw=1, capsize=2, color=colour, label=method)
    sizes = sorted({round(size, -3) for size, _, _ in points})
    best = [(size, max(score for found, score, _ in points if round(found, -3) <= size)) for size in sizes]
    axes.step(*zip(*best, strict=True), where="post", color=INK, lw=0.8, ls=":", label="frontier")
    axes.set_xscale("log")
    marked = sorted(
        {round(found.by[(tasks[0], *group)][found.seeds[0]]["parameters"], -3) for group in _marked(groups)}
    )
    axes.set_xticks(marked, [f"{size:,.0f}" for size in marked], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_xlabel("parameters left")
    fewer = f"; {len(found.seeds)} at a half and an eighth" if len(found.seeds) < len(more.seeds) else ""
    axes.set_title(f"Mean score of {', '.join(tasks)} ({len(more.seeds)} seeds{fewer})", loc="left", fontsize=10)
    axes.legend(fontsize=8, ncols=4, frameon=False)
    save(figure, DOCS / "budgets.png")


def draw_many_edits(cells: dict[str, dict[str, Any]]) -> None:
    """What changes of more and more facts do, by method."""
    final = [cell for cell in cells.values() if cell["phase"] == "final" and cell["facts"]]
    if not final:
        return
    plain = cells["final/none/0/0"]["figures"]["perplexity"]["mean"]
    shown = {
        "contained_success": "answers that the model writes",
        "rephrase": "tokens after rephrased prompts",
        "locality": "tokens of other answers that stay",
        "perplexity": "perplexity of other texts",
    }
    figure = new_figure(8, 6)
    for place, (name, title) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(2, 2, place)
        open_axes(axes)
        for i, method in enumerate(sorted({cell["method"] for cell in final})):
            own = sorted((c["facts"], c["figures"][name]["mean"]) for c in final if c["method"] == method)
            facts, values = zip(*own, strict=True)
            ys = [value / plain - 1 for value in values] if name == "perplexity" else values
            axes.plot(facts, ys, "o-", ms=4, lw=1, color=COLOURS[i % len(COLOURS)], label=method)
        axes.set_xscale("log")
        axes.set_xticks(*zip(*((count, f"{count:,}") for count in sorted({c["facts"] for c in final})), strict=True))
        axes.set_xticks([], minor=True)
        axes.set_title(title, loc="left", fontsize=10)
        if name == "perplexity":
            axes.set_yscale("symlog", linthresh=0.1)
            axes.set_ylim(-0.005, 10)
            axes.set_yticks((0, 0.02, 0.1, 1, 10), ("0", "+2 %", "+10 %", "+100 %", "+1,000 %"))
            axes.set_yticks([], minor=True)
        else:
            axes.set_ylim(0, 1)
        axes.set_xlabel("facts in one change")
    figure.axes[1].legend(loc="lower left", fontsize=8, frameon=False)
    save(figure, DOCS / "many_edits.png")


def _marked(groups: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """One method for each budget, for sizes at a budget are close together."""
    return [group for group in groups if group[0] in ("LoRA", "SoRA")]


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def _scores(cells: list[dict[str, Any]], tasks: list[str]) -> Any:
    figure = new_figure(8, 3.2)
    axes = figure.add_subplot()
    open_axes(axes)
    lora = {(c["task"], c["seed"]): c["score"] for c in cells if c["method"] == "LoRA"}
    others = [method for method in METHODS if method != "LoRA"]
    for i, method in enumerate(others):
        points = [
            (tasks.index(c["task"]) + 0.18 * (i - 1.5), c["score"] - lora[c["task"], c["seed"]])
            for c in cells
            if c["method"] == method and (c["task"], c["seed"]) in lora
        ]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=COLOURS[i], ms=4, label=method)
    axes.axhline(0, color=INK, lw=0.8)
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_title("Points above LoRA with the same seed", loc="left", fontsize=10)
    axes.legend(fontsize=8, ncols=4, frameon=False)
    return figure


def _ranks(cells: list[dict[str, Any]], tasks: list[str]) -> Any:
    spots = places(cells[0]["ranks"])
    kinds = list(dict.fromkeys(kind for kind, _ in spots.values()))
    blocks = sorted({block for _, block in spots.values()})
    figure = new_figure(10, 2.4 * -(-len(tasks) // 3))
    for place, task in enumerate(tasks):
        runs = [cell["ranks"] for cell in cells if cell["task"] == task]
        grid = [[float("nan")] * len(blocks) for _ in kinds]
        for name, (kind, block) in spots.items():
            grid[kinds.index(kind)][blocks.index(block)] = statistics.mean(ranks[name] for ranks in runs)
        axes = figure.add_subplot(-(-len(tasks) // 3), 3, place + 1)
        image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=8, aspect="auto")
        axes.set_title(task, fontsize=10)
        axes.set_xticks(range(len(blocks)), [str(block) if block >= 0 else "–" for block in blocks], fontsize=7)
        axes.set_yticks(range(len(kinds)), kinds if place % 3 == 0 else [""] * len(kinds), fontsize=7)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=figure.axes, label="rank left, mean of the seeds").outline.set_visible(False)
    return figure
