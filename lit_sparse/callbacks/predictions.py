"""Write predictions to a file: the command line would only throw them away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_sparse.errors import UsageError

_GROUP = 8192  # rows that Parquet's readers take in at once; the first of them tell the columns' types


class _LinesFile:
    """JSON Lines: what was written can be read, whatever comes after."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("w", encoding="utf-8")

    def append(self, rows: list[dict[str, Any]]) -> None:
        self._stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def close(self) -> None:
        self._stream.close()


class _ParquetFile:
    """Parquet: rows are collected into groups, and can be read once the file is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[str, Any]] = []
        self._columns: list[str] = []
        self._writer: Any = None

    def append(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        columns = list(rows[0])
        self._columns = self._columns or columns
        if columns != self._columns:  # pyarrow would leave out what the first row does not have
            raise UsageError(
                f"{self._path} has the columns {self._columns}, and a prediction has {columns}. Use .jsonl instead."
            )
        self._rows += rows
        if len(self._rows) >= _GROUP:
            self._write()

    def close(self) -> None:
        try:
            if self._rows or self._writer is None:
                self._write()
        finally:
            if self._writer is not None:
                self._writer.close()

    def _write(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        rows, self._rows = self._rows, []
        try:
            table = pa.Table.from_pylist(rows, None if self._writer is None else self._writer.schema)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise UsageError(f"{self._path} cannot hold the predictions in columns: {error}. Use .jsonl.") from error
        if self._writer is None:
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)


_FILES: dict[str, type[_LinesFile] | type[_ParquetFile]] = {".jsonl": _LinesFile, ".parquet": _ParquetFile}


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, a dictionary of one entry per row each, as JSON Lines or Parquet.

    Rows are in the order of the data. With several processes each writes its share, to ``output`` with the number
    of the process before the ending.

    Args:
        output: File to write, replaced if it exists: ``.jsonl`` for a line per row, ``.parquet`` for columns.

    Raises:
        UsageError: If ``output`` has another ending or its folder does not exist, ``predict_step`` returns no
            dictionary, or columns or their types change in a Parquet file.
    """

    def __init__(self, output: str) -> None:
        super().__init__("batch")
        self.output = Path(output)
        if self.output.suffix not in _FILES:
            raise UsageError(f"output={output!r} must end in {' or '.join(_FILES)}, which says the format.")
        if not self.output.parent.is_dir():
            raise UsageError(f"The folder of output={output!r} does not exist: make it first.")
        self._file: _LinesFile | _ParquetFile | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Open the file."""
        several = trainer.world_size > 1
        path = self.output.with_suffix(f".{trainer.global_rank}{self.output.suffix}") if several else self.output
        self._file = _FILES[path.suffix](path)

    def write_on_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int,  # noqa: ARG002
    ) -> None:
        """Append the rows of a batch."""
        if not isinstance(prediction, dict):
            raise UsageError(
                "PredictionWriter writes dictionaries with an entry per row; predict_step of "
                f"{type(pl_module).__name__} returned {type(prediction).__name__}."
            )
        columns = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in prediction.items()}
        if self._file is None:
            raise RuntimeError("write_on_batch_end came without on_predict_start.")
        self._file.append([dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)])

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Close the file."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Close the file; what was written stays."""
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
