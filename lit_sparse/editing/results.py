"""The folder of a run, written as the run goes, so that a killed run can be continued."""

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

    Each process appends its rows to a file of its own in ``parts``. At the end one process writes ``results.jsonl``,
    with one row per request, and ``timings.jsonl``, whose values differ from run to run.

    Args:
        folder: Created if it does not exist.
        settings: Everything that the results depend on; stored in ``run.json``.
        rank: Number of this process.

    Raises:
        UsageError: If the folder holds a run with other settings, or cannot be written.
    """

    def __init__(self, folder: str, settings: Mapping[str, Any], rank: int = 0) -> None:
        self.folder = Path(folder)
        self.edits = self.folder / "edits"
        self._parts = self.folder / "parts"
        self._own = self._parts / f"{rank}.jsonl"
        self._retention = self.folder / "retention.jsonl"
        try:
            self._parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"The folder {folder!r} for the results cannot be created: {error}.") from error
        self._require_same(json.loads(json.dumps(settings)))
        if rank == 0:
            (self.folder / "run.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
            _drop_torn_line(self._retention)
        _drop_torn_line(self._own)
        self.rows = self._read()
        """Number of a request → its row; rows of other processes only as of the start of this one."""

    def add(self, rows: Sequence[Row]) -> None:
        """Store rows at once."""
        _append(self._own, rows)
        self.rows |= {row["index"]: row for row in rows}

    def finish(self, order: Sequence[int]) -> list[Row]:
        """Collect the rows of all processes.

        Args:
            order: Numbers of this run's requests; rows of other requests stay in ``parts``.
        """
        found = self._read()
        rows = [found[index] for index in order if index in found]
        plain = [{name: value for name, value in row.items() if name not in _TIMES} for row in rows]
        _write(self.folder / "results.jsonl", plain)
        _write(self.folder / "timings.jsonl", [{name: row[name] for name in ("index", *_TIMES)} for row in rows])
        return rows

    def retained(self) -> set[int]:
        """The numbers of sequential edits after which all of them were measured again."""
        return {row["after"] for row in _lines(self._retention)} if self._retention.exists() else set()

    def retain(self, row: Row) -> None:
        """Store the metrics that were measured after ``row["after"]`` sequential edits."""
        _append(self._retention, [row])

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

    def _read(self) -> dict[int, Row]:
        return {row["index"]: row for file in sorted(self._parts.glob("*.jsonl")) for row in _lines(file)}

    def _require_same(self, settings: Mapping[str, Any]) -> None:
        if not self._read() and not any(self.edits.glob("*")):
            return  # nothing that other settings could be mixed with
        try:
            before = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return  # a new run, or one that was killed while it wrote the file
        for name, value in settings.items():
            if before.get(name) != value:
                raise UsageError(
                    f"{str(self.folder)!r} holds a run with other settings: {name} was {before.get(name)!r} and is "
                    f"{value!r}. Name another output, or remove this folder."
                )


def _lines(file: Path) -> list[Row]:
    """The rows of a file, without a last line that was cut off, perhaps within a character."""
    # Not splitlines(): texts may contain other line separators.
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def _drop_torn_line(file: Path) -> None:
    """Remove a last line that was cut off, so that nothing is appended to it."""
    if file.exists():
        with file.open("r+b") as stream:
            stream.truncate(stream.read().rfind(b"\n") + 1)


def _json_lines(rows: Sequence[Row]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _append(file: Path, rows: Sequence[Row]) -> None:
    with file.open("ab") as stream:
        stream.write(_json_lines(rows))


def _write(file: Path, rows: Sequence[Row]) -> None:
    draft = file.with_name(f".{file.name}")
    draft.write_bytes(_json_lines(rows))
    draft.replace(file)
