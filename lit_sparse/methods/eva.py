"""EVA: the principal components of the inputs of linear layers, over some batches of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from lightning.fabric.utilities import rank_zero_info
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.adapters.inputs import equal_inputs, real_positions, watch_inputs
from lit_sparse.adapters.modes import in_mode
from lit_sparse.adapters.processes import all_have, is_distributed, of_first, rows_of_all
from lit_sparse.errors import UsageError, listed
from lit_sparse.functional.eva import PrincipalComponents, explained_ranks


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
    """
    served, taken, inputs = iter(batches), 0, _Inputs(adapters, rho)
    compiled = any(adapter.compiled for adapter in adapters.values())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()  # graphs would not call the hooks
    with torch.no_grad(), in_mode(model, training=False), disable_adapters(model, head=False), eager:
        while all_have(batch := next(served, None), inputs.device):  # for they pass their inputs on together
            if not taken:
                inputs.share(equal_inputs(adapters, lambda batch=batch: forward(batch)))  # type: ignore[misc]
            if not (waiting := inputs.waiting()):
                break
            watched = {name: adapters[name] for name in waiting}
            with real_positions(model) as positions, watch_inputs(watched, lambda n, x: inputs.see(n, positions(x))):
                forward(batch)
            inputs.divide()
            taken += 1
    return inputs.found(taken)


class _Inputs:
    """The different inputs of the adapted layers, each under its first layer, and the ranks that layers get by them."""

    def __init__(self, adapters: Mapping[str, LowRankAdapter], rho: float) -> None:
        self.adapters, self.device = adapters, next(iter(adapters.values())).lora_A.device
        self.most = {  # ranks of each layer; PEFT rounds like this
            name: min(round(adapter.rank * rho), adapter.in_features, adapter.out_features)
            for name, adapter in adapters.items()
        }
        self.ranks = dict(self.most)
        self.first: dict[str, str] = {}
        self.components: dict[str, PrincipalComponents] = {}
        self.rows: dict[str, list[Tensor]] = {}

    def share(self, first: Mapping[str, str]) -> None:
        """Take the first process's word for which layers have the same input; it need not have called all of them."""
        names = list(self.adapters)
        places = of_first(torch.tensor([names.index(first.get(name, name)) for name in names]), self.device).tolist()
        self.first = {name: names[place] for name, place in zip(names, places, strict=True)}
        for name in dict.fromkeys(self.first.values()):
            count = max(most for other, most in self.most.items() if self.first[other] == name)
            self.components[name] = PrincipalComponents(name, count)

    def waiting(self) -> list[str]:
        """The inputs of which a component that is needed has not converged, as the first process sees it."""
        needed = dict.fromkeys(self.components, 0)
        for name, rank in self.ranks.items():
            needed[self.first[name]] = max(needed[self.first[name]], rank)
        open_ = [not bool(own.converged[: needed[name]].all()) for name, own in self.components.items()]
        decided = of_first(torch.tensor(open_, dtype=torch.int32), self.device).tolist()
        self.rows = {name: [] for name, waits in zip(self.components, decided, strict=True) if waits}
        return list(self.rows)

    def see(self, name: str, rows: Tensor) -> None:
        """Take rows of this process, shape ``(rows, in_features)``."""
        self.rows[name].append(rows.clone())  # models may write over their activations
        if not is_distributed():
            self.fit(name)

    def fit(self, name: str) -> None:
        """Fit the components to the rows of all processes."""
        none = self.adapters[name].lora_A.new_zeros(0, self.adapters[name].in_features)
        self.components[name].fit(rows_of_all(torch.cat([none, *self.rows[name]]).float()))
        self.rows[name] = []

    def divide(self) -> None:
        """Divide the ranks among the layers, once all inputs have components."""
        if is_distributed():  # only now, in one order, for processes may call layers in orders of their own
            for name in self.rows:
                self.fit(name)
        if all(own.fitted for own in self.components.values()):
            shares = {name: own.shares for name, own in self.components.items()}
            budget = sum(adapter.rank for adapter in self.adapters.values())
            limited = [shares[self.first[name]][:most] for name, most in self.most.items()]
            self.ranks = dict(zip(self.adapters, explained_ranks(limited, budget), strict=True))

    def found(self, taken: int) -> dict[str, Tensor]:
        """Layer name to its components, those of the first process, after so many batches."""
        if not taken:
            raise UsageError("There are no training batches to start from: init_weights 'eva' needs at least one.")
        _require_enough(self.components, f"{taken} {'batch' if taken == 1 else 'batches'}")
        if waiting := self.waiting():
            rank_zero_info(
                f"EVA: after {taken} batches, the components of {len(waiting)} of {len(self.components)} different "
                "inputs still turn from batch to batch. A larger start_batches lets more of them settle."
            )
        ranks = of_first(torch.tensor(list(self.ranks.values())), self.device).tolist()
        rows = {name: of_first(own.vectors, self.device) for name, own in self.components.items()}
        return {name: rows[self.first[name]][:rank] for name, rank in zip(self.ranks, ranks, strict=True)}


def _require_enough(inputs: Mapping[str, PrincipalComponents], batches: str) -> None:
    if without := [name for name, own in inputs.items() if not own.rows]:
        raise UsageError(
            f"The layers {listed(without)} had no inputs in {batches}, from which init_weights 'eva' starts, or all of "
            "them were left out as padding (attention_mask) or by labels of -100. Check these of the first training "
            "batches, or leave the layers out (exclude_modules)."
        )
    for name, own in inputs.items():
        if not own.fitted:
            raise UsageError(
                f"{name!r} had {own.rows} inputs in {batches}, but init_weights 'eva' needs {own.count}, rank times "
                "eva_rho. Raise start_batches or the batch size, lower rank or eva_rho, or leave the layer out "
                "(exclude_modules)."
            )
