"""Several adapters on one frozen backbone, switched by name."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from lit_sparse.adapters.factors import LayerFactors, stacked
from lit_sparse.adapters.injection import adapters_in, low_rank_in
from lit_sparse.adapters.originals import forget_originals
from lit_sparse.adapters.rowwise import Routes
from lit_sparse.adapters.token_rows import token_rows_in
from lit_sparse.errors import UsageError
from lit_sparse.interchange.loading import inject_layers
from lit_sparse.interchange.patches import require_weights
from lit_sparse.interchange.remains import folded
from lit_sparse.serving.bank_sources import load
from lit_sparse.serving.places import Place, everything, put
from lit_sparse.serving.rows import routed, row_places


class AdapterBank:
    """Adapters of several runs for one backbone, for inference: one in use at a time, or another for each row.

    The adapters may differ in layers, ranks and methods, and each brings its own task head. Heads may have different
    numbers of labels; the model's own loss then does not fit. All adapters share the frozen weights: a bank takes the
    memory of one backbone and of each adapter's A, B, sensitivities and head. Switching replaces modules and copies
    nothing. Model and speed are then the same as after :func:`~lit_sparse.inject`; statistics see the adapter in use,
    and :meth:`using` with None gives the plain backbone. :func:`~lit_sparse.merge` changes the shared weights, and so
    ends the bank.

    Set the model's dtype before you add adapters; its device and training mode may change at any time.

    Args:
        model: The backbone as its runs started from it, without adapters. It is frozen and changed in place.

    Raises:
        UsageError: If ``model`` holds adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        if any(True for _ in adapters_in(model)):
            raise UsageError(f"{type(model).__name__} holds adapters already. Give the bank the plain backbone.")
        self.model = model.requires_grad_(False)
        self.in_use: str | None = None
        """Name of the adapter in use, None for the plain backbone."""
        self._places: dict[str, list[Place]] = {}
        self._rowwise: tuple[list[str], list[Place], Routes] | None = None
        self._in_rows = False

    @property
    def names(self) -> list[str]:
        """Names of the adapters, in the order of :meth:`add`."""
        return list(self._places)

    def add(self, name: str, source: str | os.PathLike[str]) -> None:
        """Load an adapter; the one in use stays in use.

        Args:
            name: Its name in the bank.
            source: Folder of a LoRA in PEFT's format, or checkpoint file of a :class:`~lit_sparse.SparseModule`.

        Raises:
            UsageError: If the name is taken, or the source cannot be read or does not fit the backbone.
        """
        self._add(name, lambda: load(self.model, Path(source)))

    def add_sum(self, name: str, weights: Mapping[str, float], head: str | None = None) -> None:
        """Add the weighted sum of adapters that are in the bank, exact to rounding: A and B are stacked.

        It has the ranks of all of them together. :func:`~lit_sparse.combine` writes such a sum to a folder, and has
        rules that keep fewer.

        Args:
            name: Name of the sum in the bank.
            weights: Name of an adapter → factor of its change.
            head: Name of the adapter whose task head the sum has; None: the backbone's own head.

        Raises:
            UsageError: If the name is taken, there is no such adapter, a weight is not finite, an adapter has no A
                and B or holds rows of new tokens, or nothing is left.
        """
        changes: list[dict[str, LayerFactors]] = []
        for own in (*weights, *([] if head is None else [head])):
            self._require(own)
        require_weights(list(weights.values()), len(weights))
        for own in weights:
            with self.using(own):
                if any(True for _ in token_rows_in(self.model)):
                    raise UsageError(f"{own!r} holds rows of new tokens, which cannot be added up.")
                found = low_rank_in(self.model, f"A sum of {own!r} needs A and B")
                changes.append({layer: folded(layer, adapter) for layer, adapter in found.items()})
        names = dict.fromkeys(layer for change in changes for layer in change)
        layers = stacked(changes, list(weights.values()), names)
        if not layers:
            raise UsageError(f"Nothing is left of {dict(weights)}: no adapter changes a weight, or all weights are 0.")
        self._add(name, lambda: inject_layers(self.model, layers, "the bank", train_head=[]))
        if head is not None:
            heads = [place for place in self._places[head] if not isinstance(place.plain, nn.Module)]
            self._places[name] = [*self._places[name], *heads]

    def _add(self, name: str, put_in: Callable[[], object]) -> None:
        """Keep what ``put_in`` changes in the plain model, and make the model plain again."""
        if name in self._places:
            raise UsageError(f"The bank has an adapter {name!r} already. Remove it, or give another name.")
        with self.using(None):
            before = list(everything(self.model))
            try:
                put_in()
                forget_originals(self.model, known=False)
                places = [Place(h, key, plain, h[key]) for h, key, plain in before if h[key] is not plain]
            finally:
                self.model.requires_grad_(False)
                for owner, key, plain in before:
                    owner[key] = plain
        self._places[name] = places

    def use(self, name: str | None) -> None:
        """Switch to another adapter and its head.

        Args:
            name: Name of the adapter; None: the plain backbone with its own head.

        Raises:
            UsageError: If there is no such adapter, the one in use is no longer in the model, or within :meth:`rows`.
        """
        if name is not None:
            self._require(name)
        if self._in_rows:
            raise UsageError("The adapters of a bank cannot be changed within rows(…): leave it first.")
        if self.in_use is not None:
            places = self._places[self.in_use]
            if any(isinstance(place.own, nn.Module) and place.owner[place.key] is not place.own for place in places):
                raise UsageError(
                    f"The model was changed while {self.in_use!r} was in use. If it was merged, the shared weights "
                    "have changed: load the backbone again, and make a new bank."
                )
            for place in places:
                put(place, place.plain)
        self.in_use = name
        for place in self._places[name] if name is not None else ():
            put(place, place.own)

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Use an adapter within the context, and switch back after it.

        Args:
            name: As for :meth:`use`.

        Yields:
            The model.
        """
        before = self.in_use
        self.use(name)
        try:
            yield self.model
        finally:
            self.use(before)

    @contextmanager
    def rows(self, names: Sequence[str | None]) -> Iterator[nn.Module]:
        """Within the context, each row of a batch goes through an adapter of its own, with its own task head.

        The outputs are those of the rows by themselves, each under :meth:`using`, to rounding. The frozen layers
        compute all rows at once. Linear layers multiply each row by the A and B of its adapter; of other adapted layers
        and of heads, each adapter's computes the whole batch. ``generate`` works too, with beams or several answers for
        each row. The first use of an adapter here copies its A and B.

        Args:
            names: Name of the adapter of each row of the batch, in order; None: the plain backbone with its own head.

        Yields:
            The model.

        Raises:
            UsageError: If there is no such adapter, the model is in training mode, the batch has another number of
                rows, heads have other numbers of outputs, or the model mixes the rows of a batch, as experts do.
        """
        if isinstance(names, str):
            raise UsageError(f"rows takes a list with the name of each row's adapter; got {names!r}.")
        for name in names:
            if name is not None:
                self._require(name)
        if self.model.training:
            raise UsageError("The rows of a batch go through several adapters for inference only: call model.eval().")
        with self.using(None):
            numbers, places, routes = self._places_of_rows([n for n in self.names if n in names])
            device = next(self.model.parameters()).device
            copies = [0 if name is None else 1 + numbers.index(name) for name in names]
            for place in places:
                put(place, place.own)
            self._in_rows = True
            try:
                with routed(self.model, torch.tensor(copies, device=device), routes):
                    yield self.model
            finally:
                self._in_rows = False
                for place in places:
                    put(place, place.plain)

    def _places_of_rows(self, names: list[str]) -> tuple[list[str], list[Place], Routes]:
        """Names of adapters, and the layers that hold these together, kept for the next batch."""
        if self._rowwise is None or not set(names) <= set(self._rowwise[0]):
            before = [] if self._rowwise is None else self._rowwise[0]
            routes = Routes(torch.empty(0, dtype=torch.long))
            together = [name for name in self.names if name in names or name in before]
            try:
                places = row_places(self.model, {name: self._places[name] for name in together}, routes)
            except UsageError:  # with those of an earlier batch
                together = names
                places = row_places(self.model, {name: self._places[name] for name in together}, routes)
            self._rowwise = together, places, routes
        return self._rowwise

    def remove(self, name: str) -> None:
        """Remove an adapter; if it is in use, the model becomes the plain backbone.

        Args:
            name: Name of the adapter.

        Raises:
            UsageError: If there is no such adapter, or within :meth:`rows`.
        """
        self._require(name)
        if name == self.in_use or self._in_rows:
            self.use(None)
        del self._places[name]
        self._rowwise = None

    def _require(self, name: str) -> None:
        if name not in self._places:
            raise UsageError(f"The bank has no adapter {name!r}; it has {self.names}.")
