"""``lit-sparse inspect SOURCE``: table, figures and report of stored adapters."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import save
from lit_sparse.reporting.plotting import pictures
from lit_sparse.reporting.report import write_page
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.table import text_table
from lit_sparse.verbosity import show


def names_a_source(words: Sequence[str]) -> bool:
    """Whether ``inspect`` is to read stored adapters, rather than list the layers that a configuration would adapt.

    Args:
        words: The words after ``inspect``: a source or one of its options comes first, or those of a configuration.
    """
    options = ("--figures", "--report", "--layer", "--metrics")
    return bool(words) and (not words[0].startswith("-") or words[0].partition("=")[0] in options)


def inspect_adapters(
    source: str,
    figures: str | None = None,
    report: str | None = None,
    layer: str | None = None,
    metrics: str | None = None,
) -> None:
    """Print a table of stored adapters, without loading a backbone.

    Args:
        source: A checkpoint file, a folder in PEFT's format, or the folder of a run's logs.
        figures: Folder to write figures into, as PNG.
        report: HTML file to write: a report with table and figures that needs no network.
        layer: Layer whose BA the figures show, by its name or trailing parts of it; otherwise the layer with the
            largest change.
        metrics: The run's metrics.csv, for curves; otherwise the one beside the source or in a folder above it.

    Raises:
        UsageError: If the source cannot be read or holds no adapters, the layer does not exist, a file cannot be
            written, or matplotlib is needed and not installed.
    """
    adapters = read_adapters(source, metrics)
    if layer is not None:
        adapters.layer(layer)  # refuse an unknown name before anything is written
    sys.stdout.write(text_table(adapters) + "\n")
    if figures is None and report is None:
        return
    drawn = pictures(adapters, layer)
    if figures is not None:
        folder = Path(figures)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, figure in drawn.items():
                save(figure, folder / f"{name}.png")
        except OSError as error:
            raise UsageError(f"{figures!r} cannot be written to: {error.strerror}.") from error
        show(f"Wrote {', '.join(f'{name}.png' for name in drawn)} into {folder}.")
    if report is not None:
        write_page(adapters, drawn, Path(report))
        show(f"Wrote {report}.")
