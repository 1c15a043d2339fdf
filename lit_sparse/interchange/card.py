"""What an export says of itself: the report for a terminal, and the model card in the folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import nn

from lit_sparse.adapters.statistics import LayerSparsity
from lit_sparse.interchange.metadata import means_path, name_of
from lit_sparse.interchange.processors import chat_format_of
from lit_sparse.interchange.snippet import labels_of, snippet
from lit_sparse.methods.progress import Progress


@dataclass(frozen=True)
class Provenance:
    """Where an export came from, for its card, which leaves out what is not known.

    Args:
        base_model: Name of the pretrained model; None: the model's ``name_or_path``.
        method: Class name of the method.
        arguments: The method's arguments.
        metrics: Name to value, as the checkpoint keeps them.
        license: License of the export, by its identifier on the hub.
        progress: How far the run was.
        truncation: A clause on how the adapters were truncated or added up after the run; None: they were not.
    """

    base_model: str | None = None
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    license: str = "unknown"
    progress: Progress | None = None
    truncation: str | None = None


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What an export wrote, and how well it was read back.

    Args:
        folder: The folder.
        format: ``peft``, ``gguf``, ``sparse``, ``delta`` or ``merged``.
        bytes: Size of the files of weights.
        remaining_parameters: Non-zero entries of A and B in live ranks, or of changes without factors.
        head_parameters: Parameters trained whole, without rows of tokens.
        difference: Largest difference of any output from the live model's.
        tolerance: Largest difference that was accepted.
        state: A sentence on the run's progress, on what is left of the adapters, and on what was done to them later.
        whole: A sentence on what is stored beside the adapters.
        notes: Sentences that a user of the folder must know.
    """

    folder: Path
    format: str
    bytes: int
    remaining_parameters: int
    head_parameters: int
    difference: float
    tolerance: float
    state: str
    whole: str
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """One line with the numbers, and one for each note."""
        numbers = (
            f"Wrote {self.folder} ({self.format}): {self.bytes:,} bytes of weights; {self.state}; "
            f"{self.whole}. Read back, its outputs differ from the live model's by "
            f"{self.difference:.1e} at most (tolerance {self.tolerance:.1e})."
        )
        return "\n".join((numbers, *self.notes))


_SHIRA = "single entries of the weights in PEFT's format, which calls it SHiRA"
_CONTENTS = {
    "peft": "a LoRA in PEFT's format, of the ranks that are left",
    "gguf": "a LoRA in llama.cpp's format, of the ranks that are left",
    "sparse": "sparse low-rank adapters: the non-zero entries of A and B",
    "delta": "a patch: the entries of the frozen weights that training changed, and by how much",
    "merged": "a whole model, with the adapters added to its weights",
}


def model_card(
    model: nn.Module,
    report: ExportReport,
    layers: Sequence[LayerSparsity],
    provenance: Provenance,
    repository: str | None,
    files: Collection[str],
    vocabulary: int | None,
    prompt: str | None = None,
) -> str:
    """The text of ``README.md``.

    Args:
        model: The model, for its class and labels.
        report: The export.
        layers: What is left of each layer.
        provenance: Where the export came from.
        repository: Repository on the hub that the folder goes to; None: it stays where it is.
        files: Names of the files in the folder.
        vocabulary: Rows that embeddings must have before the folder is loaded; None: as many as they have.
        prompt: A prompt in the chat format of the training; None: it was not trained on conversations.
    """
    name = getattr(model, "name_or_path", None) or None
    base_model = _hub_id(provenance.base_model) or _hub_id(name)
    here = name if name is not None and Path(name).exists() and repository is None else None
    form = report.format
    known = name_of(model)
    base, place = here or base_model or known, repository or str(report.folder)
    title = base_model or (known if known != name else None) or type(model).__name__
    code = snippet(form, model, base, place, repository is not None, files, vocabulary)
    method, ranked = provenance.method, any(layer.max_rank for layer in layers)
    front = ModelCardData(
        base_model=base_model,
        library_name=form if form in ("peft", "gguf") else "transformers",
        license=provenance.license,
        tags=["lit-sparse", *(["lora"] if ranked else []), *([method.lower()] if method else [])],
    )
    arguments = [(key, f"`{value!r}`") for key, value in provenance.arguments.items() if value is not None]
    heads = ["layer", *(["rank", "trained rank"] if ranked else []), "remaining parameters"]
    rows = [
        [layer.name, *([layer.rank, layer.max_rank] if ranked else []), layer.remaining_parameters] for layer in layers
    ]
    labels = labels_of(model) or []
    parts = [
        f"---\n{front.to_yaml()}\n---\n\n# {method or 'Sparse adapters'} on {title}\n",
        f"This folder holds {_CONTENTS[form] if ranked or form != 'peft' else _SHIRA}, written by lit_sparse.\n",
        f"## Method\n\n{method} with\n\n{_table(('argument', 'value'), arguments)}" if method else "",
        f"## Metrics\n\n{_table(('metric', 'value', 'rows'), _measured(provenance.metrics))}"
        if provenance.metrics
        else "",
        f"## What remains\n\n{report.state[0].upper()}{report.state[1:]}; {report.whole}.\n\n" + _table(heads, rows),
        f"## Labels\n\n{', '.join(f'{i}: {label}' for i, label in enumerate(labels))}\n" if labels else "",
        _chat_section(model, prompt) if prompt is not None else "",
        f"## How to load\n\n```{'bash' if form == 'gguf' else 'python'}\n{code}\n```\n",
        "## Engines\n\n" + "".join(f"- {note}\n" for note in report.notes) if report.notes else "",
    ]
    return "\n".join(part for part in parts if part)


def _chat_section(model: nn.Module, prompt: str) -> str:
    chat = chat_format_of(model)
    text = (
        "## Chat format\n\nTrained on conversations in this format, which the tokenizer writes by "
        f"`apply_chat_template`:\n\n```text\n{prompt}\n```\n"
    )
    if chat is None or chat["end"] is None:
        return text
    return f"{text}\nThe model ends its turn with `{chat['end']}`, at which generation must stop.\n"


_SPLITS = {"train": "training", "val": "validation", "test": "test"}


def _measured(metrics: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Name, value and split of each metric; the split is the first part of the name."""
    return [(name, f"{value:.4g}", _SPLITS.get(name.partition("_")[0], "")) for name, value in metrics.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    first, *rest = [f"| {' | '.join(map(str, cells))} |\n" for cells in (head, *rows)]
    return "".join([first, f"|{'---|' * len(head)}\n", *rest])


def _hub_id(name: str | None) -> str | None:
    """Name of a model on the hub, also from a path into the hub's cache; None for any other folder."""
    if name is None or "://" in name:
        return None
    cached = next((part for part in Path(name).parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.removeprefix("models--").replace("--", "/")
    return None if means_path(name) or Path(name).exists() else name
