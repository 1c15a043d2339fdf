"""Figures of the adapters in a model, a file or a folder; needs the ``plot`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.figures.canvas import save
from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import grid_figure, rank_figure
from lit_sparse.figures.support import CELLS, support_cells, support_figure
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.stored import StoredAdapters

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_ranks(adapters: nn.Module | str | Path, output: str | Path) -> None:
    """Draw the live ranks of every adapted layer: blocks from left to right, kinds of layers downward.

    Args:
        adapters: A model with adapters, the ``sparsity.csv`` that :class:`~lit_sparse.SparsityMonitor` wrote, or any
            source of :func:`~lit_sparse.write_report`.
        output: File to write; its suffix decides the format.

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
    """Draw a histogram of the gates, with a separate bar for gates at exactly zero.

    Args:
        adapters: A model with adapters, or a source of :func:`~lit_sparse.write_report` with A and B in it.
        output: File to write; its suffix decides the format.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or there are no gates.
    """
    save(gate_figure(read_adapters(adapters).gates), output)


def plot_curves(run: str | Path, output: str | Path, metrics: str | Path | None = None) -> None:
    """Draw ranks, densities, losses and metrics over the steps of a run.

    Args:
        run: A source of :func:`~lit_sparse.write_report` with a metrics.csv.
        output: File to write; its suffix decides the format.
        metrics: The metrics.csv; None: the one beside the source.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or none of these was logged.
    """
    adapters = read_adapters(run, metrics)
    save(curve_figure(adapters.curves, adapters.step), output)


def plot_support(adapters: nn.Module | str | Path, output: str | Path, layer: str | None = None) -> None:
    """Draw a spy plot of BA: the entries of a frozen weight that it changes, and by how much.

    Args:
        adapters: A model with adapters, or a source of :func:`~lit_sparse.write_report` with A and B in it.
        output: File to write; its suffix decides the format.
        layer: Full name or suffix of the layer; None: the layer with the largest change.

    Raises:
        UsageError: If matplotlib is not installed, the source cannot be read, or there is no such layer.
    """
    save(_support(read_adapters(adapters).layer(layer)), output)


def pictures(adapters: StoredAdapters, layer: str | None) -> dict[str, Figure]:
    """All figures that the source has data for.

    Args:
        adapters: The source.
        layer: The layer whose BA is drawn; None: the one with the largest change.

    Returns:
        Figures by short names: ``ranks``, ``change``, ``curves``, ``gates`` and ``support``, as far as they exist.

    Raises:
        UsageError: If matplotlib is not installed, or there is no such layer.
    """
    chosen = adapters.layer(layer) if adapters.layers or layer is not None else None
    found = {"ranks": rank_figure(adapters.table)} if any(layer.max_rank for layer in adapters.table) else {}
    if adapters.layers:
        norms = {name: float(factors.change_norms.norm()) for name, factors in adapters.layers.items()}
        found["change"] = grid_figure(norms, "Frobenius norm of ΔW", "norm", max(norms.values()), "{:.2g}")
    if panels(adapters.curves):
        found["curves"] = curve_figure(adapters.curves, adapters.step)
    if adapters.gates:
        found["gates"] = gate_figure(adapters.gates)
    if chosen is not None:
        found["support"] = _support(chosen)
    return found


def _support(layer: LayerFactors | LayerEntries) -> Figure:
    """The support of one layer's change; of experts, that of the expert with the largest change."""
    if isinstance(layer, LayerEntries):
        return support_figure(layer.name, layer.shape, *layer.cells(CELLS))
    expert = int(layer.change_norms.argmax())
    A, B_t = (matrix.split(layer.ranks)[expert] for matrix in (layer.lora_A, layer.scaled_lora_B_t()))
    which = f", expert {expert} of {len(layer.ranks)}" if len(layer.ranks) > 1 else ""
    shape = (layer.out_features, layer.in_features)
    return support_figure(f"{layer.name}{which}", shape, *support_cells(A, B_t, CELLS))
