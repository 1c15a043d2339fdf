"""Spy plot of a change: the entries of the frozen weight that it reaches, and by how much."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lit_sparse.figures.canvas import new_figure

if TYPE_CHECKING:
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

CELLS = 320
"""Largest number of rows and of columns of cells."""


def support_figure(title: str, shape: tuple[int, int], sizes: Tensor, touched: Tensor) -> Figure:
    """The entries of one change: larger ones darker, blank outside of its support.

    Args:
        title: Title of the figure.
        shape: Rows and columns of the change.
        sizes: Size of the entries in each of its cells.
        touched: Whether an entry of the cell is in the support.

    Raises:
        UsageError: If matplotlib is not installed.
    """
    outputs, inputs = shape
    height = min(1.6, max(0.35, outputs / inputs))
    figure = new_figure(5.4, 0.9 + 3.2 * height)
    axes = figure.add_subplot()
    drawn = torch.where(touched, sizes, float("nan"))
    extent = (0, inputs, outputs, 0)
    # A few large entries would make all others pale.
    top = float(sizes[touched].quantile(0.99)) if bool(touched.any()) and touched.sum() < 2**24 else float(sizes.max())
    aspect: Literal["equal", "auto"] = "equal" if height == outputs / inputs else "auto"
    image = axes.imshow(
        drawn.numpy(), _colours(), aspect=aspect, vmin=0, vmax=top or 1, extent=extent, interpolation="nearest"
    )
    axes.set_xlabel("input")
    axes.set_ylabel("output")
    axes.set_title(title, fontsize=min(10.0, 560 / max(1, len(title))))  # so that a long name fits
    figure.colorbar(image, label="size of the change", pad=0.02).outline.set_visible(False)
    return figure


def _colours() -> Colormap:
    """Blues without the palest ones, so that small changes differ from white, which is none."""
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    blues = mpl.colormaps["Blues"]
    return ListedColormap([blues(0.2 + 0.8 * i / 255) for i in range(256)]).with_extremes(bad="white")


@torch.no_grad()
def support_cells(lora_A: Tensor, scaled_B_t: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Divide BA into at most ``cells`` by ``cells`` rectangles, without forming it.

    Args:
        lora_A: Shape ``(rank, in_features)``.
        scaled_B_t: Shape ``(rank, out_features)``.
        cells: Largest number of rows and of columns of cells.

    Returns:
        Root mean square of each cell's entries, and whether any of them is in BA's support; both of shape
        ``(rows, columns)``.
    """
    A, B_t = lora_A.detach().double().cpu(), scaled_B_t.detach().double().cpu()
    rows, columns = _parts(B_t, cells), _parts(A, cells)
    # A cell's sum of squares is ⟨BᵣᵀBᵣ, A꜀A꜀ᵀ⟩ with the parts of B and A that meet in it.
    squares = _grams(rows).flatten(1) @ _grams(columns).flatten(1).t()
    entries = torch.outer(_widths(rows), _widths(columns))
    touched = _any(rows) @ _any(columns).t() > 0
    return (squares.clamp(min=0) / entries).sqrt(), touched


def _parts(matrix: Tensor, cells: int) -> list[Tensor]:
    """The columns in parts of nearly equal width."""
    return list(matrix.tensor_split(min(cells, matrix.shape[1]), dim=1))


def _grams(parts: list[Tensor]) -> Tensor:
    return torch.stack([part @ part.t() for part in parts])


def _widths(parts: list[Tensor]) -> Tensor:
    return torch.tensor([part.shape[1] for part in parts], dtype=torch.float64)


def _any(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.ne(0).any(1) for part in parts]).double()
