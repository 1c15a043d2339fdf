"""Histogram of gates, and how many are exactly zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import COLOURS, new_figure, open_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def gate_figure(gates: list[Tensor]) -> Figure:
    """A histogram of all gates, with a separate bar for gates at exactly zero.

    Args:
        gates: The gates of each layer.

    Raises:
        UsageError: If there is no gate, or matplotlib is not installed.
    """
    figure = new_figure(5.4, 3.6)
    values = torch.cat([gate.detach().flatten().float().cpu() for gate in gates]) if gates else torch.empty(0)
    if not values.numel():
        raise UsageError("There are no gates to draw: only SoRA and methods like it have them.")
    live = values[(values != 0) & values.isfinite()]  # a diverged run still has its figure
    zeros = int((values == 0).sum())
    axes = figure.add_subplot()
    open_axes(axes)
    reach = float(live.abs().max()) if live.numel() else 1.0
    bins = 2 * min(30, max(5, live.numel() // 8)) + 1  # odd, so that zero is the middle of a bin
    width = 2 * reach / bins
    near = highest = 0
    if live.numel():
        counts = live.histc(bins, -reach, reach)
        near, highest = int(counts[bins // 2]), int(counts.max())
        label = f"{live.numel()} not zero"
        axes.hist(live.tolist(), bins=bins, range=(-reach, reach), color=COLOURS[0], label=label)
    if zeros:
        # On top of the bar of nearly zero gates, which it would hide.
        axes.bar(0, zeros, width=width, bottom=near, color=COLOURS[1], label=f"{zeros} exactly zero")
    if highest and near + zeros > 4 * highest:  # cut off the bar, which would flatten all others
        axes.set_ylim(top=2.5 * highest)
        axes.annotate(f" {zeros} ↑", (width / 2, 2.4 * highest), va="top", color=COLOURS[1], fontweight="bold")
    axes.set_xlabel("gate")
    axes.set_ylabel("ranks")
    axes.set_title(f"{zeros} of {values.numel()} gates are zero")
    axes.legend(frameon=False)
    return figure
