"""Make matplotlib figures without global state, and turn them into files, pixels and inline SVG."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_sparse.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b82c4", "#d97b29", "#2f9e6e", "#b8559b", "#7a6ff0", "#9a8b2f", "#c94f4f", "#3aa6b0")
"""Readable on white and on black."""
INK = "#111111"
"""Letters on light cells, which stay dark on a dark page; plain black becomes the page's text colour."""


def new_figure(width: float, height: float) -> Figure:
    """An empty figure.

    Args:
        width: Inches.
        height: Inches.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('Figures need matplotlib: pip install "lit-sparse[plot]".') from error
    return Figure(figsize=(width, height), layout="constrained")


def open_axes(axes: Axes) -> None:
    """Hide the upper and right side of the frame, and draw faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#8888884d", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, output: str | Path) -> None:
    """Write a figure to a file; its suffix decides the format."""
    figure.savefig(output, dpi=150)


def pixels(figure: Figure) -> Any:
    """The picture as a uint8 array of shape ``(height, width, 3)``."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    drawn = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    return np.asarray(drawn)[..., :3].copy()


def inline_svg(figure: Figure, title: str) -> str:
    """The figure as an ``<svg>`` element for an HTML page: transparent, with black in the page's text colour.

    Args:
        figure: The figure.
        title: Its description for screen readers, unique in the page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    # Letters as text can be searched and take the page's font. The salt makes ids reproducible.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|\w+tick|\w*Collection)_\d+"', "", svg)
    # HTML needs no XML namespaces.
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace("#000000", "currentColor")
    own = re.sub(r"\W+", "-", title)  # two figures of a page may have equal parts with equal ids
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', svg, count=1)
