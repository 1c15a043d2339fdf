"""``lit-sparse edit apply``, ``list`` and ``remove``: saved edits in and out of a model's folder."""

from __future__ import annotations

import argparse
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lit_sparse.data.quickstart import resolve
from lit_sparse.editing.edits import SUFFIX, EditedModel, load_edit
from lit_sparse.errors import UsageError
from lit_sparse.interchange.export import new_folder, require_free, save_tensors
from lit_sparse.interchange.patches import patch_from, require_fit, tensors_of
from lit_sparse.interchange.processors import save_processor
from lit_sparse.modules.backbone import load_backbone
from lit_sparse.verbosity import show

_EDITS = "edits"  # within the folder of an edited model
_ORIGINALS = "originals.safetensors"  # in there: the changed entries before any edit
_ORDER = "order.txt"  # names of the edits' files, one per line, in the order in which they were added
_WIDTH = 60  # characters of a prompt in a table
_HELP = {
    "apply": "add edits to a model",
    "list": "show what edits are for, and their metrics",
    "remove": "take edits out of an edited model",
}
NAMES = tuple(_HELP)


def run(words: Sequence[str], program: str) -> None:
    """Run a command.

    Args:
        words: The words after ``edit``; the first is one of :data:`NAMES`.
        program: Name of the program, for the help.

    Raises:
        UsageError: If a word is not understood, or the command fails.
    """
    parser = _Parser(prog=f"{program} edit", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    apply, list_, remove = (commands.add_parser(name, help=_HELP[name], allow_abbrev=False) for name in NAMES)
    apply.add_argument("model", help="hub id or folder of the model; an edited model keeps its edits")
    apply.add_argument("edits", nargs="+", help="files of edits, or folders of them")
    list_.add_argument("sources", nargs="+", help="files of edits, folders of them, or folders of edited models")
    remove.add_argument("model", help="folder of the edited model")
    remove.add_argument("names", nargs="+", help="names of edits, as list shows them")
    for command in (apply, remove):
        command.add_argument("--output", required=True, help="folder to write; it must be empty or not exist")
    arguments = parser.parse_args(list(words))
    if arguments.command == "apply":
        apply_edits(arguments.model, arguments.edits, arguments.output)
    elif arguments.command == "remove":
        remove_edits(arguments.model, arguments.names, arguments.output)
    else:
        list_edits(arguments.sources)


def apply_edits(model: str, edits: Sequence[str], output: str) -> None:
    """Add edits to a model, one after another, and write the edited model together with its edits.

    Args:
        model: Hub id or folder of the model; an edited model keeps its edits.
        edits: Files of edits, or folders of them.
        output: Folder to write; it must be empty or not exist.

    Raises:
        UsageError: If a file cannot be read, or an edit was made for another model or is in the model already.
    """
    require_free(output)
    files = [file for name in edits for file in _files(name)]
    present = _present(model)
    _require_names([*present, *(file.name for file in files)])
    edited = _edited_model(model)
    for file in files:
        edit = load_edit(file)
        conflicts = edited.add(edit, str(file))
        clash = f", of which earlier edits changed {conflicts:,} too" if conflicts else ""
        show(f"{file.name}: {edit.changed:,} entries{clash}")
    _write(edited, model, [*present.values(), *files], output)


def remove_edits(model: str, names: Sequence[str], output: str) -> None:
    """Take edits out of an edited model, as if they had never been in it, and write the model.

    Args:
        model: Folder of the edited model.
        names: Names of the edits, as ``list`` shows them.
        output: Folder to write; it must be empty or not exist.

    Raises:
        UsageError: If the model has no such edit, or cannot be read.
    """
    require_free(output)
    present = _present(model)
    unknown = [name for name in names if name not in present]
    if unknown:
        raise UsageError(f"{model!r} has no edit {unknown[0]!r} in it; it has {list(present)}.")
    left = [file for name, file in present.items() if name not in names]
    edited = _edited_model(model)
    # All out, then the others in again: rounding is then the same as in a model that never had the removed edits.
    edited.restore()
    for file in left:
        edited.add(load_edit(file), str(file))
    _write(edited, model, left, output)


def list_edits(sources: Sequence[str]) -> None:
    """Print a table of edits with their facts, sizes and metrics.

    Args:
        sources: Files of edits, folders of them, or folders of edited models.

    Raises:
        UsageError: If there is no edit, or one cannot be read.
    """
    rows = [["edit", "prompt → new answer", "entries", "edit success", "locality"]]
    for file in (file for name in sources for file in _files(name)):
        edit = load_edit(file)
        unmeasured: tuple[dict[str, float], ...] = ({},) * len(edit.requests)
        for request, found in zip(edit.requests, edit.metrics or unmeasured, strict=False):
            asked = request.prompt if len(request.prompt) <= _WIDTH else f"{request.prompt[: _WIDTH - 1]}…"
            metrics = [f"{found[name]:.2f}" if name in found else "" for name in ("edit_success", "locality")]
            rows.append([file.name, f"{asked} → {request.target_new}", f"{edit.changed:,}", *metrics])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help).")


def _require_names(names: Sequence[str]) -> None:
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


def _files(source: str) -> list[Path]:
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


def _present(name: str) -> dict[str, Path]:
    """Name → file of the edits in a model, in the order in which they were added."""
    folder = Path(resolve(name)) / _EDITS
    if not (folder / _ORDER).is_file():
        return {}
    try:
        order = (folder / _ORDER).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The edits in {name!r} cannot be read: {error}.") from error
    return {edit: folder / Path(edit).name for edit in order}


def _edited_model(name: str) -> EditedModel:
    """Load a model with the original values of its edited entries."""
    model = load_backbone(name, AutoModelForCausalLM, dtype="auto").eval()
    if not _present(name):
        return EditedModel(model)
    file = Path(resolve(name)) / _EDITS / _ORIGINALS
    try:
        originals = patch_from(load_file(file))
    except (OSError, SafetensorError) as error:
        raise UsageError(f"The edits in {name!r} cannot be taken out: {file} cannot be read ({error}).") from error
    require_fit(model, originals, str(file))
    return EditedModel(model, originals)


def _write(edited: EditedModel, source: str, files: Sequence[Path], output: str) -> None:
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
