"""``lit-sparse edit fact`` and so on: one fact, and saved edits in and out of a model's folder."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch

from lit_sparse.cli.commands import Command
from lit_sparse.cli.edited_folder import edits_in, files_of, open_edited, require_names, write_edited
from lit_sparse.cli.words import closest, fail
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.editing.edits import SUFFIX, combine, load_edit
from lit_sparse.editing.one_fact import edit_fact
from lit_sparse.editing.writing import Writer
from lit_sparse.errors import UsageError, require_range
from lit_sparse.interchange.export import require_free
from lit_sparse.reporting.table import aligned
from lit_sparse.verbosity import show

_WIDTH = 60  # characters of a prompt in a table
_ANSWER = 16  # tokens of an answer that is printed


def run(words: Sequence[str], program: str) -> None:
    """Run a command.

    Args:
        words: The words after ``edit``; the first names the command.
        program: Name of the program, for the help.

    Raises:
        UsageError: As the function of the command.
    """
    name = words[0]
    if name not in _COMMANDS:
        known = closest(name, _COMMANDS) or f" Its commands are {', '.join(_COMMANDS)}."
        fail(f"There is no command {name!r} of edit.{known}", status=2)
    _COMMANDS[name].run(words[1:], f"{program} edit {name}")


def change_fact(
    model: str,
    prompt: str,
    target: str,
    rephrase: Sequence[str] | None = None,
    neighbour: Sequence[str] | None = None,
    lr: float = 3e-3,
    steps: int = 25,
    output: str | None = None,
) -> None:
    """Edit one fact, print the model's answers before and after, and write the edit.

    Args:
        model: Hub id or folder of the model.
        prompt: Text that the model continues.
        target: The new continuation.
        rephrase: Another wording of the prompt, to be shown; may be given several times.
        neighbour: A prompt whose answer should stay, to be shown; may be given several times.
        lr: Learning rate.
        steps: Optimizer steps, at most.
        output: File for the edit, such as fact.edit.safetensors; null: it is not written.

    Raises:
        UsageError: As :func:`~lit_sparse.edit_fact`, or if the file exists.
    """
    require_range("lr", lr, above=0)
    if output is not None:
        _require_new(output)
    edited = open_edited(model)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        edited.model.to(accelerator)
    tokenizer = load_tokenizer(model)
    asked = [
        ("prompt", prompt),
        *(("rephrase", p) for p in rephrase or ()),
        *(("neighbour", p) for p in neighbour or ()),
    ]
    writer = Writer(edited.model, tokenizer, 32, _ANSWER)
    before = writer.answers([text for _, text in asked])
    optimizer = functools.partial(torch.optim.AdamW, lr=lr, weight_decay=0.0)
    _, edit = edit_fact(edited, prompt, target, tokenizer, steps=steps, optimizer=optimizer)
    after = writer.answers([text for _, text in asked])
    for (kind, text), old, new in zip(asked, before, after, strict=True):
        sys.stdout.write(f"{kind}: {text}\n  before: {old}\n  after:  {new}\n")
    show(f"{edit.changed:,} of {edit.weights:,} weights changed ({edit.changed / edit.weights:.2%}).")
    if output is not None:
        replace(edit, base_model=model).save(output)  # by the name that the user knows
        show(f"Wrote {output}.")


def combine_edits(
    edits: Sequence[str],
    output: str,
    weights: Sequence[float] | None = None,
    rule: Literal["concatenate", "ties", "dare"] = "concatenate",
    density: float = 0.2,
    seed: int = 0,
) -> None:
    """Add edits up to one, and write it.

    Args:
        edits: Files of edits, or folders of them.
        output: File to write.
        weights: Factor of each edit; null: 1 for all.
        rule: concatenate: the sum. ties: trim each edit, elect a sign for each entry, and take the mean of the edits
            that agree. dare: drop entries at random, and rescale the others.
        density: Share of its entries that ties or dare keeps of each edit.
        seed: Of the entries that dare draws.

    Raises:
        UsageError: If a file cannot be read, the edits were made for different models, an argument is outside its
            range, or the file exists.
    """
    _require_new(output)
    found = [load_edit(file) for name in edits for file in files_of(name)]
    together, conflicts = combine(found, weights, rule, density, seed)
    together.save(output)
    show(
        f"Wrote {output}: {len(found)} edits, {together.changed:,} entries; {conflicts.shared:,} are changed more than "
        f"once, {conflicts.opposed:,} of them in opposite directions."
    )


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
    files = [file for name in edits for file in files_of(name)]
    present = edits_in(model)
    require_names([*present, *(file.name for file in files)])
    edited = open_edited(model)
    for file in files:
        edit = load_edit(file)
        conflicts = edited.add(edit, str(file))
        clash = f", of which earlier edits changed {conflicts:,} too" if conflicts else ""
        show(f"{file.name}: {edit.changed:,} entries{clash}")
    write_edited(edited, model, [*present.values(), *files], output)


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
    present = edits_in(model)
    unknown = [name for name in names if name not in present]
    if unknown:
        raise UsageError(f"{model!r} has no edit {unknown[0]!r} in it; it has {list(present)}.")
    left = [file for name, file in present.items() if name not in names]
    edited = open_edited(model)
    # All out, then the others in again: rounding is then the same as in a model that never had the removed edits.
    edited.restore()
    for file in left:
        edited.add(load_edit(file), str(file))
    write_edited(edited, model, left, output)


def list_edits(sources: Sequence[str]) -> None:
    """Print a table of edits with their facts, sizes and metrics.

    Args:
        sources: Files of edits, folders of them, or folders of edited models.

    Raises:
        UsageError: If there is no edit, or one cannot be read.
    """
    rows = [["edit", "prompt → new answer", "entries", "edit success", "locality"]]
    for file in (file for name in sources for file in files_of(name)):
        edit = load_edit(file)
        unmeasured: tuple[dict[str, float], ...] = ({},) * len(edit.requests)
        for request, found in zip(edit.requests, edit.metrics or unmeasured, strict=False):
            asked = request.prompt if len(request.prompt) <= _WIDTH else f"{request.prompt[: _WIDTH - 1]}…"
            metrics = [f"{found[name]:.2f}" if name in found else "" for name in ("edit_success", "locality")]
            rows.append([file.name, f"{asked} → {request.target_new}", f"{edit.changed:,}", *metrics])
    sys.stdout.write("\n".join(aligned(rows, left=len(rows[0]))) + "\n")


_COMMANDS = {
    "fact": Command(change_fact, repeated=["rephrase", "neighbour"]),
    "apply": Command(apply_edits, ["model", "edits"]),
    "combine": Command(combine_edits, ["edits"], numbers=["weights"]),
    "list": Command(list_edits, ["sources"]),
    "remove": Command(remove_edits, ["model", "names"]),
}


def _require_new(file: str) -> None:
    """Refuse a file that exists, or whose name would not be found in a folder of edits."""
    if Path(file).suffix != SUFFIX:
        raise UsageError(f"The file of an edit ends in {SUFFIX}; got {file!r}.")
    if Path(file).exists():
        raise UsageError(f"{file!r} exists: name another output, or remove it.")
