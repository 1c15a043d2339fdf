"""Write predictions to a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from pyarrow import parquet
from torch import Tensor

from lit_sparse.errors import UsageError


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, dictionaries with one entry per row, as JSON Lines or Parquet.

    Rows keep the order of the data. JSON Lines are written after every batch, Parquet at the end. Each of several
    processes writes its share, into a file with the number of the process before the suffix.

    Args:
        output: File to write, replaced if it exists: ``.jsonl`` for a line per row, ``.parquet`` for columns.

    Raises:
        UsageError: If ``output`` has another suffix or its folder does not exist, if ``predict_step`` returns no
            dictionary, or if the values of a Parquet column have several types.
    """

    def __init__(self, output: str) -> None:
        super().__init__("batch")
        self.output = Path(output)
        if self.output.suffix not in (".jsonl", ".parquet"):
            raise UsageError(f"output must end in .jsonl or .parquet; got {output!r}.")
        if not self.output.parent.is_dir():
            raise UsageError(f"The folder of output={output!r} does not exist. Create it first.")
        self._path: Path | None = None
        self._lines: IO[str] | None = None
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Open the file."""
        several, suffix = trainer.world_size > 1, self.output.suffix
        self._path = self.output.with_suffix(f".{trainer.global_rank}{suffix}") if several else self.output
        self._lines = self._path.open("w", encoding="utf-8") if suffix == ".jsonl" else None

    def write_on_batch_end(self, trainer: Trainer, pl_module: LightningModule, prediction: Any, *_: Any) -> None:  # noqa: ARG002
        """Append the rows of a batch."""
        if not isinstance(prediction, dict):
            raise UsageError(
                "PredictionWriter writes dictionaries with an entry per row; predict_step of "
                f"{type(pl_module).__name__} returned {type(prediction).__name__}."
            )
        columns = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in prediction.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        if self._lines is None:
            self._rows += rows
        else:
            self._lines.writelines(map(_line, rows))

    def on_predict_end(self, *_: Any) -> None:
        """Finish the file."""
        path, self._path = self._path, None
        if self._lines is not None:
            self._lines.close()
        elif path is not None:
            rows, self._rows = self._rows, []
            _write_parquet(path, rows)

    def on_exception(self, *_: Any) -> None:
        """Finish the file with the rows so far."""
        self.on_predict_end()


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    names = dict.fromkeys(name for row in rows for name in row)
    try:
        table = pa.table({name: [row.get(name) for row in rows] for name in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        instead = path.with_suffix(".jsonl")
        instead.write_text("".join(map(_line, rows)), encoding="utf-8")
        raise UsageError(f"{path} cannot hold the predictions in columns: {error}. They are in {instead}.") from error
    parquet.write_table(table, path)
