"""A budget as users write it, and what the ranks of adapters cost."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError


class Amount(NamedTuple):
    """A budget as it is written.

    Args:
        value: A share in (0, 1], or a number of ``unit``.
        unit: ``share``, ``parameters`` or ``bytes``.
    """

    value: float
    unit: Literal["share", "parameters", "bytes"]


def parse_budget(budget: float | str) -> Amount:
    """Read a budget such as ``0.25``, ``20000``, ``"500k"`` or ``"2MB"``.

    Raises:
        UsageError: If it is none of these.
    """
    found = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)\s*([kMG]?)(B?)", str(budget).strip(), re.IGNORECASE)
    number = float(found[1]) if found else 0.0
    if found and 0 < number < 1e18:
        if found[3]:
            return Amount(_rounded(number, found[2]), "bytes")
        if found[2] or (number > 1 and number % 1 == 0):
            return Amount(_rounded(number, found[2]), "parameters")
        if number <= 1:
            return Amount(number, "share")
    raise UsageError(
        "budget must be a share in (0, 1] such as 0.25, a number of parameters such as 20000, '500k' or '1.2M', or "
        f"bytes such as '500kB' or '2MB', with the decimal units k, M and G; got {budget!r}."
    )


def _rounded(number: float, prefix: str) -> int:
    return math.floor(number * {"": 1, "k": 1e3, "m": 1e6, "g": 1e9}[prefix.lower()] + 1e-6)  # 1.2M is not 1,199,999


class Account(NamedTuple):
    """What ranks cost, and what they may cost.

    Args:
        costs: The cost of one rank of each adapter.
        dense: The cost of all ranks at the start.
        limit: The budget.
        frozen: The cost of ranks whose gates are frozen.
        unit: ``parameters`` or ``bytes``.
    """

    costs: list[int]
    dense: int
    limit: int
    frozen: int
    unit: str

    @classmethod
    def of(cls, budget: float | str, adapters: Sequence[LowRankAdapter]) -> Account:
        """Count what is in adapters, including ranks that compaction has removed."""
        value, unit = parse_budget(budget)
        costs = [
            (a.in_features + a.out_features) * (a.lora_A.element_size() if unit == "bytes" else 1) for a in adapters
        ]
        dense = sum(c * a.copies * a.max_rank for c, a in zip(costs, adapters, strict=True))
        frozen = sum(c * len(a.lora_A) for c, a in zip(costs, adapters, strict=True) if not is_trained(a))
        limit = math.floor(value * dense + 1e-6) if unit == "share" else int(value)
        return cls(costs, dense, limit, frozen, "parameters" if unit == "share" else unit)

    def spent(self, ranks: Sequence[int]) -> int:
        """What so many ranks of each adapter cost together."""
        return sum(cost * count for cost, count in zip(self.costs, ranks, strict=True))

    def require_possible(self) -> None:
        """Check that the budget is one.

        Raises:
            UsageError: If it is more than there is, less than the cheapest rank, or taken up by frozen gates.
        """
        if self.limit > self.dense:
            raise UsageError(
                f"budget is {self.limit:,} {self.unit}, and the adapters have {self.dense:,} at the start. Lower "
                "budget, or raise rank."
            )
        if self.limit < min(self.costs):
            raise UsageError(
                f"budget is {self.limit:,} of {self.dense:,} {self.unit}, less than the {min(self.costs):,} of the "
                "smallest rank. Raise budget."
            )
        if self.limit < self.frozen:
            raise UsageError(
                f"budget is {self.limit:,} {self.unit}, and the layers with frozen gates alone have {self.frozen:,}. "
                "Raise budget, or let these gates be trained."
            )


def is_trained(adapter: LowRankAdapter) -> bool:
    """Whether the gates of an adapter are trained."""
    return adapter.gate is not None and adapter.gate.requires_grad


def open_gates(adapters: Sequence[LowRankAdapter]) -> list[int]:
    """The number of open gates of each adapter that has gates; waits for the device, once."""
    gates = [adapter.effective_gate() for adapter in adapters]
    counts = [gate.count_nonzero() for gate in gates if gate is not None]
    return torch.stack(counts).tolist() if counts else []
