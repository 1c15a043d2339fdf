"""A number for every adapted layer: blocks from left to right, kinds of layers downward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lit_sparse.adapters.naming import places
from lit_sparse.adapters.statistics import LayerSparsity
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def rank_figure(layers: Sequence[LayerSparsity]) -> Figure:
    """The live ranks of every layer.

    Raises:
        UsageError: If there is no layer or none has ranks, or matplotlib is not installed.
    """
    if layers and not any(layer.max_rank for layer in layers):
        raise UsageError("These adapters have no ranks to draw: they are changes of single entries. See plot_support.")
    left, held = sum(layer.rank for layer in layers), sum(layer.max_rank for layer in layers)
    highest = max((layer.max_rank for layer in layers), default=0)
    values = {layer.name: layer.rank for layer in layers}
    return grid_figure(values, f"{left} of {held} ranks remain", "rank", highest, "{:d}")


def grid_figure(values: Mapping[str, float], title: str, label: str, highest: float, form: str) -> Figure:
    """A cell for every layer, the darker the higher its value.

    Args:
        values: Full layer name to value, at least 0.
        title: Title of the figure.
        label: Meaning of the values, beside the colour bar.
        highest: Value of the darkest colour.
        form: Format of a value in its cell, as for ``str.format``.

    Raises:
        UsageError: If there is no layer, or matplotlib is not installed.
    """
    if not values:
        new_figure(1, 1)  # reports a missing matplotlib first
        raise UsageError("There is no adapter to draw: inject a method, or give the sparsity.csv of a run.")
    spots = places(values)
    kinds = list(dict.fromkeys(kind for kind, _ in spots.values()))
    blocks = sorted({block for _, block in spots.values()})
    names = 0.09 * max(len(kind) for kind in kinds)  # inches
    figure = new_figure(1.6 + names + 0.6 * len(blocks), 1.2 + 0.4 * len(kinds))
    axes = figure.add_subplot()
    grid = [[float("nan")] * len(blocks) for _ in kinds]
    for name, value in values.items():
        row, column = kinds.index(spots[name][0]), blocks.index(spots[name][1])
        grid[row][column] = value
        colour = "white" if value > 0.6 * highest else INK
        axes.text(column, row, form.format(value), ha="center", va="center", color=colour)
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=highest or 1, aspect="auto")
    axes.set_xticks(range(len(blocks)), [str(block) if block >= 0 else "–" for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("block")
    axes.set_title(title)
    figure.colorbar(image, label=label).outline.set_visible(False)
    return figure
