"""Read folders of ``save_adapter`` and ``export_delta``, and check that they are whole."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.errors import UsageError, listed, reason_of
from lit_sparse.interchange.metadata import METADATA, read_metadata, read_tensors, require_version
from lit_sparse.interchange.patches import Patch, fits, patch_from
from lit_sparse.interchange.vocabulary import StoredRows

WEIGHTS = "adapter.safetensors"
PARTS = ("lora_A", "lora_B_t")
HEAD = "head."
"""Prefix of tensors that were trained whole."""
TOKENS = "tokens."
"""Prefix of rows of new tokens."""
VERSIONS = {"sparse": 1, "delta": 2}
"""Format to the version that is written. All from 1 on are read; in version 1 of delta, places were integers."""

_PLACES = (".places", ".indices")
"""Ends of the names of a patch's places: since version 2, and in version 1."""


@dataclass(frozen=True)
class Saved:
    """A folder that was read.

    Args:
        folder: The folder.
        entries: Its metadata.
        tensors: All of its tensors by name.
        factors: Full layer name to A and B; empty for a patch.
        patch: Full name of a weight to its changed entries; empty for factors.
        tokens: Full name of an embedding or output layer to its rows of new tokens.
    """

    folder: Path
    entries: dict[str, Any]
    tensors: dict[str, Tensor]
    factors: dict[str, LayerFactors]
    patch: Patch
    tokens: dict[str, StoredRows]


def read_folder(folder: Path) -> Saved:
    """Read a folder of the format sparse or delta.

    Raises:
        UsageError: If it is not one, of another version, or damaged.
    """
    file = folder / METADATA
    if not file.is_file():
        raise UsageError(
            f"{str(folder)!r} was not written by save_adapter or export_delta: it has no {METADATA}. Load a folder of "
            "PEFT's with load_peft."
        )
    entries = read_metadata(folder)
    form = entries.get("format")
    if form not in ("sparse", "delta"):
        loaders = {"peft": "load_peft", "gguf": "llama.cpp", "merged": "the model class's from_pretrained"}
        loader = loaders.get(str(form), "the version that wrote it")
        raise UsageError(f"{str(folder)!r} is of the format {form!r}: load it with {loader}.")
    require_version(entries, VERSIONS[form], repr(str(folder)))
    tensors = read_tensors(folder / WEIGHTS)
    try:
        factors = _factors(entries, tensors)
        patch = _patch(entries, tensors) if form == "delta" else {}
        tokens = {name: _rows(name, entry, tensors) for name, entry in entries.get("tokens", {}).items()}
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"{str(folder)!r} is damaged: {METADATA} and {WEIGHTS} do not fit together ({reason_of(error)})."
        ) from error
    return Saved(folder, entries, tensors, factors, patch, tokens)


def _factors(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerFactors]:
    """A and B of every layer; raises various errors if the tensors do not fit the metadata."""
    _require_exactly(entries, tensors)
    for name, tensor in tensors.items():
        if not name.startswith(HEAD) and name.endswith(_PLACES) == tensor.is_floating_point():
            raise ValueError(f"{name!r} is of {tensor.dtype}")
    if not all(isinstance(name, str) for name in entries["head_modules"]):
        raise TypeError("head_modules are no names")
    factors = {}
    for name, entry in entries["layers"].items():
        if not all(isinstance(size, int) and size > 0 for size in entry["shape"]):
            raise ValueError(f"the shape of {name!r} is {entry['shape']}")
        if entries["format"] == "delta":
            continue
        out_features, in_features = entry["shape"]
        ranks = tuple(entry["ranks"])
        if not ranks or not all(isinstance(rank, int) and rank >= 0 for rank in ranks):
            raise ValueError(f"the ranks of {name!r} are {ranks}")
        widths = {"lora_A": in_features, "lora_B_t": out_features}
        found = {part: _unpacked(tensors, f"{name}.{part}", width) for part, width in widths.items()}
        for part, width in widths.items():
            _require_shape(f"{name}.{part}", found[part], (sum(ranks), width))
        largest = max(ranks)
        factors[name] = LayerFactors(name=name, **found, ranks=ranks, max_rank=largest, alpha=float(largest))  # type: ignore[arg-type]
    return factors


def _patch(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Patch:
    own = {f"{name}{end}" for name in entries["layers"] for end in (".values", *_PLACES)}
    patch = patch_from({name: tensor for name, tensor in tensors.items() if name in own})
    for name, changes in patch.items():
        size = math.prod(entries["layers"][name]["shape"])
        if changes.indices is None and changes.count != size:
            raise ValueError(f"{name!r} has {changes.count:,} values for {size:,} entries, and no places")
        if not fits(changes, size):
            raise ValueError(f"{name!r} is changed outside of its shape")
    return patch


def _require_exactly(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Raise a ValueError unless there is every tensor that the metadata describe, once, and no other."""
    parts = [""] if entries["format"] == "delta" else [f".{part}" for part in PARTS]
    wanted = set()
    for stem in (f"{name}{part}" for name in entries["layers"] for part in parts):
        if parts[0] and stem in tensors:
            wanted.add(stem)  # a matrix that is stored whole
        else:
            wanted.add(f"{stem}.values")
            # A patch of nearly all of a weight is stored without places.
            found = [f"{stem}{end}" for end in _PLACES if f"{stem}{end}" in tensors]
            wanted |= {f"{stem}.indices"} if parts[0] else set(found[:1])
    head = {f"{HEAD}{name}": shape for name, shape in entries.get("head", {}).items()}
    wanted |= set(head) if "head" in entries else {name for name in tensors if name.startswith(HEAD)}
    for name, entry in entries.get("tokens", {}).items():
        wanted |= {f"{TOKENS}{name}.{part}" for part in ("rows", "bias") if part == "rows" or entry["bias"]}
    if wanted != set(tensors):
        raise ValueError(f"missing are {listed(wanted - set(tensors))}, unknown are {listed(set(tensors) - wanted)}")
    for name, shape in head.items():
        _require_shape(name, tensors[name], shape)


def _require_shape(name: str, tensor: Tensor, shape: Sequence[int]) -> None:
    if list(tensor.shape) != list(shape):
        raise ValueError(f"{name!r} has the shape {tuple(tensor.shape)}, and {tuple(shape)} is wanted")


def _rows(name: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> StoredRows:
    ids, texts, stem = entry["ids"], entry["texts"], f"{TOKENS}{name}"
    rows, bias = tensors[f"{stem}.rows"], tensors.get(f"{stem}.bias")
    ascending = all(isinstance(i, int) and i >= 0 for i in ids) and ids == sorted(set(ids))
    counts = {len(ids), len(rows), len(texts) or len(ids), len(ids) if bias is None else len(bias)}
    if not ascending or not ids or len(counts) > 1 or rows.ndim != 2:
        raise ValueError(f"the rows of {name!r} are not those of its tokens")
    return StoredRows(ids, texts, rows, bias)


def read_layers(folder: str | os.PathLike[str]) -> dict[str, LayerFactors | LayerEntries]:
    """What a folder holds of every layer, by its name, or for a patch, by the name of its weight without ``.weight``.

    Layers are in the model's order. A and B of :func:`save_adapter` have scale and gates folded into B. A patch has the
    changed entries. More than two dimensions of a weight are rows and columns here: all but the first are columns.

    Raises:
        UsageError: If the folder cannot be read.
    """
    saved = read_folder(Path(folder))
    layers: dict[str, LayerFactors | LayerEntries] = {
        name: replace(layer, packed=_bytes(saved.tensors, name, PARTS)) for name, layer in saved.factors.items()
    }
    for weight, entry in saved.entries["layers"].items() if saved.patch else ():
        entries, (rows, *others) = saved.patch[weight], entry["shape"]
        layers[weight.removesuffix(".weight")] = LayerEntries(
            name=weight.removesuffix(".weight"),
            indices=entries.places,
            values=entries.values,
            shape=(rows, math.prod(others)),
            packed=_bytes(saved.tensors, weight, [""]),
        )
    return layers


def _bytes(tensors: Mapping[str, Tensor], name: str, parts: Sequence[str]) -> int:
    """Bytes of what is stored of ``parts``, each whole or as values and places."""
    names = (f"{name}.{part}".removesuffix(".") + end for part in parts for end in ("", ".values", *_PLACES))
    return sum(tensors[name].nbytes for name in names if name in tensors)


def _unpacked(tensors: Mapping[str, Tensor], name: str, width: int) -> Tensor:
    if name in tensors:
        return tensors[name]
    values, columns = tensors[f"{name}.values"], tensors[f"{name}.indices"].long()
    if not bool((columns.diff(dim=1) > 0).all()):
        raise ValueError(f"the columns of {name!r} are not in order, each once")
    return torch.zeros(len(values), width, dtype=values.dtype).scatter_(1, columns, values)
