"""Log how sparse the adapters are, while they train and at the end."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning_utilities.core.imports import RequirementCache

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.naming import places
from lit_sparse.adapters.statistics import LayerSparsity, layer_sparsity, sparsity_of
from lit_sparse.callbacks.ending import print_ending
from lit_sparse.callbacks.support import StepCallback
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import pixels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import rank_figure
from lit_sparse.verbosity import is_quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MATPLOTLIB = RequirementCache("matplotlib")
_PREFIX = "sparsity/"


class SparsityMonitor(StepCallback):
    """Log rank, gates, densities and remaining parameters to every logger of the Trainer.

    - Without factors, as under SHiRA, during training and after each epoch: ``sparsity/density_BA``, the share of the
      weights that changes, and ``sparsity/remaining_parameters``. Otherwise:
    - During training and after each epoch: ``sparsity/mean_rank``, ``sparsity/zero_gates``, ``sparsity/density_A``,
      ``sparsity/density_B``, ``sparsity/remaining_parameters``; in the progress bar ``density`` (of A and B together).
    - After each epoch also ``sparsity/density_BA`` and its bound by Proposition 1 of RoseLoRA,
      ``sparsity/density_BA_bound``, averaged over layers, and the mean live rank of each kind of layer, such as
      ``sparsity/rank/attention.self.query``.
    - After fit, on the terminal a row for each kind of layer, the last validation's metrics, and what to type next;
      and ``sparsity.csv`` with all layers in the logger's folder. With matplotlib, also figures of the ranks and gates,
      ``sparsity/ranks`` and ``sparsity/gates``, for loggers with a ``log_image`` (Weights & Biases) or an
      ``experiment.add_figure`` (TensorBoard).

    Args:
        every_n_steps: Optimizer steps between two logs; None: the Trainer's ``log_every_n_steps``.

    Raises:
        UsageError: If ``every_n_steps`` < 1, or when training starts, if the module has no adapters.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__(every_n_steps)
        self._adapters: list[Adapter] = []
        self._kinds: dict[str, list[int]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters by type."""
        super().on_train_start(trainer, pl_module)
        named = dict(adapters_in(pl_module))
        self._adapters = list(named.values())
        self._kinds = {}
        for index, (kind, _) in enumerate(places(named).values()):
            self._kinds.setdefault(kind, []).append(index)
        if not self._adapters:
            raise UsageError(f"SparsityMonitor found no adapter in {type(pl_module).__name__}. Call lit_sparse.inject.")

    def after_step(self, trainer: Trainer, pl_module: LightningModule, is_due: bool) -> None:
        """Log the metrics that are cheap to compute."""
        if not is_due:
            return
        metrics = sparsity_of(self._adapters)
        values = torch.stack([value.double() for value in metrics.values()]).tolist()
        numbers = {f"{_PREFIX}{key}": value for key, value in zip(metrics, values, strict=True)}
        # Straight to the loggers: Lightning drops what a module logs between its own rounds. It numbers steps from 0.
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step - 1)
        factored = [adapter for adapter in self._adapters if isinstance(adapter, LowRankAdapter)]
        entries = sum(a.lora_A.numel() + a.lora_B_t.numel() for a in factored)
        left = numbers[f"{_PREFIX}remaining_parameters"] / entries if factored else numbers[f"{_PREFIX}density_BA"]
        # On the host: Lightning reads what the bar shows after every batch.
        density = torch.tensor(left)
        pl_module.log("density", density, prog_bar=True, logger=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log all metrics through the module, so that other callbacks can monitor them."""
        metrics = {k: v.float() for k, v in sparsity_of(self._adapters).items()}
        if "mean_rank" in metrics:
            layers = layer_sparsity(pl_module)
            for key in ("density_BA", "density_BA_bound"):
                metrics[key] = torch.tensor(sum(getattr(layer, key) for layer in layers) / len(layers))
            for kind, indices in self._kinds.items():
                metrics[f"rank/{kind}"] = torch.tensor(sum(layers[i].rank for i in indices) / len(indices))
        values = {f"{_PREFIX}{k}": v.to(pl_module.device) for k, v in metrics.items()}
        # The values are the same in all processes, but without sync_dist Lightning warns of each.
        pl_module.log_dict(values, batch_size=1, sync_dist=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the kinds of layers, write all layers beside the logs, and log the figures."""
        # In every process: log_dir is broadcast, so a process that reads it alone waits for ever.
        folder = trainer.log_dir if trainer.loggers and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        layers = layer_sparsity(pl_module)
        if folder is not None:
            write_table(layers, Path(folder) / "sparsity.csv")
        if not is_quiet():
            print_ending(trainer, pl_module, layers, self._adapters)
        if _MATPLOTLIB and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _log_figures(trainer, layers, self._adapters)


def _log_figures(trainer: Trainer, layers: Sequence[LayerSparsity], adapters: Sequence[Adapter]) -> None:
    loggers = [log for log in map(_figure_logger, trainer.loggers) if log is not None]
    if not loggers:
        return
    figures = {"ranks": rank_figure(layers)} if any(layer.max_rank for layer in layers) else {}
    factored = [adapter for adapter in adapters if isinstance(adapter, LowRankAdapter)]
    gates = [gate for gate in (adapter.effective_gate() for adapter in factored) if gate is not None]
    if gates:
        figures["gates"] = gate_figure(gates)
    for name, figure in figures.items():
        for log in loggers:
            log(f"{_PREFIX}{name}", figure, trainer.global_step)


def _figure_logger(logger: Logger) -> Callable[[str, Figure, int], object] | None:
    """A function that gives name, figure and step to a logger; None for a logger that takes no figures."""
    log_image = getattr(logger, "log_image", None)
    if callable(log_image):
        return lambda name, figure, step: log_image(key=name, images=[pixels(figure)], step=step)
    add_figure = getattr(getattr(logger, "experiment", None), "add_figure", None)
    return add_figure if callable(add_figure) else None


def write_table(layers: list[LayerSparsity], path: Path) -> None:
    """Write one row per layer as CSV, with the field names of :class:`LayerSparsity` as header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(LayerSparsity)])
        writer.writeheader()
        writer.writerows(asdict(layer) for layer in layers)


def read_table(path: Path) -> list[LayerSparsity]:
    """Read what :func:`write_table` wrote."""
    kinds = {"name": str, **dict.fromkeys(("rank", "max_rank", "remaining_parameters", "adapted_parameters"), int)}
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    read: Any = lambda name, value: kinds.get(name, float)(value) if value else None  # noqa: E731
    return [LayerSparsity(**{name: read(name, value) for name, value in row.items()}) for row in rows]
