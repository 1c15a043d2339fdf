"""The model card that stands beside an export."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn


@dataclass(frozen=True)
class Provenance:
    """Where an export came from, for its card; what is not known is left out there.

    Args:
        base_model: Name of the pretrained model; None: what the model says of itself.
        method: Class name of the method.
        arguments: The method's arguments.
        metrics: Name to value, as the checkpoint keeps them.
        license: The hub's word for the license of the export.
    """

    base_model: str | None = None
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str = "unknown"


@dataclass(frozen=True)
class RankRow:
    """What the card says of one layer.

    Args:
        name: Full name of the layer.
        rank: Ranks that remain; experts' are added up.
        max_rank: Ranks that were trained.
        remaining: Entries of A and B that are not zero.
    """

    name: str
    rank: int
    max_rank: int
    remaining: int


_LOADING = {
    "peft": """
        from peft import PeftModel
        from transformers import {model_class}

        model = {model_class}.from_pretrained("{base_model}"{options})
        model = PeftModel.from_pretrained(model, "path/to/this/folder")
    """,
    "sparse": """
        import lit_sparse as ls
        from transformers import {model_class}

        model = {model_class}.from_pretrained("{base_model}"{options})
        ls.load_adapter(model, "path/to/this/folder")
    """,
    "merged": """
        from transformers import {model_class}

        model = {model_class}.from_pretrained("path/to/this/folder")
    """,
}
_LOADING["delta"] = _LOADING["sparse"]
_WHAT = {
    "peft": "a LoRA in PEFT's format, of the ranks that training kept",
    "sparse": "sparse low-rank adapters: of A and B only what is not zero",
    "delta": "a patch: the entries of the frozen weights that training changed, and by how much",
    "merged": "a whole model, with the adapters added to its weights",
}


def model_card(
    form: str,
    model: nn.Module,
    name: str | None,
    provenance: Provenance,
    ranks: Sequence[RankRow],
    whole: int,
    notes: Sequence[str] = (),
) -> str:
    """The text of ``README.md`` in the hub's form.

    Args:
        form: ``peft``, ``sparse``, ``delta`` or ``merged``.
        model: The model, for its class and number of labels.
        name: What the model says that it was loaded from.
        provenance: Where the export came from.
        ranks: The adapters.
        whole: Number of parameters trained whole.
        notes: What a user of the folder must know of the programs that read it.
    """
    base_model = _public_name(provenance.base_model or name)
    model_class = type(model).__name__
    method = (provenance.method or "adapters").lower()
    front = ModelCardData(
        base_model=base_model,
        library_name="peft" if form == "peft" else "transformers",
        license=provenance.license,
        tags=["lit-sparse", "lora", *([method] if provenance.method else [])],
    )
    remaining = sum(row.remaining for row in ranks)
    kept = sum(row.rank for row in ranks)
    parts = [
        f"---\n{front.to_yaml()}\n---\n\n# {provenance.method or 'Sparse adapters'} on {base_model or model_class}\n",
        f"This folder holds {_WHAT[form]}, written by lit_sparse.\n",
        _method(provenance),
        _metrics(provenance.metrics),
        f"## What remains\n\n{remaining:,} parameters in {kept} of {sum(row.max_rank for row in ranks)} ranks, and "
        f"{whole:,} trained whole.\n\n| layer | rank | trained rank | remaining parameters |\n|---|---|---|---|\n"
        + "".join(f"| {row.name} | {row.rank} | {row.max_rank} | {row.remaining} |\n" for row in ranks),
        _loading(form, model, base_model),
        "## Engines\n\n" + "".join(f"- {note}\n" for note in notes) if notes else "",
    ]
    return "\n".join(part for part in parts if part)


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


def _loading(form: str, model: nn.Module, base_model: str | None) -> str:
    labels = getattr(getattr(model, "config", None), "num_labels", 2)  # two is what transformers assumes
    code = (
        textwrap.dedent(_LOADING[form])
        .strip()
        .format(
            model_class=type(model).__name__,
            base_model=base_model or "path/to/the/base/model",
            options="" if labels == 2 else f", num_labels={labels}",
        )
    )
    return f"## How to load\n\n```python\n{code}\n```\n"


def _public_name(name: str | None) -> str | None:
    """A hub id as it is; of a path on somebody's disk, or a name of ours, only its end."""
    if name is None:
        return None
    local = Path(name).is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if local else name
