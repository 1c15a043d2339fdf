"""Where adapters are stored, and how each kind of place is read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.patterns import NamePatterns
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.errors import UsageError, parse_json
from lit_sparse.figures.curves import Curves
from lit_sparse.interchange.export import METADATA
from lit_sparse.interchange.peft_folder import CONFIG, read_peft
from lit_sparse.interchange.stored_folder import read_factors
from lit_sparse.methods.base import names_layer
from lit_sparse.methods.progress import Progress, Trained
from lit_sparse.modules.checkpoint import KEY, load
from lit_sparse.reporting.run_logs import METRICS, find_metrics, read_metrics
from lit_sparse.reporting.stored import LayerFigures, StoredLayer, figures_of, stored_layer

TABLE = "sparsity.csv"


@dataclass(frozen=True, eq=False)
class Adapters:
    """What was read.

    Args:
        name: Where from, as the user gave it.
        kind: What it is, in words.
        layers: A, B and gate by full layer name; empty where only a table is stored.
        figures: A line for each layer.
        method: Name of the method's class, or of what is known of it.
        arguments: The method's arguments.
        backbone: Name of the backbone.
        step: Optimizer steps taken; None if not known.
        progress: How far the run was, of how many steps; None if not known.
        trained: What the run began with; None if all of its layers are here.
        curves: What the run logged.
    """

    name: str
    kind: str
    layers: dict[str, StoredLayer]
    figures: list[LayerFigures]
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    step: int | None = None
    progress: Progress | None = None
    trained: Trained | None = None
    curves: Curves = field(default_factory=dict)

    @property
    def gates(self) -> list[Tensor]:
        """The gates of all layers that have some."""
        return [layer.gate for layer in self.layers.values() if layer.gate is not None]

    def layer(self, name: str | None) -> StoredLayer:
        """A layer by its full name, or by trailing parts of it that no other has; None: the one that changes most.

        Raises:
            UsageError: If there is no such layer, several are, or only a table is stored.
        """
        if not self.layers:
            raise UsageError(f"{self.name} is {self.kind}, without A and B. Give a checkpoint or an adapter's folder.")
        if name is None:
            return max(self.layers.values(), key=lambda layer: float(layer.change_per_copy().norm()))
        found = [full for full in self.layers if f".{full}".endswith(f".{name}")]
        if name in self.layers or len(found) == 1:
            return self.layers[name if name in self.layers else found[0]]
        if found:
            raise UsageError(f"The layer {name!r} could be any of {found[:4]}: give more of its name.")
        tails = {".".join(full.split(".")[-parts:]) for full in self.layers for parts in range(1, full.count(".") + 2)}
        close = get_close_matches(name, sorted(tails)) or list(self.layers)[:3]
        raise UsageError(f"There is no layer {name!r} in {self.name}. Did you mean {' or '.join(map(repr, close))}?")


@dataclass(frozen=True)
class Source:
    """One kind of place that adapters are read from.

    Args:
        fits: Whether a path is of this kind.
        read: Reads it.
        words: What to give, for the message when nothing fits.
    """

    fits: Callable[[Path], bool]
    read: Callable[[Path], Adapters]
    words: str


def read_adapters(
    source: nn.Module | str | os.PathLike[str], metrics: str | os.PathLike[str] | None = None
) -> Adapters:
    """Read adapters where they are, without a backbone.

    Args:
        source: A checkpoint file, a folder in PEFT's format, the folder of a run's logs; or a model with adapters.
        metrics: The metrics.csv of the run; None: the one that lies with the source, if any.

    Raises:
        UsageError: If there is nothing, it cannot be read, or it holds no adapters.
    """
    if isinstance(source, nn.Module):
        found = _read_model(source)
    else:
        path = Path(source)
        if not path.exists():
            raise UsageError(f"{str(path)!r} does not exist. Give {_wanted()}.")
        kind = next((kind for kind in SOURCES if kind.fits(path)), None)
        if kind is None:
            raise UsageError(f"{str(path)!r} holds no adapters: {_inside(path)}. Give {_wanted()}.")
        found = kind.read(path)
    if metrics is not None:
        found = replace(found, curves=read_metrics(Path(metrics)))
    return found


def _wanted() -> str:
    return " or ".join(source.words for source in SOURCES)


def _inside(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    if (path / METRICS).is_file():
        return f"it has a {METRICS}, but no {TABLE}, which SparsityMonitor writes when a run ends"
    return f"it has {names[:6]}" if names else "it is empty"


def _read_model(model: nn.Module) -> Adapters:
    layers = {name: stored_layer(name, adapter) for name, adapter in adapters_in(model)}
    if not layers:
        raise UsageError(f"{type(model).__name__} holds no adapter. Inject a method first.")
    backbone = getattr(model, "name_or_path", None) or getattr(model, "backbone", None)
    named = backbone if isinstance(backbone, str) else None
    return Adapters(type(model).__name__, "a model", layers, _figures(layers), backbone=named)


def _figures(layers: Mapping[str, StoredLayer]) -> list[LayerFigures]:
    return [figures_of(layer) for layer in layers.values()]


def _read_checkpoint(path: Path) -> Adapters:
    if path.suffix in (".safetensors", ".gguf"):
        raise UsageError(f"{str(path)!r} is one file of an export: give its folder, {str(path.parent)!r}.")
    # Mapped: of a checkpoint with the whole backbone in it only A, B and gates are read.
    checkpoint = load(path, mmap=True)
    weights, record = checkpoint["state_dict"], checkpoint.get(KEY, {})
    layers = _layers_of(weights, record, path)
    if not layers:
        raise UsageError(f"{str(path)!r} holds no adapters: no lora_A and lora_B_t in its state_dict.")
    method = record.get("method", {})
    logged = find_metrics(path)
    return Adapters(
        name=str(path),
        kind="a checkpoint",
        layers=layers,
        figures=_figures(layers),
        method=_last_part(method.get("class_path")),
        arguments=method.get("init_args", {}),
        backbone=record.get("backbone"),
        step=checkpoint.get("global_step"),
        progress=Progress.in_checkpoint(checkpoint),
        curves={} if logged is None else read_metrics(logged),
    )


def _layers_of(weights: Mapping[str, Tensor], record: Mapping[str, Any], path: Path) -> dict[str, StoredLayer]:
    """The adapters in a state_dict, each under one of its names."""
    # A layer that the module holds under several names is stored under each; our record has one of them.
    names = record.get("ranks") or _once(weights)
    left: Mapping[str, int] = record.get("ranks_left") or record.get("ranks") or {}
    arguments = record.get("method", {}).get("init_args", {})
    known = NamePatterns(f"{path}: overrides")
    layers = {}
    for name in names:
        A, B_t = weights.get(f"{name}.lora_A"), weights.get(f"{name}.lora_B_t")
        if A is None or B_t is None or A.ndim != 2 or A.shape[0] != B_t.shape[0]:
            raise UsageError(f"{str(path)!r} holds no matching lora_A and lora_B_t of {name!r}: it is damaged.")
        rows = A.shape[0]
        copies = max(1, rows // left[name]) if left.get(name) else 1
        max_rank = names[name] if name in left else rows
        alpha, scale = _scale(arguments, name, max_rank, known) if record else (None, None)
        layers[name] = StoredLayer(name, A, B_t, weights.get(f"{name}.gate"), scale, alpha, copies, max_rank)
    return layers


def _once(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of layers with an A, the first where several share its memory, to its number of rows."""
    found: dict[object, tuple[str, int]] = {}
    for key, tensor in weights.items():
        name, _, last = key.rpartition(".")
        if last == "lora_A":
            found.setdefault(tensor.data_ptr() or name, (name, tensor.shape[0]))
    return dict(found.values())


def _scale(
    arguments: Mapping[str, Any], name: str, rank: int, known: NamePatterns
) -> tuple[float | None, float | None]:
    """Alpha and scale of a layer by the method's arguments, as :class:`~lit_sparse.SparseMethod` reckons them."""
    if "alpha" not in arguments:
        return None, None
    own = name.removeprefix("model.")  # the method was injected into the module's model
    overrides: Mapping[str, Mapping[str, float]] = arguments.get("overrides") or {}
    values = next((v for pattern, v in overrides.items() if names_layer(pattern, own, known)), {})
    alpha = values.get("alpha", arguments["alpha"])
    alpha = float(rank if alpha is None else alpha)
    return alpha, alpha / (math.sqrt(rank) if arguments.get("use_rslora") else rank)


def _read_peft(path: Path) -> Adapters:
    lora = read_peft(path)
    layers = {}
    for name in sorted(lora.pairs, key=_by_numbers):
        pair = lora.pairs[name]
        rank, B_t = pair.lora_A.shape[0], pair.lora_B.t()
        layers[name] = StoredLayer(name, pair.lora_A, B_t, None, pair.scale, pair.alpha, 1, rank)
    entries = _metadata(path)
    shown = ("r", "lora_alpha", "target_modules", "use_rslora", "lora_dropout", "modules_to_save", "task_type")
    return Adapters(
        name=str(path),
        kind="a folder in PEFT's format",
        layers=layers,
        figures=_figures(layers),
        method=entries.get("method") or "LoRA",
        arguments={key: lora.config[key] for key in shown if lora.config.get(key)},
        backbone=lora.config.get("base_model_name_or_path"),
        progress=Progress.of(entries.get("progress")),
        trained=_trained(entries),
    )


def _read_sparse(path: Path) -> Adapters:
    layers = {}
    for name, remains in sorted(read_factors(path).items(), key=lambda item: _by_numbers(item[0])):
        rank, copies = max(remains.ranks), len(remains.ranks)
        # Experts may have different ranks left; here they have rows of zeros instead.
        A, B_t = (
            torch.cat([F.pad(rows, (0, 0, 0, rank - len(rows))) for rows in matrix.split(remains.ranks)])
            for matrix in (remains.lora_A, remains.lora_B_t)
        )
        layers[name] = StoredLayer(name, A, B_t, None, 1.0, float(rank), copies, rank)
    if not layers:
        raise UsageError(f"{str(path)!r} holds no adapters: nothing was left of any.")
    entries = _metadata(path)
    return Adapters(
        name=str(path),
        kind="a folder of save_adapter",
        layers=layers,
        figures=_figures(layers),
        method=entries.get("method"),
        arguments=entries.get("arguments") or {},
        backbone=entries.get("base_model_name_or_path"),
        progress=Progress.of(entries.get("progress")),
        trained=_trained(entries),
    )


def _trained(entries: Mapping[str, Any]) -> Trained | None:
    record = entries.get("trained")
    found = record if isinstance(record, dict) else {}
    ranks, weights = found.get("ranks"), found.get("weights")
    return Trained(ranks, weights) if isinstance(ranks, int) and isinstance(weights, int) and weights > 0 else None


def _metadata(path: Path) -> Mapping[str, Any]:
    """What an export of this library says beside its weights; nothing in a folder of another program."""
    file = path / METADATA
    entries = parse_json(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return entries if isinstance(entries, dict) else {}


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Block 10 after block 2: the file has its tensors in the order of letters."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_run(path: Path) -> Adapters:
    folder = path if path.is_dir() else path.parent
    try:
        table = read_table(folder / TABLE)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / TABLE} is no table of SparsityMonitor's: {error}.") from error
    if not table:
        raise UsageError(f"{folder / TABLE} lists no adapters.")
    settings = _hyperparameters(folder / "hparams.yaml")
    method = settings.get("method")
    method = method if isinstance(method, dict) else {}
    backbone = settings.get("backbone")
    return Adapters(
        name=str(path),
        kind="the logs of a run",
        layers={},
        figures=[LayerFigures(layer) for layer in table],
        method=_last_part(method.get("class_path")),
        arguments=method.get("init_args") or {},
        backbone=backbone if isinstance(backbone, str) else None,
        curves=read_metrics(folder / METRICS) if (folder / METRICS).is_file() else {},
    )


def _hyperparameters(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError:  # of a module of the user's own, with objects in it: the table is there all the same
        return {}
    return read if isinstance(read, dict) else {}


def _last_part(class_path: str | None) -> str | None:
    return class_path.rpartition(".")[2] if class_path else None


SOURCES: tuple[Source, ...] = (
    Source(lambda path: (path / CONFIG).is_file(), _read_peft, "a folder in PEFT's format"),
    Source(lambda path: (path / METADATA).is_file(), _read_sparse, "a folder of save_adapter"),
    Source(
        lambda path: path.name == TABLE or (path / TABLE).is_file(),
        _read_run,
        f"the folder of a run's logs with its {TABLE}",
    ),
    Source(Path.is_file, _read_checkpoint, "a checkpoint file"),
)
"""The kinds of places, the first that fits is taken: another format is another line here."""
