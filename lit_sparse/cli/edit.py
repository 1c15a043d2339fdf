"""``lit-sparse edit apply``, ``list`` and ``remove``: edits that were saved, in and out of a model's folder."""

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

NAMES = ("apply", "list", "remove")

_EDITS = "edits"  # within the folder of an edited model
_ORIGINALS = "originals.safetensors"  # in there: what the changed entries were before any edit
_ORDER = "order.txt"  # names of their files, a line each, in the order in which they were added
_WIDTH = 60  # characters of a prompt in a table


def run(words: Sequence[str], program: str) -> None:
    """Run a command.

    Args:
        words: What the user typed after ``edit``; the first is one of :data:`NAMES`.
        program: Name of the program, for its help.

    Raises:
        UsageError: If a word is not understood, or what the commands raise.
    """
    arguments = _parser(f"{program} edit").parse_args(list(words))
    if arguments.command == "apply":
        apply_edits(arguments.model, arguments.edits, arguments.output)
    elif arguments.command == "remove":
        remove_edits(arguments.model, arguments.names, arguments.output)
    else:
        list_edits(arguments.sources)


def apply_edits(model: str, edits: Sequence[str], output: str) -> None:
    """Add edits to a model, one after another, and write the edited model with them beside it.

    Args:
        model: Hub id or folder of the model; one that was edited already keeps its edits.
        edits: Files of edits, or folders of them.
        output: Folder to write; must not exist, or be empty.

    Raises:
        UsageError: If something cannot be read, or an edit is of another model or in it already.
    """
    require_free(output)
    files = [file for name in edits for file in _files(name)]
    present = _present(model)
    _require_names([*present, *(file.name for file in files)])
    edited = _edited_model(model)
    for file in files:
        edit = load_edit(file)
        conflicts = edited.add(edit, str(file))
        clash = f", {conflicts:,} of them changed by earlier edits too" if conflicts else ""
        show(f"{file.name}: {edit.changed:,} entries{clash}")
    _write(edited, model, [*present.values(), *files], output)


def remove_edits(model: str, names: Sequence[str], output: str) -> None:
    """Take edits out of an edited model, as if they had never been in it, and write what is left.

    Args:
        model: Folder of the edited model.
        names: Of the edits, as ``list`` shows them.
        output: Folder to write; must not exist, or be empty.

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
    # All out and the others in again: the sums are those of a model that never had the removed ones.
    edited.restore()
    for file in left:
        edited.add(load_edit(file), str(file))
    _write(edited, model, left, output)


def list_edits(sources: Sequence[str]) -> None:
    """Print a table of edits: what they are for, how much they change, and what was measured.

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
            figures = [f"{found[name]:.2f}" if name in found else "" for name in ("edit_success", "locality")]
            rows.append([file.name, f"{asked} → {request.target_new}", f"{edit.changed:,}", *figures])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    sys.stdout.write("\n".join(lines) + "\n")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} ({self.prog} --help says what there is).")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=program, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    apply = commands.add_parser("apply", help="add edits to a model", allow_abbrev=False)
    apply.add_argument("model", help="hub id or folder of the model; an edited one keeps its edits")
    apply.add_argument("edits", nargs="+", help="files of edits, or folders of them")
    apply.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    shown = commands.add_parser("list", help="what edits are for, and what was measured", allow_abbrev=False)
    shown.add_argument("sources", nargs="+", help="files of edits, folders of them, or folders of edited models")
    remove = commands.add_parser("remove", help="take edits out of an edited model", allow_abbrev=False)
    remove.add_argument("model", help="folder of the edited model")
    remove.add_argument("names", nargs="+", help="of the edits, as list shows them")
    remove.add_argument("--output", required=True, help="folder to write; must not exist, or be empty")
    return parser


def _require_names(names: Sequence[str]) -> None:
    """Refuse names of edits that a folder cannot hold beside each other, on any file system."""
    taken: set[str] = set()
    for name in names:
        key = unicodedata.normalize("NFKC", name).casefold()
        if key in (_ORIGINALS, _ORDER) or len(name.splitlines()) != 1:
            raise UsageError(f"An edit cannot be named {name!r} within a model: give its file another name.")
        if key in taken:
            raise UsageError(
                f"{name!r} would be in the model twice: leave it out, or give the other file another name."
            )
        taken.add(key)


def _files(source: str) -> list[Path]:
    """The edits that a word of the user's means."""
    place = Path(source)
    if place.is_file():
        return [place]
    inner = place / _EDITS
    folder = inner if inner.is_dir() else place
    found = sorted(file for file in folder.glob(f"*{SUFFIX}") if file.name != _ORIGINALS)
    if not found:
        raise UsageError(f"{source!r} is no file of an edit, and no folder with some: give what lit-sparse edit wrote.")
    return found


def _present(name: str) -> dict[str, Path]:
    """The edits that are in a model, by the names of their files, in the order in which they were added."""
    folder = Path(resolve(name)) / _EDITS
    if not (folder / _ORDER).is_file():
        return {}
    try:
        order = (folder / _ORDER).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The edits in {name!r} cannot be read: {error}.") from error
    return {edit: folder / Path(edit).name for edit in order}


def _edited_model(name: str) -> EditedModel:
    """A model, with what its entries were before the edits that are in it."""
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
