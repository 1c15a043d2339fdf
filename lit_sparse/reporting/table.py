"""The table of layers and its totals, in words and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_sparse.adapters.naming import common_start
from lit_sparse.methods.progress import Trained, left
from lit_sparse.reporting.sources import Adapters
from lit_sparse.reporting.stored import LayerFigures

UNKNOWN = "–"


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Args:
        head: Above it.
        meaning: In words.
        value: The figure of a layer, None where it is not known.
        form: How it is written, as for ``str.format``.
    """

    head: str
    meaning: str
    value: Callable[[LayerFigures], float | None]
    form: str

    def cell(self, layer: LayerFigures) -> str:
        """The figure of a layer as it is written."""
        value = self.value(layer)
        return UNKNOWN if value is None else self.form.format(value)


RANK = Column("rank", "ranks whose gate is not zero, of those at the start", lambda f: f.sparsity.rank, "{:d}")

COLUMNS = (
    Column("alpha", "numerator of the scale", lambda f: f.alpha, "{:g}"),
    Column("A", "share of A that is not zero", lambda f: f.sparsity.density_A, "{:.3f}"),
    Column("B", "share of B that is not zero", lambda f: f.sparsity.density_B, "{:.3f}"),
    Column("BA", "share of the frozen weight that BA can change", lambda f: f.sparsity.density_BA, "{:.3f}"),
    Column("bound", "the most that share can be (RoseLoRA's Prop. 1)", lambda f: f.sparsity.density_BA_bound, "{:.3f}"),
    Column("|A|", "Frobenius norm of A in live ranks", lambda f: f.norm_A, "{:#.3g}"),
    Column("|B|", "Frobenius norm of B in live ranks", lambda f: f.norm_B, "{:#.3g}"),
    Column("|ΔW|", "Frobenius norm of scale · B diag(gate) A", lambda f: f.norm_BA, "{:#.3g}"),
    Column("left", "remaining parameters", lambda f: f.sparsity.remaining_parameters, "{:,d}"),
    Column("bytes", "A, B and gate as they are stored", lambda f: f.bytes, "{:,d}"),
)


@dataclass(frozen=True)
class Totals:
    """Figures of all layers together.

    Args:
        rank: Ranks whose gate is not zero.
        max_rank: Ranks at the start.
        empty_layers: Layers without any rank left.
        remaining_parameters: Non-zero entries of A and B in live ranks.
        changed: Share of the adapted weights that BA can change.
        bytes: What A, B and gates take as they are stored; None if only a table is stored.
    """

    rank: int
    max_rank: int
    empty_layers: int
    remaining_parameters: int
    changed: float
    bytes: int | None


def totals(adapters: Adapters) -> Totals:
    """Add the layers up."""
    layers = [figure.sparsity for figure in adapters.figures]
    sizes = [figure.bytes for figure in adapters.figures if figure.bytes is not None]
    began = adapters.trained or Trained.of(layers)
    return Totals(
        rank=sum(layer.rank for layer in layers),
        max_rank=began.ranks,
        empty_layers=sum(layer.rank == 0 for layer in layers),
        remaining_parameters=sum(layer.remaining_parameters for layer in layers),
        changed=sum(layer.density_BA * layer.adapted_parameters for layer in layers) / began.weights,
        bytes=sum(sizes) if len(sizes) == len(layers) else None,
    )


def text_table(adapters: Adapters) -> str:
    """The table and its totals as lines of text."""
    common = common_start(figure.sparsity.name for figure in adapters.figures)
    columns = [column for column in COLUMNS if any(column.value(figure) is not None for figure in adapters.figures)]
    head = ["layer", RANK.head, *(column.head for column in columns)]
    rows = [
        [
            figure.sparsity.name[len(common) :],
            f"{figure.sparsity.rank}/{figure.sparsity.max_rank}",
            *(column.cell(figure) for column in columns),
        ]
        for figure in adapters.figures
    ]
    together = totals(adapters)
    last = {"left": together.remaining_parameters, "bytes": together.bytes}
    sums = [f"{last[c.head]:,}" if c.head in last else "" for c in columns]
    ending = ["all layers", f"{together.rank}/{together.max_rank}", *sums]
    lines = [head, *rows, ending]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    written = ["  ".join([line[0].ljust(widths[0]), *_right(line[1:], widths[1:])]).rstrip() for line in lines]
    rule = "─" * max(map(len, written))
    return "\n".join(
        [
            heading(adapters),
            f"Layers of {common.rstrip('.') or 'the model'}:",
            "",
            *[written[0], rule, *written[1:-1], rule, written[-1]],
            "",
            f"{left([figure.sparsity for figure in adapters.figures], adapters.trained)}.",
            *notes(adapters),
        ]
    )


def heading(adapters: Adapters) -> str:
    """What was read, in one line."""
    method = f", trained by {adapters.method}" if adapters.method else ""
    step = f", {adapters.step:,} steps" if adapters.step is not None else ""
    step = step if adapters.progress is None else f", {adapters.progress}"
    on = f", on {adapters.backbone}" if adapters.backbone else ""
    return f"{adapters.name}: {adapters.kind}{method}{step}{on}"


def notes(adapters: Adapters) -> list[str]:
    """Sentences on what the figures leave out."""
    found = []
    if not adapters.layers:
        found.append("Norms, gates and the support of BA are not in the logs: give a checkpoint to see them.")
    elif any(figure.scale is None for figure in adapters.figures):
        found.append("The file names no scale and no experts: norms of BA are without it, and a layer is one matrix.")
    if adapters.arguments.get("init_weights") == "pissa":
        found.append("PiSSA changed the frozen weights at the start, beyond what is counted here.")
    return found


def _right(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
