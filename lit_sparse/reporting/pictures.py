"""All figures of one source."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import grid_figure, rank_figure
from lit_sparse.figures.support import support_figure
from lit_sparse.reporting.stored import StoredAdapters

if TYPE_CHECKING:
    from matplotlib.figure import Figure


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
    found = {"ranks": rank_figure(adapters.table)}
    if adapters.layers:
        norms = {name: float(factors.change_norms.norm()) for name, factors in adapters.layers.items()}
        found["change"] = grid_figure(norms, "Frobenius norm of ΔW", "norm", max(norms.values()), "{:.2g}")
    if panels(adapters.curves):
        found["curves"] = curve_figure(adapters.curves, adapters.step)
    if adapters.gates:
        found["gates"] = gate_figure(adapters.gates)
    if chosen is not None:
        found["support"] = stored_support(chosen)
    return found


def stored_support(layer: LayerFactors) -> Figure:
    """The support of one layer's BA; of experts, that of the expert with the largest change."""
    expert = int(layer.change_norms.argmax())
    A, B_t = (matrix.split(layer.ranks)[expert] for matrix in (layer.lora_A, layer.scaled_lora_B_t()))
    which = f", expert {expert} of {len(layer.ranks)}" if len(layer.ranks) > 1 else ""
    return support_figure(f"{layer.name}{which}", A, B_t)
