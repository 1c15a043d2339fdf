"""The base of all methods with low-rank adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast, get_args

from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer, make_adapter, require_start
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.methods.method import Method
from lit_sparse.methods.step import Run, require_ratio

InitWeights = Literal["lora", "pissa", "gora", "lora_ga", "eva"]
GateInit = Literal["gaussian", "ones"]


@dataclass(eq=False, repr=False, kw_only=True)
class SparseMethod(Method):
    """A way to adapt a frozen model by low-rank layers, and to make them sparse while they train.

    A new method is a sub-class in one file, as :class:`~lit_sparse.Method` says. It may also compute the gates of the
    forward pass from a trained parameter, in :meth:`effective_gate`. Its other arguments are those of
    :class:`~lit_sparse.Method`.

    Args:
        rank: Ranks r of every adapter. Methods that prune ranks start from these and only remove some.
        alpha: Numerator of the scale alpha / rank of the adapter's output; None: equal to rank, scale 1.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output (Kalajdzievski 2023,
            arXiv:2312.03732, Thm. 3.2).
        loraplus_lr_ratio: LoRA+: B has this multiple of the optimizer's learning rate, and A has that rate itself
            (Hayou et al. 2024, arXiv:2402.12354). 1: both have the same.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.
    """

    overridable: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    """Arguments that ``overrides`` may set for some layers."""

    gate_init = cast("str | None", "gaussian")  # an annotation would make it a field

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    loraplus_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        """Check the arguments; a sub-class checks its own after these."""
        super().__post_init__()
        require_range("rank", self.rank, at_least=1)
        if self.rank % 1:
            raise UsageError(f"rank must be a whole number; got {self.rank}.")
        require_range("alpha", self.alpha, above=0)
        require_range("dropout", self.dropout, at_least=0, below=1)
        require_range("loraplus_lr_ratio", self.loraplus_lr_ratio, above=0)
        require_choice("init_weights", self.init_weights, get_args(InitWeights))
        if self.gate_init is not None:
            require_choice("gate_init", self.gate_init, ("gaussian", "ones"))
        if self.init_weights != "lora" and self.gated and not self.gates_start_at_one:
            raise UsageError(f"init_weights {self.init_weights!r} is for gates of 1: set gate_init to 'ones'.")

    def settings(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
        """What ``overrides`` sets for each layer; changes none.

        Args:
            layers: Full name to layer of all that are adapted.

        Raises:
            UsageError: If a pattern matches none of them, or ``init_weights`` cannot start from one: its weight
                is quantized, or has too few singular values for the ranks, or (EVA) it is not linear.
        """
        found = super().settings(layers)
        for name, layer in layers.items():
            require_start(self.init_weights, name, layer, int(found[name].get("rank", self.rank)))
        return found

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer.

        Args:
            layer: The layer.
            overrides: Arguments that this layer has in place of the method's.
        """
        rank = int(overrides.get("rank", self.rank))
        adapter = make_adapter(layer, rank, self._scale(overrides), self.dropout, self.gated)
        adapter.overrides = overrides
        if type(self).effective_gate is not SparseMethod.effective_gate:
            adapter.gate_function = self.effective_gate
        if adapter.gate is not None and not self.gates_start_at_one:
            nn.init.normal_(adapter.gate)
        if self.init_weights == "pissa":
            adapter.start_from_principal()
        adapter.took_from_weight = self.changes_weights
        return adapter

    def effective_gate(self, gate: Tensor, training: bool) -> Tensor:  # noqa: ARG002
        """The factor of each rank in the forward pass, in logs, reports and exports, from the parameter ``gate``.

        Args:
            gate: Values of the parameter, of any shape: each entry is mapped by itself.
            training: Whether it is for a forward pass in training, where a gate may be drawn at random; otherwise the
                same ``gate`` must give the same factors.

        Returns:
            Shaped like ``gate``. Ranks with the factor 0 count as dead.
        """
        return gate

    @property
    def acts_by_rank(self) -> bool:
        """Whether each rank is treated by itself, so that independent changes can be trained side by side."""
        return False

    @property
    def gates_start_at_one(self) -> bool:
        """Whether gates are one at the start, so that the adapter is LoRA's, or drawn from N(0, 1)."""
        return self.gate_init == "ones"

    @property
    def scale(self) -> float:
        """Factor of the product BA where nothing is overridden: alpha / rank, or alpha / √rank."""
        return self._scale({})

    def _scale(self, overrides: Mapping[str, float]) -> float:
        return scale_of(overrides.get("rank", self.rank), overrides.get("alpha", self.alpha), self.use_rslora)

    def mismatch(self, adapter: Any) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if not isinstance(adapter, LowRankAdapter):
            return "no A and B"
        if (adapter.gate is not None) != self.gated:
            return f"{'no gate' if self.gated else 'a gate'}"
        rank, scale = adapter.overrides.get("rank", self.rank), self._scale(adapter.overrides)
        if adapter.rank > rank or abs(adapter.scale - scale) > 1e-9 * scale:
            return f"rank {adapter.rank} and scale {adapter.scale:g}, not {rank:g} and {scale:g}"
        return None

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Called once, before the first step: raise for settings that cannot work.

        Returns:
            Warnings, a sentence or two each, about settings that will hardly do what the user wants.
        """
        if self.loraplus_lr_ratio != 1 and not run.done:
            require_ratio(self.loraplus_lr_ratio, adapters, run.optimizer)
        return super().check(adapters, run)


def divisor(rank: float, use_rslora: bool) -> float:
    """What alpha is divided by for the scale."""
    return math.sqrt(rank) if use_rslora else rank


def scale_of(rank: float, alpha: float | None, use_rslora: bool) -> float:
    """The factor of BA in an adapter with these arguments."""
    return (rank if alpha is None else alpha) / divisor(rank, use_rslora)
