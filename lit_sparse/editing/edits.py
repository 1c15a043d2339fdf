"""Edits: small changes of a model's weights with what they are for, in one file each."""

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
from torch import Tensor, nn

from lit_sparse._version import __version__
from lit_sparse.adapters.quantized import quantized_layers
from lit_sparse.editing.bases import require_base, sample_of
from lit_sparse.editing.requests import EditRequest, Probe
from lit_sparse.errors import UsageError, parse_json
from lit_sparse.interchange.patches import Entries, Patch, add, patch_from, put, require_fit, standing, tensors_of

SUFFIX = ".safetensors"
_KEY = "lit_sparse_edit"
_VERSION = 1
_BASE = "base@"  # what the names of the base model's values begin with


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of some weights that changes one fact or a few.

    Args:
        patch: What is added to which entries of the weights.
        requests: The facts.
        metrics: What was measured of each request, by name.
        method: How it was trained.
        base_model: The model that it was made for.
        weights: Entries of the weights that could have changed.
        base: Some of the values that the changed weights had before any edit; empty if they are not known.
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
        """Entries of the weights that it changes."""
        return sum(int(entries.values.count_nonzero()) for entries in self.patch.values())

    def measured(self, metrics: Sequence[dict[str, float]]) -> Edit:
        """The same edit, with what was measured of its requests."""
        return replace(self, metrics=tuple(metrics))

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write the edit, with its requests and metrics inside, to a safetensors file.

        Written beside it and moved, so that a file that is there is whole.
        """
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
        # One entry only: safetensors writes several in any order, and equal edits are to be equal files.
        save_file(tensors, draft, metadata={_KEY: json.dumps(content)})
        draft.replace(path)


def load_edit(file: str | os.PathLike[str]) -> Edit:
    """Read what :meth:`Edit.save` wrote.

    Raises:
        UsageError: If the file cannot be read, or is no edit, or one of another version.
    """
    content = _content(file)
    with safe_open(file, "pt") as stored:
        tensors: dict[str, Tensor] = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    try:
        requests = tuple(_request(request) for request in content["requests"])
        named = {name: content[name] for name in ("method", "base_model", "weights")}
        base = {name.removeprefix(_BASE): tensor for name, tensor in tensors.items() if name.startswith(_BASE)}
        patch = {name: tensor for name, tensor in tensors.items() if not name.startswith(_BASE)}
        return Edit(patch_from(patch), requests, tuple(content["metrics"]), **named, base=patch_from(base))
    except (KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{str(file)!r} is no edit that can be read: something is missing or wrong in it ({error!r})."
        ) from error


def _content(file: str | os.PathLike[str]) -> dict[str, Any]:
    """What an edit's file says beside its tensors.

    Raises:
        UsageError: As :func:`load_edit`.
    """
    try:
        with safe_open(file, "pt") as stored:
            metadata = stored.metadata() or {}
        content = parse_json(metadata.get(_KEY, "null"))
    except (OSError, SafetensorError, ValueError) as error:
        raise UsageError(f"The edit {str(file)!r} cannot be read: {error}.") from error
    if not isinstance(content, dict):
        raise UsageError(f"{str(file)!r} is no edit: give a file that lit-sparse edit wrote.")
    if content.get("version") != _VERSION:
        raise UsageError(
            f"{str(file)!r} is of version {content.get('version')} of its format, and {_VERSION} is known here: read "
            f"it with lit_sparse {content.get('lit_sparse_version')}."
        )
    return content


class EditedModel:
    """A model with edits in it, which can be taken out again.

    Edits are added one after another, each sum rounded to the weights' dtype, as they were made; what the entries were
    before the first of them is kept, so that taking all out gives the model back bit for bit.

    Args:
        model: The plain model.
        originals: What the changed entries were before any edit, if the model has some in it.
    """

    def __init__(self, model: nn.Module, originals: Patch | None = None) -> None:
        self.model = model
        self.originals: Patch = originals or {}

    def add(self, edit: Edit, name: str = "The edit") -> int:
        """Add an edit.

        Args:
            edit: To add.
            name: For messages.

        Returns:
            How many entries it changes that earlier edits changed too.

        Raises:
            UsageError: If the model has no such weights, they are quantized, or it is another than the edit's.
        """
        packed = [layer for layer, _ in quantized_layers(self.model) if f"{layer}.weight" in edit.patch]
        if packed:
            raise UsageError(
                f"{name} changes {packed[0]!r}, whose weight is quantized: it has no entries to add to. Load the model "
                "without quantization."
            )
        require_fit(self.model, edit.patch, name)
        require_base(self.model, self.originals, edit.base, edit.base_model, name)
        conflicts = 0
        for weight, before in add(self.model, edit.patch).items():
            known = self.originals.get(weight)
            self.originals[weight], shared = _extended(known, before)
            conflicts += shared
        return conflicts

    def with_base(self, edit: Edit) -> Edit:
        """An edit that is in the model, with the values by which its base model is known."""
        return replace(edit, base=sample_of({name: self.originals[name] for name in edit.patch}))

    def restore(self) -> None:
        """Take all edits out."""
        put(self.model, self.originals)
        self.originals = {}

    @contextmanager
    def as_it_was(self) -> Iterator[None]:
        """Within the context the model is as it was before any edit."""
        now = standing(self.model, self.originals)
        put(self.model, self.originals)
        try:
            yield
        finally:
            put(self.model, now)


def combine(edits: Sequence[Edit]) -> tuple[Edit, int]:
    """One edit that adds the sum of some.

    Args:
        edits: At least one, of the same model.

    Returns:
        The edit, and the number of entries that more than one of them changes: there the facts may disturb each other.

    Raises:
        UsageError: If there is none, or they were made for different models.
    """
    if not edits:
        raise UsageError("There is no edit to combine.")
    bases = sorted({edit.base_model for edit in edits})
    if len(bases) > 1:
        raise UsageError(f"These edits were made for different models, {bases}: combine those of one.")
    patch: Patch = {}
    conflicts = 0
    for edit in edits:
        for name, entries in edit.patch.items():
            patch[name], shared = _summed(patch.get(name), entries)
            conflicts += shared
    requests = tuple(request for edit in edits for request in edit.requests)
    metrics = tuple(found for edit in edits for found in edit.metrics)
    base = {name: entries for edit in edits for name, entries in edit.base.items()}
    return Edit(patch, requests, metrics, edits[0].method, bases[0], edits[0].weights, base), conflicts


def _extended(known: Entries | None, more: Entries) -> tuple[Entries, int]:
    """Entries with those of others that are in new places; and how many are not."""
    if known is None:
        return more, 0
    if known.indices is None:
        return known, more.count
    if more.indices is None:
        values = more.values.clone()
        values[known.indices] = known.values
        return Entries(None, values), known.count
    new = ~torch.isin(more.indices, known.indices)
    indices = torch.cat([known.indices, more.indices[new]])
    return Entries(indices, torch.cat([known.values, more.values[new]])), int((~new).sum())


def _summed(known: Entries | None, more: Entries) -> tuple[Entries, int]:
    if known is None:
        return more, 0
    if known.indices is None or more.indices is None:
        whole, other = (known, more) if known.indices is None else (more, known)
        values = whole.values.clone()
        if other.indices is None:
            return Entries(None, values + other.values), whole.count
        values[other.indices] += other.values
        return Entries(None, values), other.count
    indices, places = torch.cat([known.indices, more.indices]).unique(return_inverse=True)
    values = known.values.new_zeros(len(indices))
    values.index_add_(0, places, torch.cat([known.values, more.values]))
    return Entries(indices, values), known.count + more.count - len(indices)


def _request(content: dict[str, Any]) -> EditRequest:
    kinds = {
        name: {
            kind: tuple(Probe(probe["prompt"], tuple(probe["answers"])) for probe in probes)
            for kind, probes in content[name].items()
        }
        for name in ("portability", "locality")
    }
    return EditRequest(**{**content, **kinds, "rephrases": tuple(content["rephrases"])})
