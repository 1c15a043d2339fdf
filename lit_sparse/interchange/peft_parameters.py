"""The weights of experts in PEFT's format, where they are parameters (``target_parameters``), not layers."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import Tensor

from lit_sparse.adapters.patterns import matches_tail

_WRAPPED = re.compile(r"(\.base_layer)+$")


def stored_names(parameters: Iterable[str]) -> dict[str, str]:
    """Full name of each adapted parameter to the name before its ``lora_A`` in a folder.

    PEFT wraps a module once for each of its parameters, in the module's order, and calls what is inside
    ``base_layer``. In modules of experts, ``down_proj`` is last, hence outermost.
    """
    owners: dict[str, list[str]] = {}
    for name in sorted(parameters, key=lambda name: name.endswith(".down_proj")):
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: owner + ".base_layer" * (len(names) - 1 - place)
        for owner, names in owners.items()
        for place, name in enumerate(names)
    }


def parameter_names(stored: Iterable[str], targets: Iterable[str]) -> dict[str, str]:
    """Names before ``lora_A`` to full names of parameters, the inverse of :func:`stored_names`.

    Args:
        stored: Names in the folder, without those of layers.
        targets: The folder's ``target_parameters``, whole names or their ends.
    """
    owners = {_WRAPPED.sub("", name) for name in stored}
    named = {(f"{owner}.{target.rpartition('.')[2]}", target) for owner in owners for target in targets}
    return {place: name for name, place in stored_names({n for n, t in named if matches_tail(n, t)}).items()}


def to_peft(lora_B_t: Tensor, experts: int) -> Tensor:
    """Bᵀ with the ranks of each expert in a row to PEFT's B ``(out_features, rank · experts)``, experts innermost."""
    return lora_B_t.view(experts, -1, lora_B_t.shape[1]).permute(2, 1, 0).flatten(1)


def from_peft(lora_B: Tensor, experts: int) -> Tensor:
    """The inverse of :func:`to_peft`."""
    return lora_B.view(lora_B.shape[0], -1, experts).permute(2, 1, 0).flatten(0, 1)
