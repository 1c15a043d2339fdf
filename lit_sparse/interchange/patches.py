"""Patches: changes of single entries of weights, which can be added to a model, undone and stored."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional.combining import Conflicts, Rule, conflicts, merged, trim_threshold
from lit_sparse.functional.rice import decoded, encoded
from lit_sparse.interchange.remains import weight_name


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of one weight.

    Args:
        indices: Their positions in the flattened weight, of dtype long, ascending, each once; None: all entries.
        values: Their values or changes, shape ``(count,)``.
    """

    indices: Tensor | None
    values: Tensor

    @property
    def count(self) -> int:
        """Number of entries."""
        return self.values.numel()

    @property
    def places(self) -> Tensor:
        """The places in the flattened weight, also where ``indices`` is None."""
        return torch.arange(self.count, device=self.values.device) if self.indices is None else self.indices


Patch = dict[str, Entries]
"""Full name of a weight, in the plain model, to the entries that change."""

_WHOLE = 5 / 6
"""Share of changed entries beyond which a weight is kept whole: its zeros then add less than a fifth of their bytes."""


@torch.no_grad()
def patch_of(adapters: Mapping[str, Adapter]) -> Patch:
    """The non-zero entries of what merging would add to the frozen weights."""
    deltas = {weight_name(name, adapter): adapter.delta_weight() for name, adapter in adapters.items()}
    return patch_of_deltas(deltas)


@torch.no_grad()
def patch_of_deltas(deltas: Mapping[str, Tensor]) -> Patch:
    """The non-zero entries of tensors; a tensor of zeros has no entry in the patch."""
    patch: Patch = {}
    for name, delta in deltas.items():
        flat = delta.flatten()
        indices = flat.nonzero().flatten()
        if len(indices) > _WHOLE * flat.numel():
            patch[name] = Entries(None, flat)
        elif len(indices):
            patch[name] = Entries(indices, flat[indices])
    return patch


@torch.no_grad()
def add(model: nn.Module, patch: Patch) -> Patch:
    """Add a patch to the weights of a model, in place, as :func:`~lit_sparse.merge` would.

    The sum is formed in the patch's precision, float32 or better, and rounded once. Adding zero to an entry leaves it
    bit for bit what it is.

    Args:
        model: With weights of the patch's names.
        patch: Values to add.

    Returns:
        The entries before, for :func:`put`.
    """
    before, after = standing(model, patch), {}
    for name, entries in patch.items():
        old = before[name].values
        values = entries.values.to(old.device)
        new = torch.where(values != 0, (old.to(values.dtype) + values).to(old.dtype), old)
        after[name] = Entries(before[name].indices, new)
    put(model, after)
    return before


@torch.no_grad()
def put(model: nn.Module, patch: Patch) -> None:
    """Replace entries of a model's weights, in place: undoes :func:`add` bit for bit.

    Args:
        model: With weights of these names.
        patch: Their new values, in the weights' own dtype.
    """
    for name, entries in patch.items():
        weight = model.get_parameter(name)
        flat = weight.detach().flatten()  # a view where the memory allows it, otherwise a copy
        indices = slice(None) if entries.indices is None else entries.indices.to(weight.device)
        flat[indices] = entries.values.to(weight.device)
        if flat.data_ptr() != weight.data_ptr():
            weight.copy_(flat.view_as(weight))


@torch.no_grad()
def standing(model: nn.Module, patch: Patch) -> Patch:
    """The present values of the entries of a patch."""
    found: Patch = {}
    for name, entries in patch.items():
        flat = model.get_parameter(name).detach().flatten()
        indices = None if entries.indices is None else entries.indices.to(flat.device)
        found[name] = Entries(indices, flat.clone() if indices is None else flat[indices])
    return found


@torch.no_grad()
def combined(
    patches: Sequence[Patch],
    weights: Sequence[float] | None = None,
    rule: Rule = "concatenate",
    density: float = 0.2,
    seed: int = 0,
) -> tuple[Patch, Conflicts]:
    """Merge several patches of one model into one.

    Args:
        patches: At least one.
        weights: Factor of each patch; None: 1 for all.
        rule: ``concatenate``: the sum. ``ties`` and ``dare``: see :mod:`lit_sparse.functional.combining`. A share of
            the entries means a share of those that a patch changes.
        density: Share of the entries that TIES or DARE keeps of each patch, in (0, 1].
        seed: Of the entries that DARE draws.

    Returns:
        The patch, and how many entries the patches share.
    """
    factors = [1.0] * len(patches) if weights is None else weights
    generator = torch.Generator().manual_seed(seed)
    thresholds = [
        trim_threshold(functools.partial(_values, patch, factor), density) if rule == "ties" else 0.0
        for patch, factor in zip(patches, factors, strict=True)
    ]
    patch: Patch = {}
    found = Conflicts(0, 0)
    for name in dict.fromkeys(name for one in patches for name in one):
        own = [number for number, one in enumerate(patches) if name in one]
        entries = [patches[number][name] for number in own]
        places, slots = torch.cat([part.places.cpu() for part in entries]).unique(return_inverse=True)
        changes = torch.zeros(len(own), len(places), dtype=torch.promote_types(entries[0].values.dtype, torch.float32))
        for row, part, slot in zip(changes, entries, slots.split([part.count for part in entries]), strict=True):
            row[slot] = part.values.cpu().to(row)
        changes *= torch.tensor([factors[number] for number in own], dtype=changes.dtype).unsqueeze(1)
        found += conflicts(changes)
        values = merged(changes, rule, [thresholds[number] for number in own], density, generator)
        whole, left = any(part.indices is None for part in entries), values != 0
        if whole:
            patch |= patch_of_deltas({name: values})
        elif bool(left.any()):
            patch[name] = Entries(places[left], values[left])
    return patch, found


def _values(patch: Patch, factor: float) -> Iterator[Tensor]:
    for entries in patch.values():
        yield entries.values.cpu().to(torch.promote_types(entries.values.dtype, torch.float32)) * factor


def tensors_of(patch: Patch) -> dict[str, Tensor]:
    """A patch as tensors to store: ``.values`` of each weight, and ``.places``, the code of their indices."""
    tensors: dict[str, Tensor] = {}
    for name, entries in patch.items():
        if entries.indices is not None:
            tensors[f"{name}.places"] = encoded(entries.indices)
        tensors[f"{name}.values"] = entries.values
    return tensors


def patch_from(tensors: Mapping[str, Tensor]) -> Patch:
    """The inverse of :func:`tensors_of`; also reads the ``.indices`` of older files, integers in any order.

    Raises:
        ValueError: If places and values do not fit together.
    """
    patch: Patch = {}
    for key, values in tensors.items():
        name, _, part = key.rpartition(".")
        if part != "values":
            continue
        code, indices = tensors.get(f"{name}.places"), tensors.get(f"{name}.indices")
        if code is not None:
            patch[name] = Entries(decoded(code, values.numel()), values)
        elif indices is None:
            patch[name] = Entries(None, values)
        elif indices.shape != values.shape:
            raise ValueError(f"{name!r} has {indices.numel():,} places and {values.numel():,} values")
        else:
            ascending, order = indices.long().sort()
            patch[name] = Entries(ascending, values[order])
    return patch


def require_fit(model: nn.Module, patch: Patch, what: str) -> None:
    """Raise a UsageError unless the model has the patch's weights and entries.

    Args:
        model: The model to patch.
        patch: The patch.
        what: The patch's name in the message.
    """
    weights = dict(model.named_parameters(remove_duplicate=False))
    absent = [name for name in patch if name not in weights]
    if absent:
        raise UsageError(
            f"{what} changes {len(absent)} weights that {type(model).__name__} has not, the first is {absent[0]!r}: it "
            "was made for another model."
        )
    for name, entries in patch.items():
        size = weights[name].numel()
        if not fits(entries, size):
            raise UsageError(
                f"{what} changes entries of {name!r} that {type(model).__name__} has not (its weight has {size}): it "
                "was made for a model of another size."
            )


def require_weights(weights: Sequence[float] | None, count: int) -> None:
    """Raise a UsageError unless there is a finite weight for each of ``count`` sources, or none at all."""
    if weights is not None and len(weights) != count:
        raise UsageError(f"There are {count} sources and {len(weights)} weights: give one weight for each source.")
    for weight in weights or ():
        require_range("A weight", weight, at_least=-1e6, at_most=1e6)


def fits(entries: Entries, size: int) -> bool:
    """Whether entries are some of a weight of ``size``, at least one, in order and each once."""
    indices = entries.indices
    if indices is None:
        return entries.count == size
    if indices.shape != entries.values.shape or not len(indices):
        return False
    return 0 <= int(indices[0]) <= int(indices[-1]) < size and bool((indices.diff() > 0).all())
