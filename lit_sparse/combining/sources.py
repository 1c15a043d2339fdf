"""Read the adapters that are to be added up, and check that they fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.patterns import matches_tail
from lit_sparse.data.quickstart import resolve
from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.metadata import METADATA, read_metadata
from lit_sparse.interchange.patches import Patch
from lit_sparse.interchange.peft_config import task_of
from lit_sparse.interchange.peft_folder import CONFIG, read_peft
from lit_sparse.interchange.peft_shira import is_shira
from lit_sparse.interchange.remains import without_dead_ranks
from lit_sparse.interchange.stored_folder import HEAD, read_folder
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.base import SparseModule
from lit_sparse.modules.rebuilding import known_class, saved_method
from lit_sparse.reporting.sources import read_adapters

AUTO_CLASSES: Mapping[str, Any] = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
}
"""PEFT's names of tasks, and the classes of models for them."""

LABELLED = ("SEQ_CLS", "TOKEN_CLS", None)
"""Tasks whose heads have an output for each label; a LoRA of PEFT's need not name its task."""

_ENTRIES = "changes single entries, and has no A and B. Export it in the format delta, and combine such patches."


@dataclass(frozen=True, eq=False, kw_only=True)
class Addend:
    """What one source holds.

    Args:
        path: The source as the user named it.
        base: Name of the backbone; None if it is not known.
        task: PEFT's name of the task; None if it is not known.
        labels: Number of outputs of the head; None if it is not known.
        layers: Full layer name to factors of scale 1, without gates and dead ranks; empty for a patch.
        patch: Changed entries of the weights; None for a low-rank adapter.
        shapes: Name to shape of the weights that a patch changes.
        head: Name to tensor of the modules trained whole.
        head_modules: Their names or trailing parts of them; empty for a checkpoint, whose module knows them.
        entries: The folder's metadata; None for a checkpoint.
        sample: Some frozen weights of the backbone, of a checkpoint; None if it has none.
    """

    path: str
    base: str | None
    task: str | None
    labels: int | None
    layers: dict[str, LayerFactors] = field(default_factory=dict)
    patch: Patch | None = None
    shapes: Mapping[str, Sequence[int]] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    head_modules: list[str] = field(default_factory=list)
    entries: dict[str, Any] | None = None
    sample: Tensor | None = None


def read_addend(source: str) -> Addend:
    """Read a source without its backbone.

    Args:
        source: Folder of a LoRA in PEFT's format, of ``save_adapter`` or of ``export_delta``, or a checkpoint file of a
            SparseModule.

    Raises:
        UsageError: If it is none of these or cannot be read, its adapters changed the frozen weights, or it has rows of
            tokens.
    """
    path = Path(source)
    if (path / CONFIG).is_file():
        found = _of_peft(source, path)
    elif (path / METADATA).is_file():
        found = _of_folder(source, path)
    elif path.is_file() and path.suffix == ".safetensors":
        raise UsageError(
            f"{source!r} is one file: give the folder of an adapter. Edits are combined by lit-sparse edit combine."
        )
    elif path.is_file():
        found = _of_checkpoint(source, path)
    else:
        raise UsageError(
            f"{source!r} holds no adapter. Give a folder in PEFT's format, of save_adapter or of export_delta, or a "
            "checkpoint file."
        )
    return replace(found, layers={name: without_dead_ranks(layer) for name, layer in found.layers.items()})


def require_fit(addends: Sequence[Addend], backbone: str | None, head: str | None) -> None:
    """Check that the sources were made for one model and one task.

    Args:
        addends: What the sources hold.
        backbone: The user's word for the backbone of all of them; None: they must name the same.
        head: The source whose head is kept; None: it was not said.

    Raises:
        UsageError: If kinds, backbones, tasks, sizes of layers or numbers of labels differ.
    """
    patches = [addend.path for addend in addends if addend.patch is not None]
    if patches and len(patches) < len(addends):
        raise UsageError(
            f"{listed(patches)} are patches of the weights (delta), and the others are low-rank adapters. Export all "
            "as one of the two."
        )
    _require_same("task", {addend.path: addend.task for addend in addends})
    if backbone is None:
        bases = {addend.path: addend.base and resolve(addend.base).rstrip("/") for addend in addends}
        hint = "If these are names of one model, give its name as backbone."
        _require_same("backbone", bases, hint)
    sampled = [(addend.path, addend.sample) for addend in addends if addend.sample is not None]
    for path, sample in sampled[1:]:
        # Samples of other layers, as with a frozen head, cannot be compared.
        if sample.shape == sampled[0][1].shape and not checkpoints.same_weights(sample, sampled[0][1]):
            raise UsageError(
                f"{sampled[0][0]!r} and {path!r} were trained on different backbones: their frozen weights differ."
            )
    if head is None:
        labels = {addend.path: addend.labels for addend in addends if addend.task in LABELLED}
        _require_same("number of labels", labels, "Name the source whose head is to be kept as head.")
    sizes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for addend in addends:
        of_layers = {name: (a.out_features, a.in_features, len(a.ranks)) for name, a in addend.layers.items()}
        for name, size in {**of_layers, **{name: tuple(shape) for name, shape in addend.shapes.items()}}.items():
            path, known = sizes.setdefault(name, (addend.path, size))
            if known != size:
                raise UsageError(
                    f"{name!r} has the size {known} in {path!r} and {size} in {addend.path!r}: they were trained on "
                    "different models."
                )


def _require_same(what: str, values: Mapping[str, Any], hint: str = "") -> None:
    """Refuse two known values."""
    known = {path: value for path, value in values.items() if value is not None}
    first = next(iter(known), None)
    other = next((path for path, value in known.items() if value != known[first or path]), None)
    if first is not None and other is not None:
        raise UsageError(
            f"The {what} of {first!r} is {known[first]!r}, and that of {other!r} is {known[other]!r}: such adapters do "
            f"not add up. {hint}".rstrip()
        )


def _of_peft(source: str, path: Path) -> Addend:
    if is_shira(path):
        raise UsageError(f"{source!r} {_ENTRIES}")
    lora = read_peft(path)
    entries = read_metadata(path)
    saved = lora.config.get("modules_to_save") or []
    head = {name: tensor for name, tensor in lora.whole.items() if _is_in(name, saved)}
    beside = [name for name in lora.whole if name not in head]
    if beside or lora.tokens:
        raise UsageError(
            f"{source!r} holds {listed([*beside, *lora.tokens])} beside adapters and head: rows of embeddings cannot "
            "be added up."
        )
    labels = min((len(tensor) for tensor in head.values() if tensor.ndim), default=None)  # the last layer's outputs
    return Addend(
        path=source,
        base=entries.get("base_model_name_or_path") or lora.config.get("base_model_name_or_path"),
        task=lora.config.get("task_type") or task_of(str(entries.get("model_class"))),
        labels=entries.get("num_labels", labels),
        layers=lora.layers,
        head=head,
        head_modules=saved,
        entries=entries,
    )


def _of_folder(source: str, path: Path) -> Addend:
    saved = read_folder(path)
    entries = saved.entries
    if saved.tokens:
        raise UsageError(f"{source!r} holds rows of new tokens, which cannot be added up.")
    is_patch = entries["format"] == "delta"
    return Addend(
        path=source,
        base=entries.get("base_model_name_or_path"),
        task=task_of(str(entries.get("model_class"))),
        labels=entries.get("num_labels"),
        layers=saved.factors,
        patch=saved.patch if is_patch else None,
        shapes={name: layer["shape"] for name, layer in entries["layers"].items()} if is_patch else {},
        head={n.removeprefix(HEAD): t for n, t in saved.tensors.items() if n.startswith(HEAD)},
        head_modules=entries["head_modules"],
        entries=entries,
    )


def _of_checkpoint(source: str, path: Path) -> Addend:
    checkpoint = checkpoints.read(path)
    saved = checkpoint[checkpoints.KEY]
    method = saved_method(saved["method"])
    if method.changes_weights:
        raise UsageError(
            f"{source!r} was trained with init_weights {method.init_weights!r}, which changed the frozen weights."
        )
    if saved.get("token_rows"):
        raise UsageError(f"{source!r} holds rows of new tokens, which cannot be added up.")
    outside = checkpoints.outside_backbone(checkpoint)
    if outside:
        raise UsageError(f"{source!r} holds {listed(outside)}, which lie outside the backbone and cannot be added up.")
    stored = read_adapters(path).layers
    layers = {
        name.removeprefix(checkpoints.PREFIX): replace(layer, name=name.removeprefix(checkpoints.PREFIX))
        for name, layer in stored.items()
        if isinstance(layer, LayerFactors)
    }
    if len(layers) < len(stored):
        raise UsageError(f"{source!r} {_ENTRIES}")
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    own = tuple(f"{name}." for name in stored)
    head = {n.removeprefix(checkpoints.PREFIX): t for n, t in weights.items() if not n.startswith(own)}
    kind = getattr(known_class(saved["module"], SparseModule), "auto_class", None) if "module" in saved else None
    return Addend(
        path=source,
        base=saved["backbone"],
        task=next((task for task, auto_class in AUTO_CLASSES.items() if auto_class is kind), None),
        labels=min((len(tensor) for tensor in head.values() if tensor.ndim), default=None),
        layers=layers,
        head=head,
        sample=saved["backbone_sample"],
    )


def same_head(one: Addend, other: Addend) -> bool:
    """Whether two sources hold the same head, bit for bit."""
    return one.head.keys() == other.head.keys() and all(torch.equal(one.head[n], t) for n, t in other.head.items())


def _is_in(name: str, modules: Sequence[str]) -> bool:
    parts = name.split(".")
    owners = [".".join(parts[:length]) for length in range(1, len(parts))]
    return any(matches_tail(owner, module) for owner in owners for module in modules)
