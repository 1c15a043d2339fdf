"""The model card that stands beside an export."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from lit_sparse.adapters.statistics import LayerSparsity
from lit_sparse.interchange.snippet import labels_of, snippet
from lit_sparse.methods.progress import Progress


@dataclass(frozen=True)
class Provenance:
    """Where an export came from, for its card; what is not known is left out there.

    Args:
        base_model: Name of the pretrained model; None: what the model says of itself.
        method: Class name of the method.
        arguments: The method's arguments.
        metrics: Name to value, as the checkpoint keeps them.
        license: The hub's word for the license of the export.
        progress: How far the run was that trained it.
    """

    base_model: str | None = None
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str = "unknown"
    progress: Progress | None = None


@dataclass(frozen=True)
class ExportedFolder:
    """A folder that a card describes.

    Args:
        place: Its path as the user gave it, or the repository on the hub.
        is_repository: Whether ``place`` is on the hub.
        files: Names of the files in it.
        vocabulary: Number of rows that embeddings must have for it; None: as many as the pretrained model has.
    """

    place: str
    is_repository: bool
    files: Collection[str]
    vocabulary: int | None = None


_WHAT = {
    "peft": "a LoRA in PEFT's format, of the ranks that training kept",
    "gguf": "a LoRA in llama.cpp's format, of the ranks that training kept",
    "sparse": "sparse low-rank adapters: of A and B only what is not zero",
    "delta": "a patch: the entries of the frozen weights that training changed, and by how much",
    "merged": "a whole model, with the adapters added to its weights",
}


def model_card(
    form: str,
    model: nn.Module,
    folder: ExportedFolder,
    provenance: Provenance,
    state: str,
    ranks: Sequence[LayerSparsity],
    whole: str,
    notes: Sequence[str] = (),
) -> str:
    """The text of ``README.md`` in the hub's form.

    Args:
        form: ``peft``, ``gguf``, ``sparse``, ``delta`` or ``merged``.
        model: The model, for its class and labels.
        folder: What is written, and where it can be loaded from.
        provenance: Where the export came from.
        state: How far the run was, where that is known, and what is left of the adapters, in words.
        ranks: The adapters.
        whole: What is stored beside the adapters, in words.
        notes: What a user of the folder must know of the programs that read it.
    """
    name = getattr(model, "name_or_path", None) or None
    base_model = _hub_id(provenance.base_model) or _hub_id(name)
    here = name if name is not None and Path(name).exists() and not folder.is_repository else None
    code = snippet(
        form, model, here or base_model or name, folder.place, folder.is_repository, folder.files, folder.vocabulary
    )
    model_class = type(model).__name__
    method = (provenance.method or "adapters").lower()
    front = ModelCardData(
        base_model=base_model,
        library_name=form if form in ("peft", "gguf") else "transformers",
        license=provenance.license,
        tags=["lit-sparse", "lora", *([method] if provenance.method else [])],
    )
    parts = [
        f"---\n{front.to_yaml()}\n---\n\n# {provenance.method or 'Sparse adapters'} on {base_model or model_class}\n",
        f"This folder holds {_WHAT[form]}, written by lit_sparse.\n",
        _method(provenance),
        _metrics(provenance.metrics),
        f"## What remains\n\n{state[0].upper()}{state[1:]}; {whole}.\n\n"
        f"| layer | rank | trained rank | remaining parameters |\n|---|---|---|---|\n"
        + "".join(f"| {row.name} | {row.rank} | {row.max_rank} | {row.remaining_parameters} |\n" for row in ranks),
        _labels(model),
        f"## How to load\n\n```{'bash' if form == 'gguf' else 'python'}\n{code}\n```\n",
        "## Engines\n\n" + "".join(f"- {note}\n" for note in notes) if notes else "",
    ]
    return "\n".join(part for part in parts if part)


def _labels(model: nn.Module) -> str:
    labels = labels_of(model)
    return "" if labels is None else f"## Labels\n\n{', '.join(f'{i}: {name}' for i, name in enumerate(labels))}\n"


def _method(provenance: Provenance) -> str:
    if provenance.method is None:
        return ""
    rows = "".join(f"| {name} | `{value!r}` |\n" for name, value in provenance.arguments.items() if value is not None)
    return f"## Method\n\n{provenance.method} with\n\n| argument | value |\n|---|---|\n{rows}"


def _metrics(metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    rows = "".join(f"| {name} | {value:.4g} |\n" for name, value in metrics.items())
    return f"## Metrics\n\n| metric | value |\n|---|---|\n{rows}"


def _hub_id(name: str | None) -> str | None:
    """The name of a model on the hub; None for a folder that is not a copy which the hub's client made."""
    if name is None or "://" in name:
        return None
    cached = next((part for part in Path(name).parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/")
    local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()
    return None if local else name
