"""Measure on data that a model is not trained on, before and after training, what it forgets."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.callbacks.measuring import measured
from lit_sparse.errors import UsageError

Measure = Callable[[LightningModule, Iterable[Any], LightningDataModule], dict[str, float]]
"""From module, batches and their data module to figures by name."""


class ForgettingProbe(Callback):
    """Measure the model on other data before training and after it, and log both and the change.

    Before the first step ``<name>/<figure>_before`` goes to every logger, after the last one
    ``<name>/<figure>_after`` and ``<name>/<figure>_change``. Figures are those of the module: of language models
    ``loss`` in nats per labelled token, ``perplexity`` and ``token_accuracy``, or, where batches hold ``answers``
    (:class:`~lit_sparse.ReasoningData`), ``accuracy``; of classifiers ``loss`` and ``accuracy``. Every process measures
    all of the data. A run that is resumed keeps what was measured before.

    Args:
        data: Any data module whose rows the module can take.
        name: What the figures are called by; Lightning refuses two probes of one name.
        split: Which of its rows: ``validate`` or ``test``. Of several sets every one, one after another, as one.
        measure: What to measure instead: from module, batches and data module to figures by name.

    Raises:
        UsageError: If ``split`` is neither, or the data holds nothing to measure by.
    """

    def __init__(
        self,
        data: LightningDataModule,
        name: str = "probe",
        split: Literal["validate", "test"] = "validate",
        measure: Measure | None = None,
    ) -> None:
        if split not in ("validate", "test"):
            raise UsageError(f"split must be 'validate' or 'test'; got {split!r}.")
        if not name or "/" in name:
            raise UsageError(f"name goes in front of the figures' names and holds no slash; got {name!r}.")
        self.data, self.name, self.split = data, name, split
        self.measure = measure or measured
        self.before: dict[str, float] | None = None
        """Figures before the first step."""
        self.after: dict[str, float] | None = None
        """Figures after the last step."""

    @property
    def state_key(self) -> str:
        """Of its own for each name, so that checkpoints keep several probes apart."""
        return f"{type(self).__qualname__}({self.name})"

    @property
    def change(self) -> dict[str, float]:
        """After minus before; empty until the end."""
        if self.before is None or self.after is None:
            return {}
        return {figure: self.after[figure] - value for figure, value in self.before.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, not when a run goes on."""
        if trainer.global_step == 0:
            self.before, self.after = self._measured(trainer, pl_module), None
            self._log(trainer, "before", self.before)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure after the last step."""
        self.after = self._measured(trainer, pl_module)
        self._log(trainer, "after", self.after)
        if self.before is None:
            return
        self._log(trainer, "change", self.change)
        told = [f"{figure} {value:.4g} → {self.after[figure]:.4g}" for figure, value in self.before.items()]
        rank_zero_info(f"{self.name}, before and after training: {', '.join(told)}.")

    def state_dict(self) -> dict[str, Any]:
        """What was measured before the first step."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep that."""
        self.before = state_dict["before"]

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        data, during = self.data, trainer.state.fn
        data.trainer = trainer  # the tokenizer may be that of the module's backbone
        # What to prepare a data module may read there: no training rows, which other data need not have.
        trainer.state.fn = TrainerFn.VALIDATING if self.split == "validate" else TrainerFn.TESTING
        try:
            # As Lightning does it for the data of a run: files are written by one process, and read by all.
            if (trainer.local_rank if data.prepare_data_per_node else trainer.global_rank) == 0:
                data.prepare_data()
            trainer.strategy.barrier()
            data.setup(self.split)
            loaders = data.val_dataloader() if self.split == "validate" else data.test_dataloader()
            several = loaders if isinstance(loaders, list | tuple) else [loaders]
            return self.measure(pl_module, (batch for loader in several for batch in loader), data)
        finally:
            data.trainer, trainer.state.fn = None, during

    def _log(self, trainer: Trainer, when: str, figures: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{k}_{when}": v for k, v in figures.items()}, step=trainer.global_step)
