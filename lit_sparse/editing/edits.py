"""Edits: small changes of a model's weights, each in one file with the facts that it changes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from lit_sparse._version import __version__
from lit_sparse.editing.bases import require_base, require_editable, sample_of
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.errors import UsageError, parse_json, require_range
from lit_sparse.functional.combining import Conflicts, Rule
from lit_sparse.interchange.metadata import require_version
from lit_sparse.interchange.patches import (
    Entries,
    Patch,
    add,
    combined,
    patch_from,
    put,
    require_fit,
    require_weights,
    standing,
    tensors_of,
)

SUFFIX = ".safetensors"
_KEY = "lit_sparse_edit"
_VERSION = 2  # in version 1, places were integers
_BASE = "base@"  # prefix of the tensors that identify the base model


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some weights that changes one fact or several.

    Args:
        patch: The change: weight → entries to add to.
        requests: The facts.
        metrics: Metrics of each request, by name.
        method: How the edit was trained.
        base_model: Name of the model that the edit was made for.
        weights: Number of weight entries that could have changed.
        base: Some values of the changed weights before any edit; empty if they are not known.
    """

    patch: Patch
    requests: tuple[EditRequest, ...] = ()
    metrics: tuple[dict[str, float], ...] = ()
    method: str = ""
    base_model: str = ""
    weights: int = 0
    base: Patch = field(default_factory=dict)

    @property
    def changed(self) -> int:
        """Number of weight entries that the edit changes."""
        return sum(int(entries.values.count_nonzero()) for entries in self.patch.values())

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the edit, its requests and its metrics to a safetensors file. The file appears when it is complete."""
        path = Path(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = {
            "version": _VERSION,
            "lit_sparse_version": __version__,
            "requests": [asdict(request) for request in self.requests],
            **{name: getattr(self, name) for name in ("metrics", "method", "base_model", "weights")},
        }
        stored = tensors_of(self.patch) | {f"{_BASE}{name}": t for name, t in tensors_of(self.base).items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        # One metadata entry only: safetensors writes several in any order, and equal edits must be equal files.
        save_file(tensors, draft, metadata={_KEY: json.dumps(content)})
        draft.replace(path)


def load_edit(file: str | os.PathLike[str]) -> Edit:
    """Read a file that :meth:`Edit.save` wrote.

    Raises:
        UsageError: If the file cannot be read, is not an edit, or has another version of the format.
    """
    try:
        with safe_open(file, "pt") as stored:
            content = parse_json((stored.metadata() or {}).get(_KEY, "null"))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"The edit {str(file)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(file)!r} is not an edit: give a file that lit-sparse edit wrote.")
    require_version(content, _VERSION, f"The edit {str(file)!r}")
    base = {name.removeprefix(_BASE): tensor for name, tensor in tensors.items() if name.startswith(_BASE)}
    patch = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BASE)}
    try:
        requests = tuple(_request(request) for request in content["requests"])
        named = {name: content[name] for name in ("method", "base_model", "weights")}
        return Edit(patch_from(patch), requests, tuple(content["metrics"]), **named, base=patch_from(base))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"The edit {str(file)!r} cannot be read: a field is missing or wrong ({error!r}).") from error


def _request(content: dict[str, Any]) -> EditRequest:
    kinds = {
        name: {
            kind: tuple(Probe(probe["prompt"], tuple(probe["answers"])) for probe in probes)
            for kind, probes in content[name].items()
        }
        for name in ("portability", "locality")
    }
    return EditRequest(**{**content, **kinds, "rephrases": tuple(content["rephrases"])})


class EditedModel:
    """A model with edits in it that can be taken out again.

    Edits are added one after another, and each sum is rounded to the weights' dtype. The values before the first edit
    are kept, so :meth:`restore` gives the plain model back bit for bit.

    Args:
        model: The model.
        originals: Values of the changed entries before any edit, if the model has edits in it.
    """

    def __init__(self, model: nn.Module, originals: Patch | None = None) -> None:
        self.model = model
        self.originals: Patch = originals or {}

    def add(self, edit: Edit, name: str = "The edit") -> int:
        """Add an edit.

        Args:
            edit: The edit.
            name: What messages call it.

        Returns:
            Number of its entries that earlier edits changed too.

        Raises:
            UsageError: If the model lacks one of the edit's weights, is quantized, or the edit was made for another
                model.
        """
        require_editable(self.model)
        require_fit(self.model, edit.patch, name)
        require_base(self.model, self.originals, edit.base, edit.base_model, name)
        conflicts = 0
        for weight, before in add(self.model, edit.patch).items():
            self.originals[weight], shared = _extended(self.originals.get(weight), before)
            conflicts += shared
        return conflicts

    def with_base(self, edit: Edit) -> Edit:
        """An edit that is in the model, together with the values that identify its base model."""
        return replace(edit, base=sample_of({name: self.originals[name] for name in edit.patch}))

    def restore(self) -> None:
        """Take all edits out."""
        put(self.model, self.originals)
        self.originals = {}

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Take all edits out for the duration of the context."""
        edited = standing(self.model, self.originals)
        put(self.model, self.originals)
        try:
            yield
        finally:
            put(self.model, edited)


def combine(
    edits: Sequence[Edit],
    weights: Sequence[float] | None = None,
    rule: Rule = "concatenate",
    density: float = 0.2,
    seed: int = 0,
) -> tuple[Edit, Conflicts]:
    """Add several edits up to one.

    Args:
        edits: At least one, all made for the same model.
        weights: Factor of each edit; None: 1 for all.
        rule: ``concatenate``: the sum; or ``ties`` or ``dare``, as :func:`~lit_sparse.combine` merges patches.
        density: Share of its entries that TIES or DARE keeps of each edit.
        seed: Of the entries that DARE draws.

    Returns:
        The sum, and how many entries more than one edit changes: there the facts may disturb each other.

    Raises:
        UsageError: If there is no edit, the edits were made for different models, or an argument is outside its range.
    """
    require_weights(weights, len(edits))
    require_range("density", density, above=0, at_most=1)
    bases = sorted({edit.base_model for edit in edits})
    if len(bases) != 1:
        raise UsageError(f"Only edits of one model can be combined; these {len(edits)} were made for {bases}.")
    patch, found = combined([edit.patch for edit in edits], weights, rule, density, seed)
    requests = tuple(request for edit in edits for request in edit.requests)
    metrics = tuple(values for edit in edits for values in edit.metrics)
    base = {name: entries for edit in edits for name, entries in edit.base.items() if name in patch}
    return Edit(patch, requests, metrics, edits[0].method, bases[0], edits[0].weights, base), found


def _on(device: torch.device, entries: Entries) -> Entries:
    return Entries(None if entries.indices is None else entries.indices.to(device), entries.values.to(device))


def _extended(known: Entries | None, more: Entries) -> tuple[Entries, int]:
    """``known`` with the entries of ``more`` in new places, and the number of shared places."""
    if known is None:
        return more, 0
    known = _on(more.values.device, known)  # those of a folder were read before the model was moved
    if known.indices is None:
        return known, more.count
    if more.indices is None:
        return Entries(None, more.values.index_copy(0, known.indices, known.values)), known.count
    new = ~torch.isin(more.indices, known.indices)
    indices, order = torch.cat([known.indices, more.indices[new]]).sort()
    return Entries(indices, torch.cat([known.values, more.values[new]])[order]), int((~new).sum())
