"""A page about adapters, in one HTML file that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup, escape
from torch import nn

from lit_sparse._version import __version__
from lit_sparse.adapters.naming import common_start
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import inline_svg
from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.reporting.plotting import pictures
from lit_sparse.reporting.run_logs import scores
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.stored import StoredAdapters
from lit_sparse.reporting.table import notes, table_of, totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTIONS = {
    "ranks": ("Ranks that are left", "Blocks from left to right, kinds of layer downward; – is outside of blocks."),
    "change": ("Where the model changes", "A layer may keep many ranks and change little, or the other way round."),
    "curves": ("The run", "What was logged; the dotted line is the step of this checkpoint."),
    "gates": ("Gates", "A rank whose gate is exactly zero adds nothing and is dropped on export."),
    "support": ("Entries of ΔW", "Blank where nothing is added: merging leaves those weights untouched, bit for bit."),
}
_UNRANKED = {"change": (_CAPTIONS["change"][0], "The Frobenius norm of the change of every layer.")}
_WIDE = 9.0  # inches; a wider figure takes a row of the page to itself


def write_report(
    source: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str],
    layer: str | None = None,
    metrics: str | os.PathLike[str] | None = None,
) -> None:
    """Write a page about stored adapters: key numbers, figures and the table of layers.

    The page is one HTML file that opens without a network. No backbone is loaded: all numbers come from A,
    B and gates, or from the changed entries.

    Args:
        source: A checkpoint file of a :class:`~lit_sparse.SparseModule` or of any LightningModule with adapters, a
            folder in PEFT's format, the folder of a run's logs with its ``sparsity.csv``, or a model with adapters.
        output: HTML file to write.
        layer: Full name or suffix of the layer whose BA is drawn; None: the layer with the largest change.
        metrics: The run's metrics.csv, for curves; None: the one beside a checkpoint or a folder above it.

    Raises:
        UsageError: If the source cannot be read or holds no adapters, the layer does not exist, matplotlib is not
            installed, or ``output`` cannot be written.
    """
    adapters = read_adapters(source, metrics)
    write_page(adapters, pictures(adapters, layer), Path(output))


def write_page(adapters: StoredAdapters, drawn: Mapping[str, Figure], output: Path) -> None:
    """Write the page of :func:`write_report` with figures that are drawn already."""
    environment = Environment(
        loader=PackageLoader("lit_sparse", "reporting"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["breakable"] = lambda name: escape(name).replace(".", Markup(".<wbr>"))
    table = table_of(adapters)
    ranked = any(max_rank for _, max_rank, _ in table.rows.values())
    text = environment.get_template("page.html").render(
        title=_title(adapters),
        adapters=adapters,
        facts=_facts(adapters),
        arguments={name: value for name, value in adapters.arguments.items() if value not in (None, False, {}, [], 0)},
        tiles=_tiles(adapters),
        figures=list(_figures(adapters, drawn, ranked)),
        table=table,
        ranked=ranked,
        heads=[
            ("layer", "name of the layer"),
            *([("rank", "live ranks, of those at the start")] if ranked else []),
            *((column.head, column.meaning) for column in table.columns),
        ],
        common=common_start(table.rows),
        notes=notes(adapters),
        version=__version__,
    )
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{str(output)!r} cannot be written: {error.strerror}.") from error


def _title(adapters: StoredAdapters) -> str:
    parts = [part for part in Path(adapters.name).parts if part not in ("/", "checkpoints")]
    return " / ".join(parts[-3:]) or adapters.name


def _facts(adapters: StoredAdapters) -> dict[str, str | None]:
    step = None if adapters.step is None else f"step {adapters.step:,}"
    return {
        "method": adapters.method,
        "backbone": adapters.backbone,
        "state": str(adapters.progress) if adapters.progress else step,
        "read from": adapters.kind,
    }


def _tiles(adapters: StoredAdapters) -> list[dict[str, Any]]:
    together, layers = totals(adapters), len(adapters.table)
    empty = f"{together.empty_layers} of {layers} layers have none" if together.empty_layers else f"in {layers} layers"
    held = sum(layer.start_size for layer in adapters.layers.values())
    remaining = together.remaining_parameters
    of_all = f"of {_short(held)} at the start" if held else "entries that are not zero"
    tiles: list[tuple[str, str, str, float | None]] = [
        (name.replace("_", " "), f"{score:.4g}", f"logged at step {step:,}", None)
        for name, (step, score) in list(scores(adapters.curves, adapters.step).items())[:2]
    ]
    if together.max_rank:
        share = together.rank / together.max_rank
        tiles.append(("ranks left", f"{together.rank}", f"of {together.max_rank}; {empty}", share))
    tiles += [
        ("parameters left", _short(remaining), of_all, remaining / held if held else None),
        ("weights changed", f"{100 * together.changed:.3g} %", "of the adapted weights", together.changed),
    ]
    if together.nbytes is not None:
        words = f"{_size(4 * remaining)} in what is left, as float32"
        tiles.append(("stored", _size(together.nbytes), words, None))
    return [dict(zip(("name", "value", "words", "share"), tile, strict=True)) for tile in tiles]


def _short(number: int) -> str:
    for unit, name in ((10**9, " B"), (10**6, " M"), (10**4, " k")):
        if number >= unit:
            return f"{number / min(unit, 10**3 if unit == 10**4 else unit):.3g}{name}"
    return f"{number:,}"


def _size(number: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:.0f} B"


def _figures(adapters: StoredAdapters, drawn: Mapping[str, Figure], ranked: bool) -> Iterator[dict[str, Any]]:
    captions = _CAPTIONS if ranked else _CAPTIONS | _UNRANKED
    for name, figure in drawn.items():
        title, words = captions[name]
        shown = {title: figure}
        if name == "curves":  # a picture for each panel, so that they stand below each other on a phone
            shown = {label: curve_figure(own, adapters.step) for label, own in panels(adapters.curves).items()}
        yield {
            "name": name,
            "title": title,
            "words": words,
            "wide": name == "curves" or figure.get_figwidth() > _WIDE,
            "pictures": [(one.get_figwidth(), inline_svg(one, label)) for label, one in shown.items()],
        }
