"""SpIEL (Ansell et al. 2024): entries that change little are dropped, and grown where gradients add up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from torch import Tensor

from lit_sparse.adapters.candidates import Candidates, make_room, take_gradients
from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.optimizer_state import move_entries
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import regrown
from lit_sparse.methods.entries import Entries, by_chance
from lit_sparse.methods.step import Run, Step


@dataclass(eq=False, repr=False, kw_only=True)
class SpIEL(Entries):
    """Sparse fine-tuning with entries that move: those that changed least are dropped, and as many are grown.

    ``W = W0 + δ``, where δ has n trained entries, at first at places chosen by chance. With S = ``update_every``,
    γ = ``window`` and T steps in all, entries are chosen anew after the steps t = γ, γ + S, γ + 2 S, … Each weight then

        drops    the k(t) entries with the smallest |δ|: δ was 0 when they were grown,
        grows    the k(t) candidates with the largest |Σ_{s = t−γ+1}^{t} ∂L_s/∂W|,

        k(γ) = n        k(t) = ⌊n · ``replaced`` · (1 − t/T)⌋ for t > γ.

    The candidates of a choice are the n entries with the largest |∂L/∂W| in the first backward pass of its γ steps.
    From then on gradients are summed for them alone. Candidates that are trained already are left out. A dropped entry
    that is grown at once keeps its change; others get their pretrained value back, and new ones start at zero.

    Its other arguments are those of :class:`~lit_sparse.methods.entries.Entries` and :class:`~lit_sparse.Method`.

    Args:
        changed: The share of each adapted weight that is trained, in (0, 1]; 1 % as in the released code.
        update_every: S, steps from one choice to the next. The released code has 20, and more for small batches.
        window: γ, the steps before a choice whose gradients are summed, at most S.
        replaced: The share of the entries that the second and later choices drop, at the start of the run; it falls to
            zero at the end.

    Raises:
        UsageError: If an argument is outside its range, or a layer is not linear or is quantized. When training starts,
            if the run has no end.

    Source:
        Ansell et al. 2024 (arXiv:2401.16405), SpIEL-AG, and the released code (AlanAnsell/peft, 73b455b) with its
        linear schedule. There, windows after the first have γ + 1 steps. Its own Adam counts the age of each entry,
        and starts the averages of new ones from their summed gradients; here, any optimizer of torch's will do, and
        averages of new entries start at zero. The memory-saving variant SpIEL-MA is not built: it needs an optimizer
        of its own, SM3.
    """

    changed: float = 0.01
    update_every: int = 20
    window: int = 5
    replaced: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("window", self.window, at_least=1)
        require_range("update_every", self.update_every, at_least=1)
        if self.update_every < self.window:
            raise UsageError(f"update_every must be at least window; got {self.update_every} and {self.window}.")
        require_range("replaced", self.replaced, at_least=0, at_most=1)

    @property
    def moves_entries(self) -> bool:
        """Always."""
        return True

    def scores(self, weight: Tensor) -> Tensor:
        """Random numbers."""
        return by_chance(weight)

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> DeltaLinear:
        """Wrap one frozen layer, with room for candidates."""
        adapter = super().adapt(layer, overrides)
        make_room(adapter)
        return adapter

    def check(self, adapters: Sequence[DeltaLinear], run: Run) -> list[str]:
        """Refuse a run without an end, and warn of one without a choice."""
        if run.total is None:
            raise UsageError(
                "SpIEL replaces fewer entries the nearer the end is, but this run has no end: set the Trainer's "
                "max_epochs or max_steps."
            )
        if run.total > self.window:
            return super().check(adapters, run)
        idle = f"SpIEL first chooses entries after {self.window} steps, and this run has {run.total}: "
        return [*super().check(adapters, run), f"{idle}it trains entries that chance has chosen. Lower window."]

    def prepare(self, adapters: Sequence[DeltaLinear], step: Step) -> None:
        """Watch gradients if the next step is in a window."""
        self._watch(adapters, step, step.index, resumed=True)

    def before_step(self, adapters: Sequence[DeltaLinear], step: Step) -> Any:  # noqa: ARG002
        """The step's gradients at the candidates. A step that a gradient scaler skips leaves no trace."""
        return take_gradients(adapters)

    def after_step(self, adapters: Sequence[DeltaLinear], step: Step, observed: Any) -> None:
        """Sum gradients, and at the end of a window drop and grow entries."""
        for candidates, gradient in observed:
            candidates.add(gradient)
        total = step.total or 0
        if step.index == self._choice(step.index, total):
            share = 1.0 if step.index == self.window else self.replaced * (1 - step.index / total)
            for adapter in adapters:
                self._drop_and_grow(adapter, share, step)
        self._watch(adapters, step, step.index + 1)
        super().after_step(adapters, step, observed)

    def release(self, adapters: Sequence[DeltaLinear]) -> None:
        """Watch no more."""
        for adapter in adapters:
            adapter.watch(None)

    def settled_after(self, total: int) -> int:
        """The step of the last choice."""
        return max(0, self.window + (total - 1 - self.window) // self.update_every * self.update_every)

    def _choice(self, step: int, total: int) -> int | None:
        """The choice in whose window a step is, as the step after which it is made; none is made after the last one."""
        choice = self.window + max(0, math.ceil((step - self.window) / self.update_every)) * self.update_every
        return choice if choice - self.window < step and choice < total else None

    def _watch(self, adapters: Sequence[DeltaLinear], step: Step, upcoming: int, resumed: bool = False) -> None:
        choice = self._choice(upcoming, step.total or 0)
        first = choice is not None and upcoming == choice - self.window + 1
        for adapter in adapters:
            if choice is None or not adapter.values.requires_grad:
                adapter.watch(None)
            elif first or resumed:
                adapter.watch(Candidates(adapter, first, resumed, step.alone))

    def _drop_and_grow(self, adapter: DeltaLinear, share: float, step: Step) -> None:
        count = math.floor(share * adapter.size + 1e-6)
        if count and isinstance(adapter.watcher, Candidates) and not adapter.watcher.fresh:
            chosen = adapter.get_buffer("candidates"), adapter.get_buffer("accumulated")
            entries = adapter.in_features * adapter.out_features
            sources = adapter.move(regrown(adapter.indices, adapter.values, *chosen, count, entries))
            move_entries(step.optimizer, adapter.values, sources)
