"""Adapters as a checkpoint, a folder or a model holds them, ready to be shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

from torch import Tensor

from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.patterns import matches_tail
from lit_sparse.adapters.statistics import LayerSparsity
from lit_sparse.errors import UsageError
from lit_sparse.figures.curves import Curves
from lit_sparse.methods.progress import Progress, Trained


@dataclass(frozen=True, eq=False, kw_only=True)
class StoredAdapters:
    """All adapters of one source.

    Args:
        name: The source as the user named it.
        kind: What the source is, for a sentence.
        table: What is left of each layer.
        layers: Full layer name to A, B and gate, or to changed entries; empty where only a table is stored.
        method: Class name of the method, if it is known.
        arguments: The method's arguments.
        backbone: Name of the backbone, if it is known.
        step: Optimizer steps taken, if they are known.
        progress: How far the run was, if it is known.
        trained: Size of the adapters at the start of training; None if no layer is missing from the source.
        curves: Logged metrics.
    """

    name: str
    kind: str
    table: list[LayerSparsity]
    layers: dict[str, LayerFactors | LayerEntries] = field(default_factory=dict)
    method: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    step: int | None = None
    progress: Progress | None = None
    trained: Trained | None = None
    curves: Curves = field(default_factory=dict)

    @property
    def gates(self) -> list[Tensor]:
        """The gates of all layers that have gates."""
        return [layer.gate for layer in self.layers.values() if layer.gate is not None]

    def layer(self, name: str | None) -> LayerFactors | LayerEntries:
        """Find a layer.

        Args:
            name: Its full name, or a suffix that no other layer has; None: the layer with the largest change.

        Raises:
            UsageError: If no layer or several layers match, or the source holds only a table.
        """
        if not self.layers:
            raise UsageError(f"{self.name} is {self.kind}, without A and B. Give a checkpoint or an adapter's folder.")
        if name is None:
            return max(self.layers.values(), key=lambda layer: float(layer.change_norms.norm()))
        found = [name] if name in self.layers else [full for full in self.layers if matches_tail(full, name)]
        if len(found) > 1:
            raise UsageError(f"The layer {name!r} could be any of {found[:4]}: give more of its name.")
        if found:
            return self.layers[found[0]]
        tails = {".".join(full.split(".")[-parts:]) for full in self.layers for parts in range(1, full.count(".") + 2)}
        close = get_close_matches(name, sorted(tails)) or list(self.layers)[:3]
        raise UsageError(f"There is no layer {name!r} in {self.name}. Did you mean {' or '.join(map(repr, close))}?")
