"""Write predictions to a file: the command line would only throw them away."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torch import Tensor

from lit_sparse.errors import UsageError


class PredictionWriter(BasePredictionWriter):
    """Write what ``predict_step`` returns, a dictionary of one entry per row each, as JSON Lines.

    Rows are in the order of the data. With several processes each writes its share, to ``output`` with the number
    of the process before the ending.

    Args:
        output: File to write, replaced if it exists.

    Raises:
        UsageError: If the folder of ``output`` does not exist, or ``predict_step`` returns no dictionary.
    """

    def __init__(self, output: str) -> None:
        super().__init__("batch")
        self.output = Path(output)
        if not self.output.parent.is_dir():
            raise UsageError(f"The folder of output={output!r} does not exist: make it first.")
        self._file: TextIO | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Open the file."""
        several = trainer.world_size > 1
        path = self.output.with_suffix(f".{trainer.global_rank}{self.output.suffix}") if several else self.output
        self._file = path.open("w", encoding="utf-8")

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
        for row in zip(*columns.values(), strict=True):
            self._file.write(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n")

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
