"""What the end of a run prints: what is left of each kind of layer, the metrics, the file, and what to type next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich import box, get_console
from rich.table import Table
from torch import nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.naming import common_start, places
from lit_sparse.adapters.statistics import LayerSparsity, layer_sparsity
from lit_sparse.callbacks.forgetting_cap import ForgettingCap
from lit_sparse.callbacks.sparsify import Sparsify, progress_of
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError
from lit_sparse.methods.progress import left, sentence

if TYPE_CHECKING:
    from lit_sparse.serving.pretrained import Pretrained

_MOST_METRICS = 8


def print_ending(
    trainer: Trainer, pl_module: LightningModule, layers: Sequence[LayerSparsity], adapters: Sequence[Adapter]
) -> None:
    """Print it below the progress bar.

    Args:
        trainer: The Trainer, after fit.
        pl_module: The module that was trained.
        layers: What is left of each layer.
        adapters: The adapters of these layers.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, pl_module, "fit")  # or it draws itself anew below every line
    console, progress = get_console(), progress_of(trainer)
    _print_kinds(layers)
    lines = [f"The run ended at {sentence(progress, layers)}." if progress else f"{left(layers)}."]
    goals = (callback.method.goal(adapters) for callback in callbacks_of(trainer, Sparsify))
    lines += [goal for goal in goals if goal is not None]
    lines += [cap.report for cap in callbacks_of(trainer, ForgettingCap) if cap.report is not None]
    metrics = [f"{name} {float(value):.4g}" for name, value in trainer.callback_metrics.items() if name[:3] == "val"]
    if metrics:
        lines.append(f"The last validation: {', '.join(metrics[:_MOST_METRICS])}.")
    merged = any(adapter.took_from_weight for adapter in adapters)  # the only form that holds changed weights
    best, saved = _best(trainer), _shortened(_last_saved(trainer))
    if best:
        lines.append(best)
    if saved:
        target = "the merged model" if merged else "files for PEFT"
        lines.append(f"Saved in {saved}. To see each layer, and to write {target}:")
    for line in lines:
        console.print(line, highlight=False)
    if saved:
        file = shlex.quote(saved)
        form = "merged" if merged else "peft"
        commands = [f"inspect {file}", f"export --ckpt_path {file} --format {form} --output FOLDER"]
        commands += [f"chat {file}"] if _continues_texts(pl_module) else []
        for command in commands:
            console.print(f"  lit-sparse {command}", highlight=False, soft_wrap=True)


def summary(model: nn.Module | Pretrained) -> None:
    """Print what is left of the adapters in a model at this moment: a row for each kind of layer, and their sum.

    Args:
        model: A model or module with adapters, in training or after it, or what :func:`~lit_sparse.from_pretrained`
            gives.

    Raises:
        UsageError: If it has no adapters.
    """
    if not isinstance(model, nn.Module):
        model = model.model
    layers = layer_sparsity(model)
    if not layers:
        raise UsageError(f"{type(model).__name__} holds no adapter to list. Inject a method first.")
    _print_kinds(layers)
    get_console().print(f"{left(layers)}.", highlight=False)


def _print_kinds(layers: Sequence[LayerSparsity]) -> None:
    title, table = _kinds(layers)
    get_console().print(title, style="italic", highlight=False)
    get_console().print(table)


def _kinds(layers: Sequence[LayerSparsity]) -> tuple[str, Table]:
    """A title, and a row for each kind of layer, narrow enough for 80 columns.

    Ranks are shown where some are dead, densities where they are not those of the live ranks, as under RoseLoRA.
    Changes without factors have neither, and the share of the weights that changes is shown.
    """
    names = [layer.name for layer in layers]
    kinds: dict[str, list[LayerSparsity]] = {}
    for layer, (kind, _) in zip(layers, places(names).values(), strict=True):
        kinds.setdefault(kind, []).append(layer)
    factored = any(layer.max_rank for layer in layers)
    masked = any(abs((d or 0) * x.max_rank - x.rank) > 1e-6 for x in layers for d in (x.density_A, x.density_B))
    ranked = factored and (not masked or any(layer.rank < layer.max_rank for layer in layers))
    heads = ["layers", *(["ranks", "each"] if ranked else []), *(["A", "B", "BA"] if masked else [])]
    shown = [*(["live ranks"] if ranked else []), *(["densities of A, B and BA"] if masked else [])]
    heads += ["left"] if factored else ["changed", "left"]
    shown += ["parameters left"] if factored else ["share of the weights that changes", "parameters left"]
    title = f"Adapters in {common_start(names).rstrip('.') or 'the model'}: {', '.join(shown)}"
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("kind of layer", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", overflow="fold")
    for kind, members in kinds.items():
        ranks = sorted(layer.rank for layer in members)
        cells = {
            "layers": str(len(members)),
            "ranks": f"{sum(ranks):,}/{sum(layer.max_rank for layer in members):,}",
            "each": str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]}–{ranks[-1]}",
            **{d: _mean(members, f"density_{d}") for d in ("A", "B", "BA")},
            "changed": _mean(members, "density_BA"),
            "left": f"{sum(layer.remaining_parameters for layer in members):,}",
        }
        table.add_row(kind, *(cells[head] for head in heads))
    return title, table


def _mean(layers: Sequence[LayerSparsity], field: str) -> str:
    return f"{sum(getattr(layer, field) or 0 for layer in layers) / len(layers):.3f}"


def _best(trainer: Trainer) -> str:
    """A sentence on the best checkpoint, if one was chosen by a metric and is not the last."""
    for callback in trainer.checkpoint_callbacks:
        path, score = getattr(callback, "best_model_path", ""), getattr(callback, "best_model_score", None)
        if path and score is not None and path != _last_saved(trainer):
            return f"The best by {callback.monitor}, {float(score):.4g}: {_shortened(path)}."  # type: ignore[attr-defined]
    return ""


def _last_saved(trainer: Trainer) -> str:
    """The path of the last checkpoint; empty without one."""
    paths = [getattr(callback, "last_model_path", "") for callback in trainer.checkpoint_callbacks]
    paths += [getattr(callback, "best_model_path", "") for callback in trainer.checkpoint_callbacks]
    return next(filter(None, paths), "")


def _shortened(path: str) -> str:
    return str(Path(path).relative_to(Path.cwd())) if path and Path(path).is_relative_to(Path.cwd()) else path


def _continues_texts(module: LightningModule) -> bool:
    """Whether ``chat`` takes the model: it generates, and has no encoder."""
    model = getattr(module, "model", None)
    generates = getattr(model, "can_generate", None)
    return callable(generates) and generates() and not getattr(model.config, "is_encoder_decoder", False)  # type: ignore[union-attr]
