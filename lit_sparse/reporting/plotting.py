"""Figures of adapters, in a model or where they are stored; needs the ``plot`` extra."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.figures.canvas import save
from lit_sparse.figures.curves import curve_figure
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import rank_figure
from lit_sparse.reporting.pictures import stored_support
from lit_sparse.reporting.sources import read_adapters


def plot_ranks(adapters: nn.Module | str | Path, output: str | Path) -> None:
    """Draw the rank that is left in every adapted layer: blocks from left to right, kinds of layer downward.

    Args:
        adapters: A model with adapters, the ``sparsity.csv`` that :class:`~lit_sparse.SparsityMonitor` wrote, or any
            source of :func:`~lit_sparse.write_report`.
        output: Picture to write; its ending says the format.

    Raises:
        UsageError: If matplotlib is not installed, or there is no adapter to draw.
    """
    if isinstance(adapters, nn.Module):
        layers = layer_sparsity(adapters)
    elif Path(adapters).suffix == ".csv":
        layers = read_table(Path(adapters))
    else:
        layers = read_adapters(adapters).table
    save(rank_figure(layers), output)


def plot_gates(adapters: nn.Module | str | Path, output: str | Path) -> None:
    """Draw how the gates are spread, those at exactly zero apart.

    Args:
        adapters: A model with adapters, or a source of :func:`~lit_sparse.write_report` with A and B in it.
        output: Picture to write; its ending says the format.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or there are no gates.
    """
    save(gate_figure(read_adapters(adapters).gates), output)


def plot_curves(run: str | Path, output: str | Path, metrics: str | Path | None = None) -> None:
    """Draw ranks, densities, losses and metrics over the steps of a run.

    Args:
        run: A source of :func:`~lit_sparse.write_report` with a metrics.csv.
        output: Picture to write; its ending says the format.
        metrics: The metrics.csv; None: the one that lies with the source.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or nothing of these was logged.
    """
    adapters = read_adapters(run, metrics)
    save(curve_figure(adapters.curves, adapters.step), output)


def plot_support(adapters: nn.Module | str | Path, output: str | Path, layer: str | None = None) -> None:
    """Draw where BA can change a frozen weight, and by how much: a spy plot.

    Args:
        adapters: A model with adapters, or a source of :func:`~lit_sparse.write_report` with A and B in it.
        output: Picture to write; its ending says the format.
        layer: Full name of the layer, or trailing parts of it; None: the one with the largest change.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or there is no such layer.
    """
    save(stored_support(read_adapters(adapters).layer(layer)), output)
