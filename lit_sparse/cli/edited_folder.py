"""The folder of an edited model: its weights, its edits, and the original values of the changed entries."""

from __future__ import annotations

import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_sparse.data.quickstart import resolve
from lit_sparse.editing.bases import require_editable
from lit_sparse.editing.edits import SUFFIX, EditedModel
from lit_sparse.errors import UsageError
from lit_sparse.interchange.export import new_folder, save_tensors
from lit_sparse.interchange.patches import patch_from, require_fit, tensors_of
from lit_sparse.interchange.processors import save_processor
from lit_sparse.modules.backbone import load_backbone
from lit_sparse.verbosity import show

_EDITS = "edits"  # within the folder of an edited model
_ORIGINALS = "originals.safetensors"  # in there: the changed entries before any edit
_ORDER = "order.txt"  # names of the edits' files, one per line, in the order in which they were added


def require_names(names: Sequence[str]) -> None:
    """Refuse names that one folder cannot hold together on every file system."""
    taken: set[str] = set()
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in (_ORIGINALS, _ORDER) or len(name.splitlines()) != 1:
            raise UsageError(f"An edit cannot be named {name!r} within a model: rename its file.")
        if key in taken:
            raise UsageError(
                f"{name!r} would be in the model twice: leave it out, or rename the file if it is another edit."
            )
        taken.add(key)


def files_of(source: str) -> list[Path]:
    """The files of a source: an edit, a folder of edits, or an edited model."""
    place = Path(source)
    if place.is_file():
        return [place]
    inner = place / _EDITS
    folder = inner if inner.is_dir() else place
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.name != _ORIGINALS)
    if not found:
        raise UsageError(f"{source!r} is neither an edit nor a folder of edits: give what lit-sparse edit wrote.")
    return found


def edits_in(name: str) -> dict[str, Path]:
    """Name → file of the edits in a model, in the order in which they were added."""
    folder = Path(resolve(name)) / _EDITS
    if not (folder / _ORDER).is_file():
        return {}
    try:
        order = (folder / _ORDER).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The edits in {name!r} cannot be read: {error}.") from error
    return {edit: folder / Path(edit).name for edit in order}


def open_edited(name: str) -> EditedModel:
    """Load a model with the original values of its edited entries."""
    model = load_backbone(name, AutoModelForCausalLM, dtype="auto").eval()
    require_editable(model)
    if not edits_in(name):
        return EditedModel(model)
    file = Path(resolve(name)) / _EDITS / _ORIGINALS
    try:
        originals = patch_from(load_file(file))
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"The edits in {name!r} cannot be taken out: {file} cannot be read ({error}).") from error
    require_fit(model, originals, str(file))
    return EditedModel(model, originals)


def write_edited(edited: EditedModel, source: str, files: Sequence[Path], output: str) -> None:
    """Write an edited model, the files of its edits, and the tokenizer of the model ``source``."""
    model: Any = edited.model
    with new_folder(output) as draft:
        model.save_pretrained(draft)
        save_processor(resolve(source), draft)
        if files:
            (draft / _EDITS).mkdir()
            for file in files:
                shutil.copyfile(file, draft / _EDITS / file.name)
            save_tensors(tensors_of(edited.originals), draft / _EDITS / _ORIGINALS)
            (draft / _EDITS / _ORDER).write_text("".join(f"{file.name}\n" for file in files), encoding="utf-8")
    show(f"Wrote {output}, with {len(files)} edit{'' if len(files) == 1 else 's'} in it.")
