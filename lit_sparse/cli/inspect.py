"""``lit-sparse inspect SOURCE``: the table of stored adapters, their figures and their page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

import jsonargparse

from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import save
from lit_sparse.reporting.pictures import pictures
from lit_sparse.reporting.report import write_page
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.table import text_table
from lit_sparse.verbosity import show

_OPTIONS = ("figures", "report", "layer", "metrics")


def names_a_source(words: Sequence[str]) -> bool:
    """Whether the words after ``inspect`` are for adapters that are stored, and not for a configuration.

    Args:
        words: What the user typed after ``inspect``; every option takes one value.
    """
    if any(word.partition("=")[0] in [f"--{option}" for option in _OPTIONS] for word in words):
        return True
    values = {i + 1 for i, word in enumerate(words) if word.startswith("-") and "=" not in word}
    return any(not word.startswith("-") and i not in values for i, word in enumerate(words))


def run(words: Sequence[str], program: str) -> None:
    """Run the command.

    Args:
        words: What the user typed after ``inspect``.
        program: Name of the program, for its help.

    Raises:
        UsageError: If a word is not understood, or what :func:`inspect_adapters` raises.
    """
    parser = jsonargparse.ArgumentParser(prog=f"{program} inspect", exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(inspect_adapters, as_positional=True)
    try:
        arguments = parser.parse_args(list(words))
    except argparse.ArgumentError as error:
        raise UsageError(f"{' '.join(str(error).split())}.{_hint(words)}") from error
    inspect_adapters(**arguments.as_dict())


def inspect_adapters(
    source: str,
    figures: str | None = None,
    report: str | None = None,
    layer: str | None = None,
    metrics: str | None = None,
) -> None:
    """Print a table of adapters where they are stored, without loading a backbone.

    Args:
        source: A checkpoint file, a folder in PEFT's format, or the folder of a run's logs.
        figures: Folder to write pictures into, as PNG.
        report: HTML file to write: a page with all of it, which needs no network.
        layer: Layer of which the pictures show BA, by its name or trailing parts of it; otherwise the one with the
            largest change.
        metrics: The run's metrics.csv, for curves; otherwise the one beside the source or a folder above it.

    Raises:
        UsageError: If the source cannot be read or holds no adapters, the layer does not exist, or there are figures to
            draw and no matplotlib.
    """
    adapters = read_adapters(source, metrics)
    if layer is not None:
        adapters.layer(layer)  # a wrong name is told before anything is written
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
            raise UsageError(f"{figures!r} cannot be written: {error.strerror}.") from error
        show(f"Wrote {', '.join(f'{name}.png' for name in drawn)} into {folder}.")
    if report is not None:
        write_page(adapters, drawn, Path(report))
        show(f"Wrote {report}.")


def _hint(words: Sequence[str]) -> str:
    given = [word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")]
    unknown = next((word for word in given if word not in _OPTIONS), None)
    close = get_close_matches(unknown, _OPTIONS, n=1) if unknown else []
    return f" Did you mean '--{close[0]}'?" if close else f" Options are {', '.join(f'--{o}' for o in _OPTIONS)}."
