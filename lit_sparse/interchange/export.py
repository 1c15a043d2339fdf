"""Write what was trained into a folder, read it back, and keep it only if it says what the live model says."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_sparse._version import __version__
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.adapters.token_rows import embedding_count, token_rows_in
from lit_sparse.errors import UsageError, listed
from lit_sparse.foreign_errors import is_disk_full
from lit_sparse.interchange.card import ExportedFolder, Provenance, model_card
from lit_sparse.interchange.metadata import write_metadata
from lit_sparse.interchange.probe import default_tolerance, difference_of, outputs_of, probe_batch
from lit_sparse.interchange.processors import save_processor
from lit_sparse.interchange.remains import trained_whole
from lit_sparse.interchange.snippet import labels_of
from lit_sparse.interchange.vocabulary import StoredRows, rows_of, texts_of, token_notes, whole_sentence
from lit_sparse.methods.progress import Trained, sentence, warn_if_nothing_is_left
from lit_sparse.verbosity import stages


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how well it was read back.

    Args:
        folder: Where it is.
        format: ``peft``, ``gguf``, ``sparse``, ``delta`` or ``merged``.
        bytes: Size of its files of weights.
        remaining_parameters: Entries of A and B that are not zero, in ranks that contribute something.
        head_parameters: What was trained whole, without rows of tokens.
        difference: Largest difference of any output from the live model's, on the batch that was tried.
        tolerance: What it may be at most.
        state: How far the run was, where that is known, and what is left of the adapters, in words.
        whole: What is stored beside the adapters, in words.
        notes: What a user of the folder must know, a sentence or two each.
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
        """For a terminal: a line with the figures, and one for each note."""
        figures = (
            f"Wrote {self.folder} ({self.format}): {self.bytes:,} bytes of weights; {self.state}; "
            f"{self.whole}. Read back, its outputs differ from the live model's by "
            f"{self.difference:.1e} at most (tolerance {self.tolerance:.1e})."
        )
        return "\n".join((figures, *self.notes))


@dataclass(frozen=True)
class Form:
    """One form of export.

    Args:
        name: ``peft``, ``gguf``, ``sparse``, ``delta`` or ``merged``.
        write: Fills an empty folder and returns this format's entries of the metadata. ``notes``, a list of sentences,
            are also printed and put on the card.
        read: Makes a model of the folder, in memory of its own.
        dtypes: Those that weights pass through on the way, beside the model's own.
    """

    name: str
    write: Callable[[Path], Mapping[str, Any]]
    read: Callable[[Path], nn.Module]
    dtypes: tuple[torch.dtype, ...] = ()


@dataclass(frozen=True)
class Terms:
    """What all forms of export ask alike.

    Args:
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the model's dtype.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: What the card says.
        push_to_hub: Repository on the hub to upload to.
        processor: Name or folder of the tokenizer or processor to write too; None: the backbone's.
    """

    tolerance: float | None = None
    batch: Mapping[str, Tensor] | None = None
    provenance: Provenance | None = None
    push_to_hub: str | None = None
    processor: str | os.PathLike[str] | None = None


def export(model: nn.Module, folder: str | os.PathLike[str], form: Form, terms: Terms) -> ExportReport:
    """Write one form of export, beside the place where it is to be, and move it there once it is right.

    Args:
        model: Model with adapters.
        folder: Must not exist, or be empty.
        form: Which form.
        terms: What all forms ask alike.

    Raises:
        UsageError: If the folder is not empty, no outputs can be compared, they differ by more than the tolerance, or
            the upload fails. Nothing is left behind but, in the last case, the folder.
    """
    if terms.tolerance is not None and not terms.tolerance >= 0:
        raise UsageError(f"tolerance is the largest difference of outputs that is accepted; got {terms.tolerance}.")
    tokens = rows_of(model, by_hand=form.name != "merged")  # what is whole needs no list of its rows
    head = sum(tensor.numel() for tensor in trained_whole(model).values())
    trained = {i for _, layer in token_rows_in(model) for i in layer.ids.tolist()}
    whole = whole_sentence(head, texts_of(tokens), trained)
    provenance = terms.provenance or Provenance()
    layers = layer_sparsity(model)
    warn_if_nothing_is_left([adapter for _, adapter in adapters_in(model)])
    state = sentence(provenance.progress, layers)
    name = getattr(model, "name_or_path", None) or None
    with new_folder(folder) as draft:
        entries = {**_entries(form.name, model, name, provenance), "trained": asdict(Trained.of(layers))}
        vocabulary = embedding_count(model) if tokens else None
        if tokens:
            entries["new_tokens"] = texts_of(tokens)
        difference, tolerance = _write_checked(draft, model, form, terms, entries, tokens)
        save_processor(terms.processor or name, draft, texts_of(tokens))
        size = sum(file.stat().st_size for file in draft.iterdir() if file.suffix in (".safetensors", ".gguf"))
        notes = (*entries.get("notes", ()), *token_notes(form.name, texts_of(tokens)))
        report = ExportReport(
            Path(folder),
            form.name,
            size,
            sum(layer.remaining_parameters for layer in layers),
            head,
            difference,
            tolerance,
            state,
            whole,
            notes,
        )
        figures = ("bytes", "remaining_parameters", "head_parameters", "difference")
        write_metadata(draft, {**entries, **{figure: getattr(report, figure) for figure in figures}})
        place = terms.push_to_hub or str(folder)
        files = [file.name for file in draft.iterdir()]
        written = ExportedFolder(place, terms.push_to_hub is not None, files, vocabulary)
        card = model_card(form.name, model, written, provenance, state, layers, whole, notes)
        (draft / "README.md").write_text(card, encoding="utf-8")
    if terms.push_to_hub is not None:
        _push(report.folder, terms.push_to_hub)
    return report


def require_free(folder: str | os.PathLike[str]) -> None:
    """Raise a UsageError if there is something at ``folder`` that is no empty folder."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        state = "is not empty" if target.is_dir() else "is a file"
        raise UsageError(f"{str(folder)!r} {state}: name a new folder, or remove what is there.")


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` when the context ends well, and vanishes when it does not.

    Raises:
        UsageError: If there is something at ``folder`` that is no empty folder, it cannot be made, or the disk is full.
    """
    require_free(folder)
    target = Path(folder)
    try:
        target.absolute().parent.mkdir(parents=True, exist_ok=True)
        # Beside it, so that the move is one step on one disk.
        draft = Path(tempfile.mkdtemp(prefix=f".{target.absolute().name}.", dir=target.absolute().parent))
    except OSError as error:
        raise UsageError(f"{str(folder)!r} cannot be made: {error}.") from error
    try:
        yield draft
        draft.chmod(0o777 & ~_umask())  # of a temporary folder only its owner can read
        if target.exists():
            target.rmdir()
        draft.rename(target)
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if is_disk_full(error):
            raise UsageError(
                f"The disk is full: {str(folder)!r} cannot be written, and nothing of it is left. Make room, or name a "
                "folder on another disk."
            ) from error
        raise


def save_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file, each with memory of its own.

    Raises:
        UsageError: If a value is not finite.
    """
    require_finite(tensors)
    own = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    save_file(own, file, metadata={"format": "pt"})


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise a UsageError that names the tensors in which a value is NaN or infinite, if there are any."""
    spoilt = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoilt:
        raise UsageError(
            f"{listed(spoilt)} hold values that are not finite, so nothing is written. Export a checkpoint from before "
            "training failed."
        )


def _write_checked(
    draft: Path, model: nn.Module, form: Form, terms: Terms, entries: dict[str, Any], tokens: Mapping[str, StoredRows]
) -> tuple[float, float]:
    """Write, read back and compare; the difference and what it may be. ``entries`` gains what the form says."""
    adapted = {f"{name}.{n}": p for name, a in adapters_in(model) for n, p in a.named_parameters(recurse=False)}
    require_finite({**adapted, **trained_whole(model), **{name: rows.rows for name, rows in tokens.items()}})
    stage = stages(f"Exporting {form.name}", ["computing what it must give", "writing", "reading back"])
    next(stage)
    batch = terms.batch if terms.batch is not None else probe_batch(model, list(texts_of(tokens)))
    expected = outputs_of(model, batch)
    tolerance = terms.tolerance
    if tolerance is None:
        tolerance = default_tolerance(model, expected, *form.dtypes)
    next(stage)
    entries |= form.write(draft)
    write_metadata(draft, entries)  # reading back needs it
    next(stage)
    difference = difference_of(expected, outputs_of(form.read(draft), batch))
    next(stage, None)
    if not difference <= tolerance:
        raise UsageError(
            f"Read back, the export as {form.name} gives outputs that differ from the live model's by "
            f"{difference:.3g}, more than the tolerance of {tolerance:.3g}: nothing was written. Raise tolerance if "
            "that is good enough, or write in another dtype or format."
        )
    return difference, tolerance


def _entries(form: str, model: nn.Module, base_model: str | None, provenance: Provenance) -> dict[str, Any]:
    return {
        "format": form,
        "lit_sparse_version": __version__,
        "model_class": type(model).__name__,
        "base_model_name_or_path": base_model,
        "labels": labels_of(model),
        **asdict(provenance),
    }


def _push(folder: Path, repository: str) -> None:
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # whatever the network and the hub answer
        raise UsageError(
            f"{str(folder)!r} is written, but cannot be uploaded to {repository!r}: {' '.join(str(error).split())} Log "
            "in with hf auth login, and run hf upload."
        ) from error


def _umask() -> int:
    mask = os.umask(0)  # cannot be read without setting it
    os.umask(mask)
    return mask
