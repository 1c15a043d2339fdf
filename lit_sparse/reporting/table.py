"""The table of layers and its totals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.naming import common_start
from lit_sparse.adapters.statistics import LayerSparsity, live_ranks
from lit_sparse.methods.progress import Trained, left
from lit_sparse.reporting.stored import StoredAdapters

UNKNOWN = "–"


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Args:
        head: Above it.
        meaning: In words.
        value: The number of a layer; its second argument is None where only a table is stored.
        form: How it is written, as for ``str.format``.
    """

    head: str
    meaning: str
    value: Callable[[LayerSparsity, LayerFactors | LayerEntries | None], float | None]
    form: str

    def cell(self, value: float | None) -> str:
        """A number as the table shows it."""
        return UNKNOWN if value is None else self.form.format(value)


def _norm(factors: LayerFactors | LayerEntries | None, part: Literal["lora_A", "lora_B_t"]) -> float | None:
    return (
        None
        if not isinstance(factors, LayerFactors)
        else float(getattr(factors, part)[live_ranks(factors)].double().norm())
    )


def _change(factors: LayerFactors | LayerEntries | None) -> float | None:
    return None if factors is None else float(factors.change_norms.norm())


_COLUMNS = (
    Column("alpha", "numerator of the scale", lambda _, f: None if f is None else f.alpha, "{:g}"),
    Column("A", "share of A that is not zero", lambda layer, _: layer.density_A, "{:.3f}"),
    Column("B", "share of B that is not zero", lambda layer, _: layer.density_B, "{:.3f}"),
    Column("BA", "share of the frozen weight that can change", lambda layer, _: layer.density_BA, "{:.3f}"),
    Column("bound", "upper bound of that share (RoseLoRA's Prop. 1)", lambda x, _: x.density_BA_bound, "{:.3f}"),
    Column("|A|", "Frobenius norm of A in live ranks", lambda _, f: _norm(f, "lora_A"), "{:#.3g}"),
    Column("|B|", "Frobenius norm of B in live ranks", lambda _, f: _norm(f, "lora_B_t"), "{:#.3g}"),
    Column("|ΔW|", "Frobenius norm of the change, such as scale · B diag(gate) A", lambda _, f: _change(f), "{:#.3g}"),
    Column("left", "remaining parameters", lambda layer, _: layer.remaining_parameters, "{:,d}"),
    Column(
        "bytes",
        "stored size of A, B and gate, or of values and places",
        lambda _, f: None if f is None else f.nbytes,
        "{:,d}",
    ),
)


@dataclass(frozen=True)
class Table:
    """The numbers of all layers.

    Args:
        columns: Those that the source has numbers for.
        rows: Full layer name to live ranks, ranks at the start and a number for each column.
    """

    columns: list[Column]
    rows: dict[str, tuple[int, int, list[float | None]]]


def table_of(adapters: StoredAdapters) -> Table:
    """Compute the numbers of all layers, and leave out the columns without any."""
    factors = adapters.layers
    values = [[column.value(layer, factors.get(layer.name)) for layer in adapters.table] for column in _COLUMNS]
    known = [i for i, column in enumerate(values) if any(value is not None for value in column)]
    rows = {
        layer.name: (layer.rank, layer.max_rank, [values[i][number] for i in known])
        for number, layer in enumerate(adapters.table)
    }
    return Table([_COLUMNS[i] for i in known], rows)


@dataclass(frozen=True)
class Totals:
    """Sums over all layers.

    Args:
        rank: Live ranks.
        max_rank: Ranks at the start.
        empty_layers: Layers without any live rank or changed entry.
        remaining_parameters: Non-zero entries of A and B in live ranks.
        changed: Share of the adapted weights that BA can change.
        nbytes: Stored size of A, B and gates, or of values and places; None if only a table is stored.
    """

    rank: int
    max_rank: int
    empty_layers: int
    remaining_parameters: int
    changed: float
    nbytes: int | None


def totals(adapters: StoredAdapters) -> Totals:
    """Add up the layers."""
    layers = adapters.table
    began = adapters.trained or Trained.of(layers)
    return Totals(
        rank=sum(layer.rank for layer in layers),
        max_rank=began.ranks,
        empty_layers=sum(layer.remaining_parameters == 0 for layer in layers),
        remaining_parameters=sum(layer.remaining_parameters for layer in layers),
        changed=sum(layer.density_BA * layer.adapted_parameters for layer in layers) / began.weights,
        nbytes=sum(layer.nbytes for layer in adapters.layers.values()) if adapters.layers else None,
    )


def text_table(adapters: StoredAdapters) -> str:
    """The table and its totals as lines of text."""
    table, together = table_of(adapters), totals(adapters)
    common = common_start(table.rows)
    ranked = together.max_rank > 0
    lines = [["layer", *(["rank"] if ranked else []), *(column.head for column in table.columns)]]
    for name, (rank, max_rank, values) in table.rows.items():
        cells = [column.cell(value) for column, value in zip(table.columns, values, strict=True)]
        lines.append([name[len(common) :], *([f"{rank}/{max_rank}"] if ranked else []), *cells])
    last = {"left": together.remaining_parameters, "bytes": together.nbytes}
    sums = [f"{last[column.head]:,}" if column.head in last else "" for column in table.columns]
    lines.append(["all layers", *([f"{together.rank}/{together.max_rank}"] if ranked else []), *sums])
    written = aligned(lines)
    rule = "─" * max(map(len, written))
    return "\n".join(
        [
            _heading(adapters),
            f"Layers of {common.rstrip('.') or 'the model'}:",
            "",
            *[written[0], rule, *written[1:-1], rule, written[-1]],
            "",
            f"{left(adapters.table, adapters.trained)}.",
            *notes(adapters),
        ]
    )


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Lines of text with cells in columns.

    Args:
        rows: The cells of each line.
        left: Number of columns that are aligned on the left; those after them are aligned on the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    marks = [">" if number >= left else "<" for number in range(len(widths))]
    form = "  ".join(f"{{:{mark}{width}}}" for mark, width in zip(marks, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def _heading(adapters: StoredAdapters) -> str:
    method = f", trained by {adapters.method}" if adapters.method else ""
    step = f", {adapters.step:,} steps" if adapters.step is not None else ""
    step = step if adapters.progress is None else f", {adapters.progress}"
    on = f", on {adapters.backbone}" if adapters.backbone else ""
    return f"{adapters.name}: {adapters.kind}{method}{step}{on}"


def notes(adapters: StoredAdapters) -> list[str]:
    """Sentences on what the numbers leave out."""
    found = []
    if not adapters.layers:
        found.append("Norms, gates and the support of BA are not in the logs: give a checkpoint to see them.")
    elif any(isinstance(layer, LayerFactors) and layer.scale is None for layer in adapters.layers.values()):
        found.append("The file names no scale and no experts: norms of BA are without it, and a layer is one matrix.")
    start = {"pissa": "PiSSA", "lora_ga": "LoRA-GA"}.get(str(adapters.arguments.get("init_weights")))
    if start is not None:
        found.append(f"{start} changed the frozen weights at the start, beyond what is counted here.")
    return found
