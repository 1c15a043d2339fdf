"""Log how sparse the adapters are, and show what is left of each layer at the end."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_info
from lightning_utilities.core.imports import RequirementCache
from torch import Tensor

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.naming import common_start, places
from lit_sparse.adapters.statistics import LayerSparsity, layer_sparsity, sparsity_of
from lit_sparse.callbacks.sparsify import Sparsify
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import pixels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import rank_figure
from lit_sparse.methods.progress import Progress, left, sentence
from lit_sparse.verbosity import is_quiet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_RICH = RequirementCache("rich")
_MATPLOTLIB = RequirementCache("matplotlib")
_PREFIX = "sparsity/"


class SparsityMonitor(Callback):
    """Log rank, gates, densities and remaining parameters to every logger of the Trainer.

    During training and after each epoch: ``sparsity/mean_rank``, ``sparsity/zero_gates``, ``sparsity/density_A``,
    ``sparsity/density_B``, ``sparsity/remaining_parameters``; in the progress bar ``rank`` and ``density`` (of A
    and B together). After each epoch also ``sparsity/density_BA`` and its bound by Proposition 1 of
    RoseLoRA, ``sparsity/density_BA_bound``, averaged over layers, and the live ranks per layer of each kind of layer,
    such as ``sparsity/rank/attention.self.query``. After fit, a table of the layers, and ``sparsity.csv`` with it in
    the logger's folder; and, where matplotlib is installed, pictures of the ranks and of the gates for loggers that
    take pictures, ``sparsity/ranks`` and ``sparsity/gates``: those with a ``log_image``, as that of Weights & Biases,
    and those whose ``experiment`` has an ``add_figure``, as that of TensorBoard.

    Args:
        every_n_steps: Optimizer steps between two logs; None: the Trainer's ``log_every_n_steps``.

    Raises:
        UsageError: If ``every_n_steps`` < 1, or the module that is fitted holds no adapters.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UsageError(f"every_n_steps must be at least 1, or None for the Trainer's own; got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self._logged_at = 0
        self._adapters: list[LowRankAdapter] = []
        self._kinds: dict[str, list[int]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the adapters by type."""
        self._logged_at = trainer.global_step
        named = dict(adapters_in(pl_module))
        self._adapters = list(named.values())
        self._kinds = {}
        for index, (kind, _) in enumerate(places(named).values()):
            self._kinds.setdefault(kind, []).append(index)
        if not self._adapters:
            raise UsageError(f"SparsityMonitor found no adapter in {type(pl_module).__name__}. Call lit_sparse.inject.")

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        """Log the cheap figures every ``every_n_steps`` optimizer steps."""
        every = self.every_n_steps or max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.global_step % every or trainer.global_step == self._logged_at:
            return
        self._logged_at = trainer.global_step  # accumulation batches end at the same step
        figures = sparsity_of(self._adapters)
        # Straight to the loggers: what a module logs between two of Lightning's own rounds would be dropped. Lightning
        # counts the first step as 0 there, so that these are in line with its own, the loss and the epoch's figures.
        for logger in trainer.loggers:
            logger.log_metrics({f"{_PREFIX}{k}": float(v) for k, v in figures.items()}, step=trainer.global_step - 1)
        entries = sum(a.lora_A.numel() + a.lora_B_t.numel() for a in self._adapters)
        short = {"rank": figures["mean_rank"], "density": figures["remaining_parameters"] / entries}
        pl_module.log_dict(short, prog_bar=True, logger=False, batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """Log all figures, now also where other callbacks can monitor them."""
        layers = layer_sparsity(pl_module)
        figures = {k: v.float() for k, v in sparsity_of(self._adapters).items()}
        for key in ("density_BA", "density_BA_bound"):
            figures[key] = torch.tensor(sum(getattr(layer, key) for layer in layers) / len(layers))
        for kind, indices in self._kinds.items():
            figures[f"rank/{kind}"] = torch.tensor(sum(layers[i].rank for i in indices) / len(indices))
        # All processes have the same figures; Lightning warns of every one that is not averaged nevertheless.
        values = {f"{_PREFIX}{k}": v.to(pl_module.device) for k, v in figures.items()}
        pl_module.log_dict(values, batch_size=1, sync_dist=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the table of layers and write it beside the logs."""
        # On every process: log_dir is broadcast, and a process that asks for it alone waits for ever.
        folder = trainer.log_dir if trainer.loggers and not trainer.fast_dev_run else None  # type: ignore[attr-defined]
        if not trainer.is_global_zero:
            return
        layers = layer_sparsity(pl_module)
        if folder is not None:
            write_table(layers, Path(folder) / "sparsity.csv")
        if not is_quiet():
            sparsify = next((c for c in trainer.callbacks if isinstance(c, Sparsify)), None)  # type: ignore[attr-defined]
            _show(layers, None if sparsify is None else sparsify.progress(trainer.global_step))
        if _MATPLOTLIB and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            _log_pictures(trainer, layers, self._adapters)


def _log_pictures(trainer: Trainer, layers: Sequence[LayerSparsity], adapters: Sequence[LowRankAdapter]) -> None:
    """Give pictures to the loggers that take some."""
    takers = [taker for taker in map(_picture_taker, trainer.loggers) if taker is not None]
    if not takers:
        return
    drawn = {"ranks": rank_figure(layers)}
    gates: list[Tensor] = [adapter.gate for adapter in adapters if adapter.gate is not None]
    if gates:
        drawn["gates"] = gate_figure(gates)
    for name, figure in drawn.items():
        for take in takers:
            take(f"{_PREFIX}{name}", figure, trainer.global_step)


def _picture_taker(logger: Logger) -> Callable[[str, Figure, int], object] | None:
    """What hands a picture to a logger: name, figure and step; None for a logger that takes none."""
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
    kinds = {
        "name": str,
        "rank": int,
        "max_rank": int,
        "remaining_parameters": int,
        "adapted_parameters": int,
    }
    with path.open(newline="", encoding="utf-8") as file:
        return [LayerSparsity(**{k: kinds.get(k, float)(v) for k, v in row.items()}) for row in csv.DictReader(file)]


def _show(layers: list[LayerSparsity], progress: Progress | None) -> None:
    header = ["layer", "rank", "A", "B", "BA", "bound", "left"]
    common = common_start([layer.name for layer in layers])
    rows = [
        [
            layer.name[len(common) :],
            f"{layer.rank}/{layer.max_rank}",
            f"{layer.density_A:.3f}",
            f"{layer.density_B:.3f}",
            f"{layer.density_BA:.3f}",
            f"{layer.density_BA_bound:.3f}",
            f"{layer.remaining_parameters:,}",
        ]
        for layer in layers
    ]
    ending = f"The run ended at {sentence(progress, layers)}." if progress else f"{left(layers)}."
    title = f"Adapters in {common.rstrip('.') or 'the model'}: ranks, densities of A, B, BA, bound on BA's"
    if _RICH:
        from rich import box, get_console
        from rich.table import Table

        # Narrow enough for a layer to a line on 80 columns.
        table = Table(
            title=title,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
            pad_edge=False,
            show_edge=False,
        )
        for column in header:
            table.add_column(column, justify="left" if column == "layer" else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        # The one that Lightning's progress bar draws on: it then makes room for the table.
        get_console().print(table)
        get_console().print(ending, highlight=False)
    else:
        widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) for line in [header, *rows]]
        rank_zero_info("\n".join([title, *lines, ending]))
