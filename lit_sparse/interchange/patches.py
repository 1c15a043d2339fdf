"""Patches: changes of single entries of weights, which can be added to a model, undone and stored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.errors import UsageError
from lit_sparse.interchange.remains import weight_name


@dataclass(frozen=True, eq=False)
class Entries:
    """Entries of one weight.

    Args:
        indices: Their positions in the flattened weight, of dtype long, each once; None: all entries in order.
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
        # Beyond a half, indices take more memory than zeros.
        if 2 * len(indices) > flat.numel():
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


def tensors_of(patch: Patch) -> dict[str, Tensor]:
    """A patch as tensors to store: ``.values`` and ``.indices`` of each weight, in the smallest integers."""
    tensors: dict[str, Tensor] = {}
    for name, entries in patch.items():
        if entries.indices is not None:
            last = int(entries.indices.max()) + 1 if entries.count else 0
            tensors[f"{name}.indices"] = entries.indices.to(index_dtype(last))
        tensors[f"{name}.values"] = entries.values
    return tensors


def patch_from(tensors: Mapping[str, Tensor]) -> Patch:
    """The inverse of :func:`tensors_of`."""
    patch: Patch = {}
    for key, values in tensors.items():
        name, _, part = key.rpartition(".")
        if part == "values":
            indices = tensors.get(f"{name}.indices")
            patch[name] = Entries(None if indices is None else indices.long(), values)
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
        fits = entries.count == size if entries.indices is None else _inside(entries, size)
        if not fits:
            raise UsageError(
                f"{what} changes entries of {name!r} that {type(model).__name__} has not (its weight has {size}): it "
                "was made for a model of another size."
            )


def index_dtype(count: int) -> torch.dtype:
    """The smallest integer dtype for indices below ``count``."""
    limits = {torch.uint8: 2**8, torch.uint16: 2**16, torch.int32: 2**31}
    return next((dtype for dtype, limit in limits.items() if count <= limit), torch.int64)


def _inside(entries: Entries, size: int) -> bool:
    indices = entries.indices
    if indices is None or indices.shape != entries.values.shape or not len(indices):
        return False
    return int(indices.min()) >= 0 and int(indices.max()) < size and len(indices.unique()) == len(indices)
