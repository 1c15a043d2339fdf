"""What a run of edits measured: written as it goes, so that a run that is killed goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lit_sparse.errors import UsageError

Row = dict[str, Any]

_TIMES = ("seconds", "step_seconds")


class Results:
    """The folder of a run.

    Every process appends what it measured of a request to a file of its own in ``parts``; at the end one of them writes
    ``results.jsonl``, a line for each request in their order, and beside it ``timings.jsonl``, the only figures that
    are not the same in every run.

    Args:
        folder: Of the run; made if it is not there.
        settings: What the figures depend on. They are written down, and a run with others is refused.
        rank: Number of this process.

    Raises:
        UsageError: If the folder holds a run with other settings, or cannot be written.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = Path(folder)
        self._parts = self.folder / "parts"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {folder!r} of the results cannot be made: {error}.") from error
        self._require_same(json.loads(json.dumps(settings)), rank)
        self._own = self._parts / f"{rank}.jsonl"
        self._retention = self.folder / "retention.jsonl"
        for file in (self._own, self._retention) if rank == 0 else (self._own,):
            _drop_torn_line(file)
        self.rows = self._read()
        """What was measured, by the number of the request; of other processes what they had when this one began."""

    @property
    def edits(self) -> Path:
        """Folder of the edits."""
        return self.folder / "edits"

    def add(self, rows: Sequence[Row]) -> None:
        """Write rows down at once."""
        _append(self._own, rows)
        self.rows |= {row["index"]: row for row in rows}

    def finish(self, order: Sequence[int]) -> list[Row]:
        """Put the rows of all processes together.

        Args:
            order: Numbers of the requests of this run; what was measured of others stays in the parts.
        """
        found = self._read()
        rows = [found[index] for index in order if index in found]
        plain = [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]
        _write(self.folder / "results.jsonl", plain)
        _write(self.folder / "timings.jsonl", [{name: row[name] for name in ("index", *_TIMES)} for row in rows])
        return rows

    def retained(self) -> dict[int, Row]:
        """What was measured after several edits in sequence, by their number."""
        return {row["after"]: row for row in _lines(self._retention)} if self._retention.exists() else {}

    def retain(self, row: Row) -> None:
        """Write down what was measured after several edits."""
        _append(self._retention, [row])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the means."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> dict[int, Row]:
        return {row["index"]: row for file in sorted(self._parts.glob("*.jsonl")) for row in _lines(file)}

    def _require_same(self, settings: Mapping[str, Any], rank: int) -> None:
        file = self.folder / "run.json"
        if file.exists():
            try:
                before = json.loads(file.read_text(encoding="utf-8"))
            except ValueError:
                before = {}  # killed while it was written
            other = [name for name in settings if before and before.get(name) != settings[name]]
            if other:
                raise UsageError(
                    f"{str(self.folder)!r} holds a run with other settings: {other[0]} was {before.get(other[0])!r} "
                    f"and is {settings[other[0]]!r}. Name another output, or remove this folder."
                )
        if rank == 0:
            file.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _lines(file: Path) -> list[Row]:
    """The rows of a file, less a last line that was cut off, within a letter perhaps."""
    # Not splitlines(): texts may have other ends of lines in them.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def _drop_torn_line(file: Path) -> None:
    """Take out what was cut off, so that it is not joined to what comes next."""
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def _append(file: Path, rows: Sequence[Row]) -> None:
    with file.open("ab") as stream:
        stream.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def _write(file: Path, rows: Sequence[Row]) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    draft.replace(file)
