"""Cap what a model forgets: its loss on other data rises by no more than a tolerance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import CombinedLoader, rank_zero_warn

from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.adapters.way_back import WayBack, require_way_back
from lit_sparse.callbacks.checkpoint_files import read_lightly
from lit_sparse.callbacks.forgetting import ForgettingProbe, Measure
from lit_sparse.callbacks.measuring import measured
from lit_sparse.callbacks.support import callbacks_of, move_first
from lit_sparse.errors import TrainingError, UsageError, require_range
from lit_sparse.strategies.support import root_gathered

_PASSES = 16
"""Most measurements of one bisection: it finds factors down to 2⁻¹⁶."""
_CLOSE = 0.95, 0.999
"""Shares of the tolerance between which a bisection ends. Below 1, as a second measurement may round differently."""


class ForgettingCap(ForgettingProbe):
    """Shrink the adapters where training has raised the loss on other data by more than a tolerance.

    The loss of the pretrained model is measured before the first step. Before each validation, at the end of each epoch
    and at the end of the run, the loss is measured again. If it has risen by more than ``tolerance``, every B (and
    every value of a ``DeltaLinear``) is multiplied by one factor c < 1, which a bisection finds, and training goes on.
    The loss is continuous in c, and c = 0 is the pretrained model. Zeros stay zeros. Only if a trained task head alone
    exceeds the tolerance does it move towards its values from before training.

    The end of the run is measured once more; the run fails if it is not within the tolerance. So ``last.ckpt``, every
    validated state, and what is exported from them are within it. A file from the middle of an epoch is for resuming
    and is not.

    Beside the metrics of :class:`~lit_sparse.ForgettingProbe`, every measurement logs ``<name>/rise_trained`` and
    ``<name>/rise``, before and after shrinking, and ``<name>/scale``, the factor c. The end of the run says how
    often the cap bound. If it bound at the last state, two more validations give the task's metrics without and
    with the cap.

    Args:
        data: Any data module whose rows the module can take. Its batches stay in memory.
        tolerance: Largest rise of the loss above that of the pretrained model, above 0, in the unit of the loss.
        name: Prefix of the metrics' names.
        split: The rows to measure on: ``validate`` or ``test``. Several data sets are measured as one.
        measure: Measure by this function instead: it takes module, batches and data module, and returns metrics by
            name, of which ``loss`` is capped.

    Raises:
        UsageError: If ``tolerance`` is not above 0. When the run is set up: with a second cap or weight averaging. When
            training starts: if the module cannot take the data, they give no finite loss, or the pretrained weights
            cannot be reached by shrinking (``init_weights`` ``pissa`` or ``lora_ga``, new tokens).
        TrainingError: At the end of the run, if the tolerance is below the rounding errors of the loss.
    """

    def __init__(
        self,
        data: LightningDataModule,
        tolerance: float,
        name: str = "probe",
        split: Literal["validate", "test"] = "validate",
        measure: Measure | None = None,
    ) -> None:
        super().__init__(data, name, split, measure)
        require_range("tolerance", tolerance, above=0)
        self.tolerance = tolerance
        self.scale = 1.0
        """The factor c of the last measurement; 1 where the cap did not bind."""
        self.measurements, self.bound = 0, 0
        """How often the loss was measured in training, and how often the cap bound."""
        self._capped_step: int | None = None
        self._task: tuple[dict[str, float], dict[str, float]] | None = None
        self._kept: list[Any] = []

    @property
    def report(self) -> str | None:
        """A sentence on the end of the run; None before it."""
        if "loss" not in self.change:
            return None
        rise = f"The loss on {self.name} rose by {self.change['loss']:.3g} (cap {self.tolerance:g})"
        if not self.bound:
            return f"{rise}. The cap never bound."
        text = f"{rise}. The cap bound at {self.bound} of {self.measurements} measurements"
        scaled = f"; at the end it scaled the adapters by {self.scale:.3g}."
        text += scaled if self.scale < 1 else ", but not at the end."
        if self._task is not None:
            before, after = self._task
            text += f" Validation without and with it: {_pairs(before, after)}."
        return text

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Refuse what changes or saves other weights, and act before the callbacks that save."""
        if len(callbacks_of(trainer, ForgettingCap)) > 1:
            raise UsageError(
                "The Trainer has several ForgettingCaps, and shrinking for one could exceed another. Keep one, with "
                "a data module that has several data sets."
            )
        for averaging in callbacks_of(trainer, WeightAveraging):
            raise UsageError(
                f"{type(averaging).__name__} saves an average of the weights, which ForgettingCap does not measure. "
                "Remove one of the two."
            )
        move_first(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the batches, and measure the pretrained model, but not in a resumed run."""
        require_way_back(pl_module)
        with self._attached(trainer):
            self._kept = list(super()._batches(trainer))
        self._task = self.after = None
        if trainer.global_step == 0:
            self.before, self._capped_step, self.scale, self.measurements, self.bound = None, None, 1.0, 0, 0
        if self.before is None:
            self.before = self._of_pretrained(trainer, pl_module)
            self._log(trainer, "before", self.before)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Cap the state that is to be validated: a run that resumes from here skips that validation."""
        loop: Any = trainer.fit_loop
        if trainer.is_last_batch or loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._cap(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cap the state that is to be validated, where a stop of the run brought that about."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._cap(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cap the state that may be saved now, also where ``max_steps`` ended the epoch."""
        self._cap(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Cap the last state, measure it once more, and have it saved again."""
        self._cap(trainer, pl_module)
        super().on_train_end(trainer, pl_module)
        if not self.change["loss"] <= self.tolerance:
            raise TrainingError(
                f"The loss on {self.name} rose by {self.change['loss']:.3g}, and no scale of the adapters is within "
                f"the tolerance {self.tolerance:g}, which may be below its rounding errors. Raise tolerance."
            )
        self._task = self._pay(trainer, pl_module)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                self._check_saved(callback, trainer)
        self._kept = []

    def state_dict(self) -> dict[str, Any]:
        """What was measured before, and the step at which weights were last within the tolerance."""
        counts = {"scale": self.scale, "measurements": self.measurements, "bound": self.bound}
        return {**super().state_dict(), "capped_step": self._capped_step, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it."""
        super().load_state_dict(state_dict)
        self._capped_step, self.scale = state_dict["capped_step"], state_dict["scale"]
        self.measurements, self.bound = state_dict["measurements"], state_dict["bound"]

    def _batches(self, trainer: Trainer) -> Iterable[Any]:  # noqa: ARG002
        return self._kept

    def _measured(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        # All processes measure the same; they must also decide the same, to the last bit.
        return trainer.strategy.broadcast(super()._measured(trainer, pl_module))

    def _of_pretrained(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        module, data = type(pl_module).__name__, type(self.data).__name__
        try:
            with disable_adapters(pl_module):
                found = self._measured(trainer, pl_module)
        except torch.OutOfMemoryError:
            raise
        except UsageError as error:
            raise UsageError(f"ForgettingCap cannot measure {module} on {data}. {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"{module} cannot take the rows of {data}, on which ForgettingCap measures it: {reason}. Give data of "
                "the kind that the module is trained on."
            ) from error
        if not isinstance(found, Mapping) or "loss" not in found:
            names = (isinstance(found, Mapping) and ", ".join(found)) or "nothing"
            raise UsageError(
                f"ForgettingCap caps a loss, but {module} measures {names} on {data}. Give data with labels "
                "instead of answers, or a measure that returns a loss."
            )
        if not math.isfinite(found["loss"]):
            raise UsageError(f"The loss of the pretrained model on {data} is {found['loss']}, which cannot be capped.")
        return found

    def _rise(self, trainer: Trainer, pl_module: LightningModule) -> float:
        before = self.before or {}  # which on_train_start has set
        return self._measured(trainer, pl_module)["loss"] - before["loss"]

    def _cap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Shrink the adapters if they need it, once per optimizer step."""
        if self._capped_step == trainer.global_step:
            return
        self._capped_step, self.scale = trainer.global_step, 1.0
        self.measurements += 1
        trained = rise = self._rise(trainer, pl_module)
        if not rise <= _CLOSE[1] * self.tolerance:  # NaN is outside too
            way = WayBack(pl_module)
            rise = self._shrink(way, trainer, pl_module)
            self.scale = way.scale
            self.bound += 1
        found = {"rise_trained": trained, "rise": rise, "scale": self.scale}
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.name}/{k}": v for k, v in found.items()}, step=trainer.global_step)

    def _shrink(self, way: WayBack, trainer: Trainer, pl_module: LightningModule) -> float:
        """Bisect: ``low`` is always within the tolerance, ``high`` never."""
        low, high, rise = way.shortest, way.whole, 0.0
        for _ in range(_PASSES):
            way.go((low + high) / 2)
            found = self._rise(trainer, pl_module)
            if not found <= _CLOSE[1] * self.tolerance:
                high = way.length
                continue
            low, rise = way.length, found
            if rise >= _CLOSE[0] * self.tolerance:
                break
        way.go(low)
        return rise

    def _pay(self, trainer: Trainer, pl_module: LightningModule) -> tuple[dict[str, float], dict[str, float]] | None:
        """The validation's metrics of the last state, as the cap found it and as it left it; None if it did nothing."""
        loaders, data = trainer.val_dataloaders, getattr(trainer, "datamodule", None)
        # A list may be empty; other loaders may have no length, which would decide whether they count as true.
        nothing = loaders is None or (isinstance(loaders, list | tuple | dict) and not loaders)
        if not 0 < self.scale < 1 or nothing or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return None
        flat = CombinedLoader(loaders, "sequential").flattened
        limits = [None if n == math.inf else int(n) for n in trainer.num_val_batches]

        def validated() -> dict[str, float]:
            batches = (b for loader, limit in zip(flat, limits, strict=True) for b in islice(loader, limit))
            with root_gathered(trainer.strategy.model):
                return measured(pl_module, batches, data, sharded=True)

        way = WayBack(pl_module)
        way.go(1 + 1 / self.scale)
        before = validated()
        way.go(WayBack.whole)
        return before, validated()

    def _check_saved(self, callback: ModelCheckpoint, trainer: Trainer) -> None:
        if self.scale < 1:
            callback._last_global_step_saved = -1  # a file of this step may be older than the cap: it is saved again
        best = Path(callback.best_model_path)
        if callback.monitor is None or not trainer.is_global_zero or not best.is_file():
            return
        saved = read_lightly(best)
        capped = saved.get("callbacks", {}).get(self.state_key, {}).get("capped_step")
        if capped != saved.get("global_step"):
            rank_zero_warn(
                f"The best checkpoint by {callback.monitor!r} was saved between two measurements of ForgettingCap and "
                f"may exceed the tolerance: {best}. Monitor a validation metric, or use the last checkpoint."
            )


def _pairs(before: dict[str, float], after: dict[str, float]) -> str:
    return ", ".join(f"{metric} {value:.4g} → {after[metric]:.4g}" for metric, value in before.items())
