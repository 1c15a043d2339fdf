"""SoRA's sparsifying schedule: a metric over the remaining parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_sparse.figures.canvas import COLOURS, new_figure, open_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def stage_figure(rows: Sequence[Mapping[str, float]], metric: str) -> Figure:
    """Validation metric over remaining parameters with a point for each stage; training metrics in panels below.

    Args:
        rows: ``remaining_parameters``, ``threshold``, the metric and values named ``train_…`` of each stage.
        metric: Name of the validation metric.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    trained = [name for name in rows[0] if name.startswith("train_")]
    panels = [metric, *trained]
    figure = new_figure(6.4, 2.2 * len(panels))
    remaining = [row["remaining_parameters"] for row in rows]
    for place, name in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, place + 1)
        open_axes(axes)
        axes.plot(remaining, [row[name] for row in rows], "-o", color=COLOURS[place % len(COLOURS)], ms=4, lw=1.5)
        axes.set_title(name, loc="left", fontsize=10)
        axes.tick_params(labelsize=8)
        if name == metric:
            for row in rows:
                axes.annotate(
                    f"ξ {row['threshold']:.2g}",
                    (row["remaining_parameters"], row[name]),
                    textcoords="offset points",
                    xytext=(3, 4),
                    fontsize=7,
                )
    axes.set_xlabel("parameters of the adapters that remain", fontsize=8)
    return figure
