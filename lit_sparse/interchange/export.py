"""Write a folder, read it back, and keep it only if it gives the live model's outputs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file
from torch import Tensor, nn

from lit_sparse._version import __version__
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.adapters.token_rows import embedding_count, token_rows_in
from lit_sparse.errors import UsageError, listed, reason_of, require_range
from lit_sparse.foreign_errors import is_disk_full
from lit_sparse.interchange.card import ExportReport, Provenance, model_card
from lit_sparse.interchange.metadata import name_of, write_metadata
from lit_sparse.interchange.probe import default_tolerance, difference_of, outputs_of, probe_batch
from lit_sparse.interchange.processors import chat_format_of, processor_of, save_processor
from lit_sparse.interchange.remains import trained_whole
from lit_sparse.interchange.snippet import labels_of
from lit_sparse.interchange.vocabulary import rows_of, texts_of, token_notes, whole_sentence
from lit_sparse.methods.progress import Trained, sentence, warn_if_nothing_is_left
from lit_sparse.verbosity import stages


class ExportOptions(TypedDict, total=False):
    """Options that every export takes by name.

    Args:
        tolerance: Largest difference of outputs that is accepted; None: what rounding may do in the coarsest dtype.
        batch: Arguments of the model to compare outputs on; None: made from its configuration.
        provenance: Method, metrics and license for the card.
        push_to_hub: Repository on the hub, such as ``me/my-lora``, to upload the folder to.
    """

    tolerance: float | None
    batch: Mapping[str, Tensor] | None
    provenance: Provenance | None
    push_to_hub: str | None


class Draft:
    """An export in progress: the live model's outputs, and the folder that must reproduce them.

    Args:
        folder: An empty folder.
        entries: Entries of the metadata.
        model: The live model.
        tokens: Ids that the batch contains, as far as there is room.
        options: Options of the export.
        dtypes: Those that weights pass through on the way, beside the model's own.
    """

    report: ExportReport
    """Set when the export is kept."""

    def __init__(
        self,
        folder: Path,
        entries: dict[str, Any],
        model: nn.Module,
        tokens: list[int],
        options: ExportOptions,
        dtypes: tuple[torch.dtype, ...],
    ) -> None:
        self.folder, self.entries = folder, entries
        names = ["computing the live model's outputs", "writing", "reading back"]
        self._stage = stages(f"Exporting {entries['format']}", names)
        next(self._stage)
        batch = options.get("batch")
        self._batch = probe_batch(model, tokens) if batch is None else batch
        self._expected = outputs_of(model, self._batch)
        tolerance = options.get("tolerance")
        self.tolerance = default_tolerance(model, self._expected, *dtypes) if tolerance is None else tolerance
        self.difference = float("inf")
        next(self._stage)

    def record(self, entries: Mapping[str, Any]) -> None:
        """Write the metadata, with the format's own entries; call it before reading back."""
        self.entries |= entries
        write_metadata(self.folder, self.entries)
        next(self._stage)

    def compare(self, loaded: nn.Module) -> None:
        """Compare the outputs of the model that was made from the folder.

        Raises:
            UsageError: If they differ by more than the tolerance.
        """
        self.difference = difference_of(self._expected, outputs_of(loaded, self._batch))
        next(self._stage, None)
        if not self.difference <= self.tolerance:
            raise UsageError(
                f"Read back, the export as {self.entries['format']} gives outputs that differ from the live model's by "
                f"{self.difference:.3g}, more than the tolerance of {self.tolerance:.3g}. Nothing was written. Raise "
                "tolerance, or choose another dtype or format."
            )


@contextmanager
def exporting(
    form: str,
    model: nn.Module,
    folder: str | os.PathLike[str],
    options: ExportOptions,
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    processor: str | os.PathLike[str] | None = None,
) -> Iterator[Draft]:
    """Export a model: the context writes the weights, reads them back, and compares.

    The folder is written beside its place and moved there at the end, with metadata, card and tokenizer.

    Args:
        form: ``peft``, ``gguf``, ``sparse``, ``delta`` or ``merged``.
        model: Model with adapters.
        folder: Must not exist, or be empty.
        options: Options of the export.
        dtypes: Those that weights pass through on the way, beside the model's own.
        processor: Name or folder of the tokenizer or processor to write too; None: that of the run, or the backbone's.

    Yields:
        The draft, for :meth:`Draft.record` and :meth:`Draft.compare`.

    Raises:
        UsageError: If the folder is not empty, a value is not finite, no outputs can be compared, they differ by more
            than the tolerance, or the upload fails. Nothing is left behind, except for the folder after an upload.
    """
    require_range("tolerance", options.get("tolerance"), at_least=0)
    provenance, repository = options.get("provenance") or Provenance(), options.get("push_to_hub")
    rows = rows_of(model, by_hand=form != "merged")
    texts, whole = texts_of(rows), trained_whole(model)
    adapted = {f"{name}.{n}": p for name, a in adapters_in(model) for n, p in a.named_parameters(recurse=False)}
    require_finite({**adapted, **whole, **{name: stored.rows for name, stored in rows.items()}})
    layers = layer_sparsity(model)
    warn_if_nothing_is_left([adapter for _, adapter in adapters_in(model)])
    head = sum(tensor.numel() for tensor in whole.values())
    trained_ids = {i for _, layer in token_rows_in(model) for i in layer.ids.tolist()}
    beside = whole_sentence(head, texts, trained_ids)
    vocabulary = embedding_count(model) if rows else None
    name = getattr(model, "name_or_path", None) or None
    entries: dict[str, Any] = {
        "format": form,
        "lit_sparse_version": __version__,
        "model_class": type(model).__name__,
        "base_model_name_or_path": name_of(model),
        "labels": labels_of(model),
        **{key: getattr(getattr(model, "config", None), key, None) for key in ("num_labels", "problem_type")},
        **asdict(provenance),
        "trained": asdict(Trained.of(layers)),
        **({"new_tokens": texts} if rows else {}),
    }
    with new_folder(folder) as path:
        draft = Draft(path, entries, model, list(texts), options, dtypes)
        yield draft
        prompt = save_processor(processor or processor_of(model) or name, path, texts, chat_format_of(model))
        draft.report = ExportReport(
            folder=Path(folder),
            format=form,
            bytes=sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf")),
            remaining_parameters=sum(layer.remaining_parameters for layer in layers),
            head_parameters=head,
            difference=draft.difference,
            tolerance=draft.tolerance,
            state="; ".join(filter(None, (sentence(provenance.progress, layers), provenance.truncation))),
            whole=beside,
            notes=(*entries.get("notes", ()), *token_notes(form, texts)),
        )
        numbers = ("bytes", "remaining_parameters", "head_parameters", "difference")
        write_metadata(path, {**entries, **{key: getattr(draft.report, key) for key in numbers}})
        files = [file.name for file in path.iterdir()]
        card = model_card(model, draft.report, layers, provenance, repository, files, vocabulary, prompt)
        (path / "README.md").write_text(card, encoding="utf-8")
    if repository is not None:
        _push(Path(folder), repository)


def require_free(folder: str | os.PathLike[str]) -> None:
    """Raise a UsageError unless ``folder`` does not exist or is an empty folder."""
    target = Path(folder)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        state = "is not empty" if target.is_dir() else "is a file"
        raise UsageError(f"{str(folder)!r} {state}: name a new folder, or remove what is there.")


@contextmanager
def new_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder that becomes ``folder`` if the context ends well, and is removed otherwise.

    Raises:
        UsageError: If ``folder`` exists and is not empty, cannot be made, or the disk is full.
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
        draft.chmod(0o777 & ~_umask())  # only the owner may read a temporary folder
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
    """Raise a UsageError that names the tensors with NaN or infinite values, if there are any."""
    spoilt = [name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if spoilt:
        raise UsageError(
            f"{listed(spoilt)} hold values that are not finite, so nothing is written. Export a checkpoint from before "
            "training failed."
        )


def _push(folder: Path, repository: str) -> None:
    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder)
    except Exception as error:  # any error of the network or the hub
        raise UsageError(
            f"{str(folder)!r} is written, but cannot be uploaded to {repository!r}: {reason_of(error)} Log "
            "in with hf auth login, and run hf upload."
        ) from error


def _umask() -> int:
    mask = os.umask(0)  # cannot be read without setting it
    os.umask(mask)
    return mask
