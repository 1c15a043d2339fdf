"""Write the sum of several patches."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import ModelCardData

from lit_sparse._version import __version__
from lit_sparse.combining.recipe import Recipe
from lit_sparse.combining.sources import Addend
from lit_sparse.errors import UsageError
from lit_sparse.functional.combining import Conflicts
from lit_sparse.interchange.export import new_folder, save_tensors
from lit_sparse.interchange.metadata import write_metadata
from lit_sparse.interchange.patches import combined, tensors_of
from lit_sparse.interchange.stored_folder import HEAD, VERSIONS, WEIGHTS

_FROM_RUN = ("model_class", "base_model_name_or_path", "labels", "num_labels", "problem_type")


def write_sum(
    addends: Sequence[Addend],
    giver: Addend,
    recipe: Recipe,
    output: str | os.PathLike[str],
    backbone: str | None,
) -> tuple[Conflicts, int, str]:
    """Merge patches, and write the result for :func:`~lit_sparse.load_adapter`. The backbone is not loaded.

    Args:
        addends: The sources, all with a patch.
        giver: The source whose head is kept.
        recipe: How they are merged.
        output: Folder to write.
        backbone: Name of the backbone; None: the giver's.

    Returns:
        The entries that sources share, the bytes of the weights, and lines for the terminal.

    Raises:
        UsageError: If nothing is left.
    """
    patch, found = combined(
        [addend.patch for addend in addends if addend.patch is not None],
        recipe.weights,
        recipe.rule,
        recipe.density,
        recipe.seed,
    )
    changed = sum(int(entries.values.count_nonzero()) for entries in patch.values())
    if not changed:
        raise UsageError("Nothing is left: the changes of the sources cancel out, or all weights are 0.")
    known: Mapping[str, Any] = giver.entries or {}
    shapes = {name: list(shape) for addend in addends for name, shape in addend.shapes.items()}
    entries = {
        "format": "delta",
        "version": VERSIONS["delta"],
        "lit_sparse_version": __version__,
        **{key: known.get(key) for key in _FROM_RUN},
        **({"base_model_name_or_path": backbone} if backbone else {}),
        "method": "Combination",
        "arguments": recipe.record(),
        "layers": {name: {"shape": shapes[name]} for name in patch},
        "head_modules": giver.head_modules,
        "head": {name: list(tensor.shape) for name, tensor in giver.head.items()},
        "tokens": {},
        "changed_entries": changed,
        "conflicts": found._asdict(),
    }
    with new_folder(output) as draft:
        save_tensors({**tensors_of(patch), **{f"{HEAD}{n}": t for n, t in giver.head.items()}}, draft / WEIGHTS)
        write_metadata(draft, entries)
        size = (draft / WEIGHTS).stat().st_size
        text = f"Wrote {os.fspath(output)} (delta): {size:,} bytes of weights; {changed:,} changed entries of weights."
        lines = [text, conflict_sentence(found)]
        (draft / "README.md").write_text(_card(entries, output, lines), encoding="utf-8")
    return found, size, "\n".join(lines)


def conflict_sentence(found: Conflicts) -> str:
    """For the terminal and the card."""
    shared, opposed = f"{found.shared:,}", f"{found.opposed:,}"
    return f"{shared} entries are changed by more than one source, {opposed} of them in opposite directions."


def _card(entries: Mapping[str, Any], output: str | os.PathLike[str], lines: Sequence[str]) -> str:
    front = ModelCardData(library_name="transformers", license="unknown", tags=["lit-sparse"])
    recipe = "".join(f"| {key} | `{value!r}` |\n" for key, value in entries["arguments"].items())
    return (
        f"---\n{front.to_yaml()}\n---\n\n# A patch of {entries['base_model_name_or_path']}\n\n"
        "This folder holds the sum of several patches: the entries of the weights that they change, and by how much, "
        f"written by lit_sparse.\n\n| argument | value |\n|---|---|\n{recipe}\n{lines[1]}\n\n"
        "## How to load\n\n```python\nimport lit_sparse as ls\n\n"
        f"found = ls.from_pretrained({os.fspath(output)!r})\n```\n"
    )
