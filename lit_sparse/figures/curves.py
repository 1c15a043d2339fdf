"""Logged values over the steps of a run: panels for ranks, densities, losses and metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import COLOURS, new_figure, open_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curves = Mapping[str, Sequence[tuple[int, float]]]
"""Name of a logged value to pairs of step and value, in the order of the steps."""

_PREFIX = "sparsity/"
_RANKS = f"{_PREFIX}rank/"


def _is_loss(name: str) -> bool:
    return "loss" in name


_PANELS: dict[str, Callable[[str], bool]] = {
    "live ranks per layer": lambda name: name == f"{_PREFIX}mean_rank",
    "live ranks by kind of layer": lambda name: name.startswith(_RANKS),
    "density": lambda name: name.startswith(f"{_PREFIX}density"),
    "loss": lambda name: _is_loss(name) and not name.startswith(_PREFIX),
    "metric": lambda name: name.startswith(("val", "test")) and not _is_loss(name),
}


def panels(curves: Curves) -> dict[str, Curves]:
    """Panel title to curves; panels without curves are left out."""
    found = {title: {n: c for n, c in curves.items() if wanted(n) and c} for title, wanted in _PANELS.items()}
    return {title: own for title, own in found.items() if own}


def curve_figure(curves: Curves, step: int | None = None) -> Figure:
    """A panel each for ranks, densities, losses and metrics, as far as they were logged.

    Args:
        curves: Logged values.
        step: Step of a checkpoint, drawn as a vertical line.

    Raises:
        UsageError: If none of these was logged, or matplotlib is not installed.
    """
    drawn = panels(curves)
    rows, columns = (len(drawn) + 1) // 2, min(2, len(drawn))
    figure = new_figure(5.2 if columns < 2 else 9.6, 2.7 * max(1, rows))
    if not drawn:
        raise UsageError(
            f"There are no curves to draw among {sorted(curves)}: ranks and densities are logged by SparsityMonitor, "
            "losses and metrics have names with 'loss', or that begin with 'val' or 'test'."
        )
    for place, (title, own) in enumerate(drawn.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        open_axes(axes)
        axes.set_title(title, loc="left", fontsize=10)
        _draw(axes, own)
        if step is not None:
            axes.axvline(step, color="#888888", linewidth=0.9, linestyle=":")
        axes.set_xlim(left=0)
        if title not in ("loss", "metric"):
            axes.set_ylim(bottom=0)
    return figure


def _draw(axes: Axes, curves: Curves) -> None:
    for i, (name, curve) in enumerate(curves.items()):
        steps, values = [step for step, _ in curve], [value for _, value in curve]
        dot = "o" if len(curve) < 40 else None
        style = "-" if i < len(COLOURS) else "--"
        label = name.removeprefix(_RANKS).removeprefix(_PREFIX)
        axes.plot(steps, values, style, color=COLOURS[i % len(COLOURS)], marker=dot, ms=3, lw=1.5, label=label)
    axes.set_xlabel("optimizer step", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(frameon=False, fontsize=7, ncols=2 if len(curves) > 5 else 1)
