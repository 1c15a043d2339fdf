"""Make matplotlib figures without its global state, and turn them into files, pixels and inline SVG."""

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
"""Readable on white as on black."""
INK = "#111111"
"""Dark letters on a light cell, which stay dark on a dark page; plain black becomes the page's own ink."""


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
    """Leave away the frame's upper and right side, and draw faint horizontal lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#8888884d", linewidth=0.6)
    axes.set_axisbelow(True)


def save(figure: Figure, output: str | Path) -> None:
    """Write a picture; the ending of ``output`` says the format."""
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
    """The picture as an ``<svg>`` element for a page of HTML: transparent, and black drawn in the page's ink.

    Args:
        figure: The picture.
        title: What it shows, for those who cannot see it; unique in the page.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    # Letters as text: they can be searched, and take the page's font. A salt of its own gives the same ids every time.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|matplotlib\.axis|\w+tick|\w*Collection)_\d+"', "", svg)
    # An image lies in the page's own data; names of XML's dialects are no addresses, and HTML does not need them.
    svg = re.sub(r' xmlns(?::\w+)?="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace("#000000", "currentColor")
    own = re.sub(r"\W+", "-", title)  # two figures of the page may have a part alike, of the same id
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return re.sub(r"<svg ", f'<svg role="img" aria-label="{title}" ', svg, count=1)
