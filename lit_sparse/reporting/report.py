"""A page about stored adapters, in one HTML file that needs nothing else."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_sparse._version import __version__
from lit_sparse.adapters.naming import common_start
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import inline_svg
from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.reporting.page import PAGE
from lit_sparse.reporting.pictures import pictures
from lit_sparse.reporting.run_logs import scores
from lit_sparse.reporting.sources import Adapters, read_adapters
from lit_sparse.reporting.stored import LayerFigures
from lit_sparse.reporting.table import COLUMNS, RANK, UNKNOWN, Column, notes, totals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTIONS = {
    "ranks": ("Ranks that are left", "Blocks from left to right, kinds of layer downward; – is outside of blocks."),
    "change": ("Where the model changes", "A layer may keep many ranks and change little, or the other way round."),
    "curves": ("The run", "What was logged; the dotted line is the step of this checkpoint."),
    "gates": ("Gates", "A rank whose gate is exactly zero adds nothing and is dropped on export."),
    "support": ("Entries of ΔW", "Blank where no rank reaches: merging leaves those weights untouched, bit for bit."),
}
_WIDE = 9.0  # inches; a wider figure takes a row of the page to itself


def write_report(
    source: nn.Module | str | os.PathLike[str],
    output: str | os.PathLike[str],
    layer: str | None = None,
    metrics: str | os.PathLike[str] | None = None,
) -> None:
    """Write a page about adapters where they are stored: key numbers, figures and the table of layers.

    The page is one HTML file, which opens without a network. No backbone is loaded: all is reckoned from A, B and gate.

    Args:
        source: A checkpoint file of a :class:`~lit_sparse.SparseModule` or of any LightningModule with adapters, a
            folder in PEFT's format, the folder of a run's logs with its ``sparsity.csv``, or a model with adapters.
        output: HTML file to write.
        layer: Layer of which BA is drawn, by its name or trailing parts of it; None: the one with the largest change.
        metrics: The run's metrics.csv, for curves; None: the one beside a checkpoint or a folder above it.

    Raises:
        UsageError: If the source cannot be read or holds no adapters, the layer does not exist, matplotlib is not
            installed, or ``output`` cannot be written.
    """
    adapters = read_adapters(source, metrics)
    write_page(adapters, pictures(adapters, layer), Path(output))


def write_page(adapters: Adapters, drawn: Mapping[str, Figure], output: Path) -> None:
    """Write the page of :func:`write_report` with figures that are drawn already."""
    parts = {
        "title": escape(_title(adapters)),
        "source": escape(adapters.name),
        "facts": _facts(adapters),
        "arguments": _arguments(adapters.arguments),
        "tiles": "\n".join(_tiles(adapters)),
        "notes": "\n".join(f'<p class="note">{escape(note)}</p>' for note in notes(adapters)),
        "figures": "\n".join(_figures(adapters, drawn)),
        "table": _table(adapters),
        "version": escape(__version__),
    }
    text = re.sub(rf"@({'|'.join(parts)})@", lambda match: parts[match[1]], PAGE)
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{str(output)!r} cannot be written: {error.strerror}.") from error


def _title(adapters: Adapters) -> str:
    parts = [part for part in Path(adapters.name).parts if part not in ("/", "checkpoints")]
    return " / ".join(parts[-3:]) or adapters.name


def _facts(adapters: Adapters) -> str:
    steps = f"{adapters.step:,}" if adapters.step is not None else None
    facts = {
        "method": adapters.method,
        "backbone": adapters.backbone,
        "state": str(adapters.progress) if adapters.progress else steps and f"step {steps}",
        "read from": adapters.kind,
    }
    known = {name: fact for name, fact in facts.items() if fact}
    return "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(fact)}</dd></div>" for name, fact in known.items())


def _arguments(arguments: Mapping[str, Any]) -> str:
    """The arguments that are set, each in a frame of its own; nothing for a source that does not say."""
    given = {name: value for name, value in arguments.items() if value not in (None, False, {}, [], 0)}
    if not given:
        return ""
    items = "".join(
        f"<li><span>{escape(name)}</span> {escape(value if isinstance(value, str) else repr(value))}</li>"
        for name, value in given.items()
    )
    return f'<ul class="arguments" aria-label="Arguments of the method">{items}</ul>'


def _tiles(adapters: Adapters) -> list[str]:
    together = totals(adapters)
    layers = len(adapters.figures)
    empty = f"{together.empty_layers} of {layers} layers have none" if together.empty_layers else f"in {layers} layers"
    held = _parameters_at_start(adapters)
    tiles = []
    for name, (step, score) in list(scores(adapters.curves, adapters.step).items())[:2]:
        tiles.append(_tile(name.replace("_", " "), f"{score:.4g}", f"logged at step {step:,}"))
    tiles += [
        _tile("ranks left", f"{together.rank}", f"of {together.max_rank}; {empty}", together.rank / together.max_rank),
        _tile(
            "parameters left",
            _short(together.remaining_parameters),
            f"of {_short(held)} in A and B at the start" if held else "entries of A and B that are not zero",
            together.remaining_parameters / held if held else None,
        ),
        _tile("weights changed", f"{100 * together.changed:.3g} %", "of the adapted weights, by BA", together.changed),
    ]
    if together.bytes is not None:
        left = 4 * together.remaining_parameters
        tiles.append(_tile("stored", _size(together.bytes), f"{_size(left)} in what is left, as float32"))
    return tiles


def _parameters_at_start(adapters: Adapters) -> int | None:
    layers = adapters.layers.values()
    return sum(layer.copies * layer.max_rank * (layer.in_features + layer.out_features) for layer in layers) or None


def _tile(name: str, value: str, words: str, share: float | None = None) -> str:
    bar = f'<div class="bar"><i style="width:{share:.1%}"></i></div>' if share is not None else ""
    return (
        f'<div class="tile"><h3>{escape(name)}</h3><p class="value">{escape(value)}</p>{bar}'
        f"<p class=words>{escape(words)}</p></div>"
    )


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


def _figures(adapters: Adapters, drawn: Mapping[str, Figure]) -> Iterator[str]:
    for name, figure in drawn.items():
        if name == "curves":  # a picture for each panel, so that they stand below each other on a phone
            each = {title: curve_figure(own, adapters.step) for title, own in panels(adapters.curves).items()}
            inner = "".join(_picture(one, title) for title, one in each.items())
            yield _card(name, f'<div class="panels">{inner}</div>', wide=True)
        else:
            yield _card(name, _picture(figure, _CAPTIONS[name][0]), wide=figure.get_figwidth() > _WIDE)


def _picture(figure: Figure, title: str) -> str:
    # Letters keep a size at which they can be read: a wide figure scrolls on a narrow screen.
    width = figure.get_figwidth()
    sizes = f"--least:{0.58 * width:.2f}in;--most:{1.25 * width:.2f}in"
    return f'<div class="picture" style="{sizes}">{inline_svg(figure, title)}</div>'


def _card(name: str, inner: str, wide: bool) -> str:
    title, words = _CAPTIONS[name]
    kind = ' class="wide"' if wide else ""
    return (
        f'<figure{kind} id="{name}"><figcaption><h2>{escape(title)}</h2><p>{escape(words)}</p></figcaption>'
        f"{inner}</figure>"
    )


def _table(adapters: Adapters) -> str:
    columns = [column for column in COLUMNS if any(column.value(figure) is not None for figure in adapters.figures)]
    common = common_start(figure.sparsity.name for figure in adapters.figures)
    heads = "".join(_head(column.head, column.meaning) for column in (RANK, *columns))
    rows = "\n".join(_row(figure, columns, common) for figure in adapters.figures)
    caption = f"Names begin with <code>{escape(common.rstrip('.'))}</code>. " if common else ""
    return (
        f"<p>{caption}A click on a heading sorts.</p>"
        f'<div class="scroll"><table><thead><tr>{_head("layer", "name of the layer")}{heads}</tr></thead>'
        f"<tbody>\n{rows}\n</tbody></table></div>"
    )


def _head(word: str, meaning: str) -> str:
    return f'<th scope="col"><button type="button" title="{escape(meaning)}">{escape(word)}</button></th>'


def _row(figure: LayerFigures, columns: list[Column], common: str) -> str:
    layer = figure.sparsity
    share = layer.rank / layer.max_rank
    cells = "".join(_cell(column, figure) for column in columns)
    name = escape(layer.name[len(common) :]).replace(".", ".<wbr>")  # a line may break after a part
    return (
        f'<tr><th scope="row">{name}</th>'
        f'<td class="rank" data-value="{layer.rank}" style="--share:{share:.1%}">{layer.rank}/{layer.max_rank}</td>'
        f"{cells}</tr>"
    )


def _cell(column: Column, figure: LayerFigures) -> str:
    value = column.value(figure)
    return f'<td data-value="{-1 if value is None else value}">{escape(column.cell(figure)) or UNKNOWN}</td>'
