"""Read adapters from wherever they are stored, without their backbone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.patterns import NamePatterns
from lit_sparse.adapters.statistics import parts_of, sparsity_of_layer
from lit_sparse.callbacks.monitor import read_table
from lit_sparse.errors import UsageError
from lit_sparse.interchange.metadata import METADATA, read_metadata
from lit_sparse.interchange.peft_folder import CONFIG, read_peft
from lit_sparse.interchange.peft_shira import is_shira
from lit_sparse.interchange.stored_folder import read_layers
from lit_sparse.methods.base import divisor, scale_of
from lit_sparse.methods.method import names_layer
from lit_sparse.methods.progress import Progress, Trained
from lit_sparse.modules.checkpoint import KEY, PREFIX, load
from lit_sparse.modules.rebuilding import read_hyperparameters
from lit_sparse.reporting.run_logs import METRICS, find_metrics, read_metrics
from lit_sparse.reporting.stored import StoredAdapters

TABLE = "sparsity.csv"
_SHOWN = (
    *("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "lora_dropout"),
    *("modules_to_save", "task_type"),
)


@dataclass(frozen=True)
class Source:
    """One kind of place that adapters are read from.

    Args:
        fits: Whether a path is of this kind.
        read: Reads it.
        description: What the user gives, for error messages.
    """

    fits: Callable[[Path], bool]
    read: Callable[[Path], StoredAdapters]
    description: str


def read_adapters(
    source: nn.Module | str | os.PathLike[str], metrics: str | os.PathLike[str] | None = None
) -> StoredAdapters:
    """Read adapters from a model, a file or a folder.

    Args:
        source: A checkpoint file, a folder in PEFT's format or of ``save_adapter``, the folder of a run's logs; or a
            model with adapters.
        metrics: The metrics.csv of the run; None: the one beside the source, if there is one.

    Raises:
        UsageError: If the source does not exist, cannot be read, or holds no adapters.
    """
    if isinstance(source, nn.Module):
        found = _read_model(source)
    else:
        path, wanted = Path(source), " or ".join(kind.description for kind in SOURCES)
        if not path.exists():
            raise UsageError(f"{str(path)!r} does not exist. Give {wanted}.")
        kind = next((kind for kind in SOURCES if kind.fits(path)), None)
        if kind is None:
            raise UsageError(f"{str(path)!r} holds no adapters: {_contents(path)}. Give {wanted}.")
        found = kind.read(path)
    return found if metrics is None else replace(found, curves=read_metrics(Path(metrics)))


def _contents(folder: Path) -> str:
    names = sorted(child.name for child in folder.iterdir())
    if METRICS in names:
        return f"it has a {METRICS}, but no {TABLE}, which SparsityMonitor writes when a run ends"
    return f"it has {names[:6]}" if names else "it is empty"


def _with_layers(layers: dict[str, LayerFactors | LayerEntries], **entries: Any) -> StoredAdapters:
    return StoredAdapters(table=[sparsity_of_layer(layer) for layer in layers.values()], layers=layers, **entries)


def _read_model(model: nn.Module) -> StoredAdapters:
    layers = {name: parts_of(name, adapter) for name, adapter in adapters_in(model)}
    if not layers:
        raise UsageError(f"{type(model).__name__} holds no adapter. Inject a method first.")
    backbone = getattr(model, "name_or_path", None) or getattr(model, "backbone", None)
    named = backbone if isinstance(backbone, str) else None
    return _with_layers(layers, name=type(model).__name__, kind="a model", backbone=named)


def _read_checkpoint(path: Path) -> StoredAdapters:
    if path.suffix in (".safetensors", ".gguf"):
        raise UsageError(f"{str(path)!r} is one file of an export: give its folder, {str(path.parent)!r}.")
    checkpoint = load(path, mmap=True)  # of a checkpoint with a whole backbone, only A, B and gates are read
    record = checkpoint.get(KEY, {})
    layers = _layers_of({**checkpoint["state_dict"], **_computed_gates(checkpoint)}, record, path)
    if not layers:
        raise UsageError(
            f"{str(path)!r} holds no adapters: no lora_A and lora_B_t, and no values and indices, in its state_dict."
        )
    logged = find_metrics(path)
    return _with_layers(
        layers,
        name=str(path),
        kind="a checkpoint",
        **_method(record.get("method")),
        backbone=record.get("backbone"),
        step=checkpoint.get("global_step"),
        progress=Progress.in_checkpoint(checkpoint),
        curves={} if logged is None else read_metrics(logged),
    )


def _computed_gates(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gates that the method computes from parameters, under the names of the parameters."""
    records = [checkpoint.get(KEY), *(checkpoint.get("callbacks") or {}).values()]
    found = [record["gates"] for record in records if isinstance(record, Mapping) and "gates" in record]
    return {f"{name}.gate": gate for name, gate in found[0].items()} if found else {}


def _layers_of(
    weights: Mapping[str, Tensor], record: Mapping[str, Any], path: Path
) -> dict[str, LayerFactors | LayerEntries]:
    """The adapters in a state_dict, each under one of its names."""
    # A layer that the module holds under several names is stored under each; our record has one of them.
    names = record.get("ranks") or _once(weights)
    left: Mapping[str, int] = record.get("ranks_left") or record.get("ranks") or {}
    arguments = record.get("method", {}).get("init_args", {})
    known = NamePatterns(f"{path}: overrides")
    layers: dict[str, LayerFactors | LayerEntries] = {}
    for name in names:
        if f"{name}.indices" in weights:
            layers[name] = _entries(name, weights, path)
            continue
        A, B_t = weights.get(f"{name}.lora_A"), weights.get(f"{name}.lora_B_t")
        if A is None or B_t is None or A.ndim != 2 or A.shape[0] != B_t.shape[0]:
            raise UsageError(f"{str(path)!r} holds no matching lora_A and lora_B_t of {name!r}: it is damaged.")
        rows = A.shape[0]
        copies = max(1, rows // left[name]) if left.get(name) else 1
        max_rank = names[name] if name in left else rows
        alpha, scale = _scale(arguments, name, max_rank, known) if record else (None, None)
        layers[name] = LayerFactors(
            name=name,
            lora_A=A,
            lora_B_t=B_t,
            ranks=(rows // copies,) * copies,
            max_rank=max_rank,
            gate=weights.get(f"{name}.gate"),
            scale=scale,
            alpha=alpha,
        )
    return layers


def _entries(name: str, weights: Mapping[str, Tensor], path: Path) -> LayerEntries:
    values, indices, shape = (weights.get(f"{name}.{part}") for part in ("values", "indices", "shape"))
    if values is None or indices is None or shape is None or values.shape != indices.shape or shape.numel() != 2:
        raise UsageError(f"{str(path)!r} holds no matching values, indices and shape of {name!r}: it is damaged.")
    rows, columns = shape.tolist()
    return LayerEntries(name=name, indices=indices, values=values, shape=(rows, columns))


def _once(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """Names of layers with an A, or with values at indices, to its length; the first where several share one tensor."""
    found: dict[object, tuple[str, int]] = {}
    for key, tensor in weights.items():
        name, _, last = key.rpartition(".")
        if last == "lora_A" or (last == "values" and f"{name}.indices" in weights):
            found.setdefault(tensor.data_ptr() or name, (name, tensor.shape[0]))
    return dict(found.values())


def _scale(
    arguments: Mapping[str, Any], name: str, rank: int, known: NamePatterns
) -> tuple[float | None, float | None]:
    """Alpha and scale of a layer by the method's arguments, as :class:`~lit_sparse.SparseMethod` computes them."""
    if "alpha" not in arguments:
        return None, None
    own = name.removeprefix(PREFIX)  # the method was injected into the module's model
    overrides: Mapping[str, Mapping[str, float]] = arguments.get("overrides") or {}
    values = next((v for pattern, v in overrides.items() if names_layer(pattern, own, known)), {})
    use_rslora = bool(arguments.get("use_rslora"))
    # EVA changes ranks and keeps scales; GoRA keeps alpha.
    before = values.get("rank", arguments["rank"]) if arguments.get("init_weights") == "eva" else rank
    scale = scale_of(before, values.get("alpha", arguments["alpha"]), use_rslora)
    return scale * divisor(rank, use_rslora), scale


def _read_peft(path: Path) -> StoredAdapters:
    if is_shira(path):
        raise UsageError(
            f"{str(path)!r} is PEFT's SHiRA, which does not say how large the changed weights are: give the checkpoint "
            "or a folder of export_delta (format delta)."
        )
    lora = read_peft(path)
    arguments = {key: lora.config[key] for key in _SHOWN if lora.config.get(key)}
    backbone = lora.config.get("base_model_name_or_path")
    layers = {name: lora.layers[name] for name in sorted(lora.layers, key=_by_numbers)}
    return _from_folder(path, "a folder in PEFT's format", layers, "LoRA", arguments, backbone)


def _read_own(path: Path) -> StoredAdapters:
    layers = read_layers(path)
    if not layers:
        raise UsageError(f"{str(path)!r} holds no adapters: nothing was left of any.")
    entries = read_metadata(path)
    kind = "a patch of weights" if entries["format"] == "delta" else "a folder of save_adapter"
    arguments, backbone = entries.get("arguments") or {}, entries.get("base_model_name_or_path")
    return _from_folder(path, kind, layers, None, arguments, backbone)


def _from_folder(
    path: Path,
    kind: str,
    layers: Mapping[str, LayerFactors | LayerEntries],
    method: str | None,
    arguments: Mapping[str, Any],
    backbone: str | None,
) -> StoredAdapters:
    entries = read_metadata(path)
    trained = entries.get("trained")
    ranks, weights = (trained.get("ranks"), trained.get("weights")) if isinstance(trained, dict) else (None, None)
    counted = isinstance(ranks, int) and isinstance(weights, int) and weights > 0
    if any(isinstance(layer, LayerEntries) for layer in layers.values()):
        ranks = 0  # a patch has none, whatever was trained
    return _with_layers(
        dict(layers),
        name=str(path),
        kind=kind,
        method=entries.get("method") or method,
        arguments=arguments,
        backbone=backbone,
        progress=Progress.of(entries.get("progress")),
        trained=Trained(ranks, weights) if counted else None,  # type: ignore[arg-type]
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """Block 10 after block 2, where a file sorts its tensors alphabetically."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _read_run(path: Path) -> StoredAdapters:
    folder = path if path.is_dir() else path.parent
    try:
        table = read_table(folder / TABLE)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{folder / TABLE} is no table of SparsityMonitor's: {error}.") from error
    if not table:
        raise UsageError(f"{folder / TABLE} lists no adapters.")
    try:
        settings: Any = read_hyperparameters(folder / "hparams.yaml")
    except UsageError:  # a module of the user's own may have saved objects, or nothing: the table is enough
        settings = None
    settings = settings if isinstance(settings, dict) else {}
    backbone = settings.get("backbone")
    return StoredAdapters(
        name=str(path),
        kind="the logs of a run",
        table=table,
        **_method(settings.get("method")),
        backbone=backbone if isinstance(backbone, str) else None,
        curves=read_metrics(folder / METRICS) if (folder / METRICS).is_file() else {},
    )


def _method(record: Any) -> dict[str, Any]:
    """Class name and arguments from ``{class_path: …, init_args: …}``, where a source records them."""
    record = record if isinstance(record, dict) else {}
    name = str(record.get("class_path") or "").rpartition(".")[2] or None
    return {"method": name, "arguments": record.get("init_args") or {}}


SOURCES: tuple[Source, ...] = (
    Source(lambda path: (path / CONFIG).is_file(), _read_peft, "a folder in PEFT's format"),
    Source(lambda path: (path / METADATA).is_file(), _read_own, "a folder of save_adapter or export_delta"),
    Source(
        lambda path: path.name == TABLE or (path / TABLE).is_file(),
        _read_run,
        f"the folder of a run's logs with its {TABLE}",
    ),
    Source(Path.is_file, _read_checkpoint, "a checkpoint file"),
)
"""All kinds of places; the first that fits is read."""
