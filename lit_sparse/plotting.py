"""Figures from the monitor's table; needs the ``plot`` extra."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.errors import UsageError


def plot_ranks(adapters: nn.Module | str | Path, output: str | Path) -> None:
    """Draw the rank that is left in every adapted layer: blocks from left to right, kinds of layer downward.

    Args:
        adapters: A model with adapters, or the ``sparsity.csv`` that :class:`~lit_sparse.SparsityMonitor` wrote.
        output: Picture to write; its ending says the format.

    Raises:
        UsageError: If matplotlib is not installed, or there is no adapter to draw.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError('Figures need matplotlib: pip install "lit-sparse[plot]".') from error
    layers = layer_sparsity(adapters) if isinstance(adapters, nn.Module) else read_table(Path(adapters))
    if not layers:
        raise UsageError("There is no adapter to draw: inject a method, or give the sparsity.csv of a run.")
    places = _places([layer.name for layer in layers])
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    blocks = sorted({block for _, block in places.values()})
    labels = 0.09 * max(len(kind) for kind in kinds)  # inches
    figure = Figure(figsize=(1.6 + labels + 0.6 * len(blocks), 1.2 + 0.4 * len(kinds)), layout="constrained")
    axes = figure.add_subplot()
    grid = [[float("nan")] * len(blocks) for _ in kinds]
    for layer in layers:
        kind, block = places[layer.name]
        row, column = kinds.index(kind), blocks.index(block)
        grid[row][column] = layer.rank
        dark = layer.rank > 0.6 * max(other.max_rank for other in layers)
        axes.text(column, row, str(layer.rank), ha="center", va="center", color="white" if dark else "black")
    highest = max(layer.max_rank for layer in layers)
    image = axes.imshow(grid, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    axes.set_xticks(range(len(blocks)), [str(block) if block >= 0 else "–" for block in blocks])
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set_xlabel("block")
    left, held = sum(layer.rank for layer in layers), sum(layer.max_rank for layer in layers)
    axes.set_title(f"{left} of {held} ranks remain")
    figure.colorbar(image, label="rank")
    figure.savefig(output, dpi=150)


def _places(names: list[str]) -> dict[str, tuple[str, int]]:
    """Kind of each layer (its name within its block) and number of the block, -1 outside of blocks."""
    parts = {name: name.split(".") for name in names}
    number = {name: next((i for i, part in enumerate(p) if part.isdigit()), None) for name, p in parts.items()}
    stacks = {".".join(parts[name][:i]) for name, i in number.items() if i is not None}
    places = {}
    for name, i in number.items():
        if i is None:
            places[name] = (name, -1)
        else:
            # An encoder and a decoder both have a block 0: several stacks are told apart by their names.
            kind = parts[name][i + 1 :] if len(stacks) == 1 else [*parts[name][:i], *parts[name][i + 1 :]]
            places[name] = (".".join(kind), int(parts[name][i]))
    return places
