"""Logged values of a run, from the metrics.csv of Lightning's CSVLogger."""

from __future__ import annotations

import csv
from pathlib import Path

from lit_sparse.errors import UsageError
from lit_sparse.figures.curves import Curves

METRICS = "metrics.csv"


def find_metrics(checkpoint: Path) -> Path | None:
    """The metrics.csv of a checkpoint's run: beside it, or one level above its folder."""
    folder = checkpoint.resolve().parent
    return next((f for f in (folder / METRICS, folder.parent / METRICS) if f.is_file()), None)


def read_metrics(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Read logged values.

    Args:
        path: A metrics.csv.

    Returns:
        Name to pairs of step and value, in the order of the steps.

    Raises:
        UsageError: If the file does not exist, or is no table with a column ``step``.
    """
    if not path.is_file():
        raise UsageError(f"{str(path)!r} does not exist. Give the metrics.csv that CSVLogger wrote.")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        curves: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            for name, value in row.items():
                if name not in ("step", "epoch") and value:
                    curves.setdefault(name, []).append((int(row["step"]), float(value)))
    except (KeyError, ValueError, TypeError) as error:
        raise UsageError(
            f"{str(path)!r} cannot be read as metrics: {error}. Give the metrics.csv that CSVLogger wrote."
        ) from error
    return {name: sorted(curve, key=lambda pair: pair[0]) for name, curve in sorted(curves.items())}


def scores(curves: Curves, step: int | None) -> dict[str, tuple[int, float]]:
    """The last validation and test values up to a step, each with its step; metrics before losses.

    Args:
        curves: Logged values.
        step: Optimizer steps taken; None: the whole run.
    """
    found = {}
    for name in sorted(curves, key=lambda name: ("loss" in name, name)):
        if name.startswith(("val", "test")):
            until = [pair for pair in curves[name] if step is None or pair[0] <= step]
            if until:
                found[name] = until[-1]
    return found
