"""EVA: the principal components of the inputs of linear layers, over some batches of all processes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.adapters.inputs import real_positions, watch_inputs
from lit_sparse.adapters.modes import in_mode
from lit_sparse.adapters.processes import is_distributed
from lit_sparse.errors import UsageError, listed
from lit_sparse.functional import explained_ranks
from lit_sparse.methods.gradients import together

TAU = 0.99
"""A component has converged when a batch leaves this cosine between what it was and what it is, as in PEFT."""


def principal_inputs(
    model: nn.Module,
    adapters: Mapping[str, LowRankAdapter],
    rho: float,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> dict[str, Tensor]:
    """The principal components of each layer's inputs, as many as the layer is to have ranks.

    The model computes what it does in evaluation, without adapters. Layers with the same input share their components.
    An input is no longer looked at when the components that its layers are to have have converged. Every process
    computes with the inputs of all processes, and all of them take what the first one found.

    Args:
        model: Model with new adapters.
        adapters: By layer name, all of linear layers. The sum of their ranks stays.
        rho: Most ranks of a layer, in multiples of those that it has.
        batches: Those of this process.
        forward: Passes a batch through the model.

    Returns:
        Layer name to orthonormal rows, shape ``(rank, in_features)``.

    Raises:
        UsageError: If PEFT is not installed, there is no batch, or inputs of a layer are too few, all equal, or not
            finite.

    Source:
        Paischer et al. 2024 (EVA, arXiv:2410.07170), as in PEFT 0.21.2 (``peft/tuners/lora/eva.py``).
    """
    served, taken, inputs = iter(batches), 0, _Inputs(adapters, rho)
    compiled = any(adapter.compiled for adapter in adapters.values())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # graphs would not call the hooks
    with torch.no_grad(), in_mode(model, training=False), disable_adapters(model, head=False), eager:
        while (batch := inputs.next_of(served)) is not None:
            if not taken:
                inputs.find_equal(forward, batch)
            waiting = inputs.waiting()
            if not waiting:
                break
            with real_positions(model) as positions, inputs.collecting(waiting, positions):
                forward(batch)
            inputs.divide()
            taken += 1
    return inputs.found(taken)


class _Components:
    """The principal components of one input, batch after batch, by PEFT's incremental PCA.

    Args:
        name: The first layer that has this input.
        adapter: Its adapter.
        count: Number of components.
    """

    def __init__(self, name: str, adapter: LowRankAdapter, count: int) -> None:
        from peft.utils.incremental_pca import IncrementalPCA

        self.name, self.count, self.rows, self.called = name, count, 0, False
        self.pca = IncrementalPCA(n_components=count, copy=True, lowrank=True, lowrank_seed=42)  # as PEFT makes it
        self.converged = torch.zeros(count, dtype=torch.bool)
        self._none = adapter.lora_A.new_zeros(0, adapter.in_features, dtype=torch.float32)
        self._own, self._pending = [self._none], [self._none]

    @property
    def fitted(self) -> bool:
        """Whether there were as many rows as components."""
        return hasattr(self.pca, "components_")

    def see(self, rows: Tensor) -> None:
        """Take rows of this process, shape ``(rows, in_features)``."""
        self.called = True
        self._own.append(rows.clone())  # models may write over their activations
        if not is_distributed():
            self.fit()

    def fit(self) -> None:
        """Take the rows of all processes into account. They wait until there are as many as components."""
        rows = _of_all_processes(torch.cat(self._own).float())
        self._own = [self._none]
        if not rows.isfinite().all():
            raise UsageError(
                f"The inputs of {self.name!r} are not finite: init_weights 'eva' cannot start from them. Check the "
                "model on the first training batches."
            )
        self.rows += len(rows)
        self._pending.append(rows)
        if sum(map(len, self._pending)) < self.count:
            return
        before = self.pca.components_ if self.fitted else None
        with torch.autocast(rows.device.type, enabled=False):
            self.pca.partial_fit(torch.cat(self._pending))  # type: ignore[no-untyped-call]
        self._pending = [self._none]
        if before is not None:
            self.converged = (F.cosine_similarity(self.pca.components_, before) >= TAU).cpu()

    def shares(self) -> Tensor:
        """The share of the variance that each component explains, in main memory."""
        found: Tensor = self.pca.explained_variance_ratio_.float().cpu()
        if not found.isfinite().all():
            raise UsageError(
                f"The inputs of {self.name!r} are all equal, and have no principal components: leave the layer out, "
                "or set init_weights to 'lora'."
            )
        return found


class _Inputs:
    """The different inputs of the adapted layers, and the ranks that layers get by them."""

    def __init__(self, adapters: Mapping[str, LowRankAdapter], rho: float) -> None:
        try:
            import peft.utils.incremental_pca  # noqa: F401
        except ImportError as error:
            raise UsageError("init_weights 'eva' needs PEFT: pip install \"lit-sparse[peft]\".") from error

        self.adapters, self.rho = adapters, rho
        self.device = next(iter(adapters.values())).lora_A.device
        self.first: dict[str, str] = {}
        """Layer to the first one that has the same input."""
        self.most: dict[str, int] = {}
        self.ranks: dict[str, int] = {}
        self.components: dict[str, _Components] = {}

    def next_of(self, batches: Iterator[Any]) -> Any:
        """The next batch, or None as soon as one process has none, for all of them pass their inputs on together."""
        batch = next(batches, None)
        present = torch.tensor([batch is not None], dtype=torch.int32)
        all_have = together(present, self.device, lambda sent: dist.all_reduce(sent, dist.ReduceOp.MIN))
        return batch if all_have else None

    def find_equal(self, forward: Callable[[Any], Any], batch: Any) -> None:
        """Find out by a pass which layers have the same input, and make components for each different one."""
        seen: list[tuple[weakref.ref[Tensor], int, str]] = []

        def note(name: str, x: Tensor) -> None:
            if name not in self.first:
                same = (other for alive, version, other in seen if alive() is x and version == x._version)
                self.first[name] = next(same, name)
                seen.append((weakref.ref(x), x._version, self.first[name]))

        with watch_inputs(self.adapters, note):
            forward(batch)
        names = list(self.adapters)  # not every process need have called every layer
        places = torch.tensor([names.index(self.first.get(name, name)) for name in names])
        self.first = {n: names[i] for n, i in zip(names, together(places, self.device, _from_first), strict=True)}
        for name, adapter in self.adapters.items():
            most = round(adapter.rank * self.rho)  # as PEFT rounds
            self.most[name] = min(most, adapter.in_features, adapter.out_features)
        for name in dict.fromkeys(self.first[name] for name in self.adapters):
            count = max(most for other, most in self.most.items() if self.first[other] == name)
            self.components[name] = _Components(name, self.adapters[name], count)
        self.ranks = dict(self.most)

    def waiting(self) -> list[str]:
        """The inputs of which a component that is needed has not converged, as the first process sees it."""
        needed = dict.fromkeys(self.components, 0)
        for name, rank in self.ranks.items():
            needed[self.first[name]] = max(needed[self.first[name]], rank)
        open_ = [not bool(own.converged[: needed[name]].all()) for name, own in self.components.items()]
        decided = together(torch.tensor(open_, dtype=torch.int32), self.device, _from_first).tolist()
        return [name for name, waits in zip(self.components, decided, strict=True) if waits]

    @contextmanager
    def collecting(self, names: Iterable[str], positions: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Within the context, take the inputs of these layers."""
        layers = {name: self.adapters[name] for name in names}
        with watch_inputs(layers, lambda name, x: self.components[name].see(positions(x))):
            yield
        if is_distributed():  # only now, in one order, for processes may call layers in orders of their own
            for name in layers:
                self.components[name].fit()

    def divide(self) -> None:
        """Divide the ranks among the layers, once all inputs have components."""
        if all(own.fitted for own in self.components.values()):
            shares = [self.components[self.first[name]].shares()[: self.most[name]] for name in self.adapters]
            budget = sum(adapter.rank for adapter in self.adapters.values())
            self.ranks = dict(zip(self.adapters, explained_ranks(shares, budget), strict=True))

    def found(self, taken: int) -> dict[str, Tensor]:
        """Layer name to its components, those of the first process, after so many batches."""
        if not taken:
            raise UsageError("There are no training batches to start from: init_weights 'eva' needs at least one.")
        self._require_enough(f"{taken} {'batch' if taken == 1 else 'batches'}")
        waiting = self.waiting()
        if waiting:
            rank_zero_info(
                f"EVA: after {taken} batches, the components of {len(waiting)} of {len(self.components)} different "
                "inputs still turn from batch to batch. A larger start_batches lets more of them settle."
            )
        ranks = together(torch.tensor(list(self.ranks.values())), self.device, _from_first).tolist()
        rows = {name: together(own.pca.components_, self.device, _from_first) for name, own in self.components.items()}
        return {name: rows[self.first[name]][:rank] for name, rank in zip(self.ranks, ranks, strict=True)}

    def _require_enough(self, batches: str) -> None:
        without = [own for own in self.components.values() if not own.rows]
        masked = [own.name for own in without if own.called]
        if masked:
            raise UsageError(
                f"All inputs of the layers {listed(masked)} in {batches}, from which init_weights 'eva' starts, were "
                "left out: they are padding (attention_mask), or their labels are -100. Check these of the first "
                "training batches."
            )
        if without:
            raise UsageError(
                f"The layers {listed(own.name for own in without)} had no input in {batches}, from which init_weights "
                "'eva' starts: leave them out of target_modules (exclude_modules)."
            )
        for own in self.components.values():
            if not own.fitted:
                raise UsageError(
                    f"{own.name!r} had {own.rows} inputs in {batches}, but init_weights 'eva' needs {own.count}, rank "
                    "times eva_rho. Raise start_batches or the batch size, lower rank or eva_rho, or leave the layer "
                    "out (exclude_modules)."
                )


def _of_all_processes(rows: Tensor) -> Tensor:
    """The rows of all processes, one process after the other."""
    if not is_distributed():
        return rows
    count = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    padded = rows.new_zeros(int(max(counts)), rows.shape[1])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:own] for part, own in zip(parts, torch.cat(counts).tolist(), strict=True)])


def _from_first(sent: Tensor) -> None:
    dist.broadcast(sent, src=0)
