"""A budget for the ranks of all layers, which compete for it until a point in the run and then stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

from torch import nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.errors import UsageError
from lit_sparse.functional import cubic_density
from lit_sparse.methods.account import Account, is_trained, open_gates, parse_budget
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.schedule import FIRST_SCORES, decided_at, length_of, require_end, require_points
from lit_sparse.methods.step import Run

DEFAULT_BUDGET = 0.25
"""Share of A and B that is left if neither a budget nor a pull at the gates is given."""


@dataclass(eq=False, repr=False, kw_only=True)
class RankBudget(SparseMethod):
    """Methods with gates that can be given a budget, which holds from ``end`` on.

    A rank of a layer costs the d_in + d_out numbers of its row of A and column of B. The budget falls from all ranks at
    ``begin`` to its final value at ``end``. From ``end`` on the choice of ranks stays.

    Args:
        budget: What may be left of the adapters: a share in (0, 1] of the parameters that A and B start with;
            parameters, such as ``20000``, ``500k`` or ``1.2M``; or bytes of them, such as ``2MB``, in the dtype of the
            adapters, which PEFT's file has, too. Units are decimal. Gates do not count, since exports fold them into B,
            nor do modules trained whole, the header of the file, and the zeros that pad all layers to one rank in
            exports for engines (``layout: padded``).
        begin: Until when all ranks are kept: a number of optimizer steps, or with a decimal point a share of the run.
            The first choice is made at the third step at the earliest, since nothing tells ranks apart while B is zero.
        end: From when on the budget holds and the choice of ranks stays, in the same units. A resumed run with another
            length has another schedule, and one with a larger budget gets back no rank after ``end``. ``begin`` and
            ``end`` count with ``budget`` only.
    """

    pulls: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """The arguments that close gates in place of a budget, and what each of them is."""

    budget: float | str | None = None
    begin: int | float = 0.5
    end: int | float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_points(self.begin, self.end)
        if self.budget is not None:
            parse_budget(self.budget)
        choices = {"budget": "what is left", **self.pulls}
        given = [name for name in choices if getattr(self, name) is not None]
        if len(given) != 1:
            *others, last = (f"{name} ({meaning})" for name, meaning in choices.items())
            raise UsageError(
                f"Give exactly one of {', '.join(others)} and {last}; got {' and '.join(given) or 'none'}."
            )

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check the budget against the adapters, and its schedule against the run."""
        warnings = super().check(adapters, run)
        if self.budget is None:
            return warnings
        require_end(self.begin, self.end, run.total)
        account = Account.of(self.budget, adapters)
        account.require_possible()
        self._allowed(account, 0, run.total)  # raises when begin lies after end
        return warnings + (self._warn_of_rest(adapters, account) if self._ranks_stay(run.done + 1, run.total) else [])

    def _warn_of_rest(self, adapters: Sequence[LowRankAdapter], account: Account) -> list[str]:
        """Warn if a run that is resumed when ranks stay has another budget than before."""
        ranks = open_gates(adapters)
        held = account.spent(ranks)
        if held > account.limit and not self._cuts_later:
            return [
                f"The ranks that are left hold {held:,} {account.unit}, more than the budget of {account.limit:,}, and "
                f"nothing is cut after end={self.end}. Resume from an earlier checkpoint, or raise end."
            ]
        closed = [a.copies * a.max_rank > n and is_trained(a) for a, n in zip(adapters, ranks, strict=True)]
        if not any(c and cost <= account.limit - held for c, cost in zip(closed, account.costs, strict=True)):
            return []
        return [
            f"The budget is {account.limit:,} {account.unit}, but the ranks that are left hold {held:,}, and the "
            f"others do not come back after end={self.end}. Resume from an earlier checkpoint, or raise end."
        ]

    def goal(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The budget in parameters or bytes; raises UsageError if it is impossible."""
        if self.budget is None:
            return super().goal(adapters)
        account = Account.of(self.budget, adapters)
        account.require_possible()
        others = super().goal(adapters)
        return (
            f"The budget leaves at most {account.limit:,} of {account.dense:,} {account.unit} of A and B from "
            f"end={self.end} on."
        ) + (f" {others}" if others else "")

    def settled_after(self, total: int) -> int:
        """The first step after which the budget holds, or after which ranks stay."""
        settled, stay = super().settled_after(total), self.ranks_stay_after(total)
        return settled if stay is None else max(settled, min(stay, total))

    def ranks_stay_after(self, total: int | None) -> int | None:
        """The step of ``end``, if there is a budget."""
        if self.budget is None:
            return super().ranks_stay_after(total)
        return decided_at(self.end, total)

    def is_final(self, step: int, total: int | None, at_end: bool) -> bool:
        """Whether adapters are as sparse as this method makes them in the run: from when on ranks stay, if they do."""
        stay = self.ranks_stay_after(total)
        if stay is None:
            return super().is_final(step, total, at_end)
        return step >= stay and super().is_final(step, total, at_end=True)

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:
        """The sentence for a run that closed no gate, or that ended above its budget."""
        if self.budget is None:
            ranks = sum(a.copies * a.max_rank for a in adapters)
            if sum(open_gates(adapters)) < ranks:
                return super().shortfall(adapters)
            gates = [gate for gate in (adapter.effective_gate() for adapter in adapters) if gate is not None]
            return (
                f"No gate became zero: all {ranks} ranks remain, the smallest |gate| is "
                f"{min(float(gate.detach().abs().min()) for gate in gates):.2g}. Raise {self._knob}, or train longer."
            )
        account = Account.of(self.budget, adapters)
        held = account.spent(open_gates(adapters))
        if held <= account.limit:
            return super().shortfall(adapters)
        return (
            f"The adapters hold {held:,} {account.unit}, more than the budget of {account.limit:,}: the run ended "
            f"before the budget held (begin={self.begin}, end={self.end}). Train longer, or lower end."
        )

    @property
    def _knob(self) -> str:
        """The argument that is given in place of a budget."""
        return next(name for name in self.pulls if getattr(self, name) is not None)

    @property
    def _cuts_later(self) -> bool:
        """Whether ranks are cut after ``end``, too, should a resumed run have a smaller budget."""
        return False

    def _ranks_stay(self, step: int, total: int | None) -> bool:
        """Whether gates at zero stay there in this step."""
        after = self.ranks_stay_after(total)
        return after is not None and step > after

    def _allowed(self, account: Account, step: int, total: int | None) -> int:
        """What the ranks may cost together after ``step``."""
        share = cubic_density(step, length_of(total), account.limit / account.dense, self.begin, self.end)
        if step < FIRST_SCORES:
            return account.dense
        if self._ranks_stay(step + 1, total):
            return account.limit
        return max(account.limit, math.floor(share * account.dense))


def gates_of(adapters: Sequence[LowRankAdapter]) -> list[nn.Parameter]:
    """The gates of all adapters that have them."""
    return [adapter.gate for adapter in adapters if adapter.gate is not None]
