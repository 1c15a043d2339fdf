"""Measure what a model forgets: its metrics on other data, before and after training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from lit_sparse.callbacks.measuring import measured
from lit_sparse.errors import UsageError, require_choice
from lit_sparse.strategies.support import root_gathered

Measure = Callable[[LightningModule, Iterable[Any], LightningDataModule], dict[str, float]]
"""A function of module, batches and their data module that returns metrics by name."""


class ForgettingProbe(Callback):
    """Measure the model on other data before training and after it, and log both and the change.

    Before the first step ``<name>/<metric>_before`` goes to every logger, after the last one
    ``<name>/<metric>_after`` and ``<name>/<metric>_change``. The metrics are those of the module's validation, such as
    ``loss``, ``perplexity`` and ``token_accuracy`` of language models, or ``accuracy`` where batches hold ``answers``
    (:class:`~lit_sparse.ReasoningData`). Any other module is measured by its loss. Every process measures all of the
    data. A resumed run keeps the metrics from before its first step.

    Args:
        data: Any data module whose rows the module can take.
        name: Prefix of the metrics' names; Lightning refuses two probes of one name.
        split: The rows to measure on: ``validate`` or ``test``. Several data sets are measured as one.
        measure: Measure by this function instead: it takes module, batches and data module, and returns metrics by
            name.

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
        require_choice("split", split, ("validate", "test"))
        if not name or "/" in name:
            raise UsageError(f"name is the prefix of the metrics' names and holds no slash; got {name!r}.")
        self.data, self.name, self.split = data, name, split
        self.measure = measure or measured
        self.before: dict[str, float] | None = None
        """Metrics before the first step."""
        self.after: dict[str, float] | None = None
        """Metrics after the last step."""

    @property
    def state_key(self) -> str:
        """A key for each name, so that checkpoints keep several probes apart."""
        return f"{type(self).__qualname__}({self.name})"

    @property
    def change(self) -> dict[str, float]:
        """The metrics after training minus those before; empty until the end."""
        if self.before is None or self.after is None:
            return {}
        return {metric: self.after[metric] - value for metric, value in self.before.items()}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure before the first step, but not in a resumed run."""
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
        changes = [f"{metric} {value:.4g} → {self.after[metric]:.4g}" for metric, value in self.before.items()]
        rank_zero_info(f"{self.name}, before and after training: {', '.join(changes)}.")

    def state_dict(self) -> dict[str, Any]:
        """The metrics before the first step."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the metrics before the first step."""
        self.before = state_dict["before"]

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        with self._attached(trainer), root_gathered(trainer.strategy.model):
            return self.measure(pl_module, self._batches(trainer), self.data)

    @contextmanager
    def _attached(self, trainer: Trainer) -> Iterator[None]:
        before = getattr(self.data, "trainer", None)  # that of the run, if this is its own data module
        self.data.trainer = trainer  # the tokenizer may be that of the module's backbone
        try:
            yield
        finally:
            self.data.trainer = before

    def _batches(self, trainer: Trainer) -> Iterable[Any]:
        loaders = self._loaders(trainer)
        several = loaders if isinstance(loaders, list | tuple) else [loaders]
        return (batch for loader in several for batch in loader)

    def _loaders(self, trainer: Trainer) -> Any:
        data, during = self.data, trainer.state.fn
        # A data module reads there what to prepare: no training rows, which other data need not have.
        trainer.state.fn = TrainerFn.VALIDATING if self.split == "validate" else TrainerFn.TESTING
        try:
            # As Lightning does it for the data of a run: files are written by one process, and read by all.
            if (trainer.local_rank if data.prepare_data_per_node else trainer.global_rank) == 0:
                data.prepare_data()
            trainer.strategy.barrier()
            data.setup(self.split)
            return data.val_dataloader() if self.split == "validate" else data.test_dataloader()
        finally:
            trainer.state.fn = during

    def _log(self, trainer: Trainer, when: str, metrics: dict[str, float]) -> None:
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{k}_{when}": v for k, v in metrics.items()}, step=trainer.global_step)
