"""The figures that can be drawn of what was read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import grid_figure, rank_figure
from lit_sparse.figures.support import support_figure
from lit_sparse.reporting.sources import Adapters
from lit_sparse.reporting.stored import StoredLayer

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def pictures(adapters: Adapters, layer: str | None) -> dict[str, Figure]:
    """Every figure that the source has the figures for, by a short name.

    Args:
        adapters: What was read.
        layer: Of which layer to draw BA; None: the one with the largest change.

    Returns:
        Some of ``ranks``, ``change``, ``curves``, ``gates`` and ``support``.

    Raises:
        UsageError: If matplotlib is not installed, or there is no such layer.
    """
    chosen = adapters.layer(layer) if adapters.layers or layer is not None else None
    found = {"ranks": rank_figure([figure.sparsity for figure in adapters.figures])}
    norms = {figure.sparsity.name: figure.norm_BA for figure in adapters.figures if figure.norm_BA is not None}
    if norms:
        found["change"] = grid_figure(norms, "Frobenius norm of ΔW", "norm", max(norms.values()), "{:.2g}")
    if panels(adapters.curves):
        found["curves"] = curve_figure(adapters.curves, adapters.step)
    if adapters.gates:
        found["gates"] = gate_figure(adapters.gates)
    if chosen is not None:
        found["support"] = stored_support(chosen)
    return found


def stored_support(layer: StoredLayer) -> Figure:
    """The spy plot of a layer; of experts, of the one that changes most."""
    copy = int(layer.change_per_copy().argmax())
    ranks = slice(copy * layer.rank, (copy + 1) * layer.rank)
    which = f", expert {copy} of {layer.copies}" if layer.copies > 1 else ""
    return support_figure(f"{layer.name}{which}", layer.lora_A[ranks], layer.scaled_lora_B_t()[ranks])
