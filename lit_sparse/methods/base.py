"""What every sparse method answers, and what it is told about the run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer, make_adapter, require_principal
from lit_sparse.adapters.patterns import NamePatterns
from lit_sparse.adapters.selection import matches_tail
from lit_sparse.errors import UsageError

InitWeights = Literal["lora", "pissa"]
GateInit = Literal["gaussian", "ones"]
Overrides = dict[str, dict[str, int | float]]


@dataclass(frozen=True)
class Step:
    """One optimizer step, as a method sees it.

    Args:
        index: Number of this step, counted from 1; skipped steps of a gradient scaler do not count.
        total: Optimizer steps of the whole run, None when the Trainer has no end.
        optimizer: The optimizer that takes it.
        group_of: Index in ``optimizer.param_groups`` of each of its parameters.
    """

    index: int
    total: int | None
    optimizer: Optimizer
    group_of: Mapping[nn.Parameter, int]

    def group(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The parameter group that holds ``parameter``: its lr, betas and so on."""
        return self.optimizer.param_groups[self.group_of[parameter]]

    def lr_of(self, parameter: nn.Parameter) -> float | Tensor:
        """The learning rate that this step uses for ``parameter``."""
        return self.group(parameter)["lr"]  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Run:
    """What is known of a run before its first step.

    Args:
        done: Optimizer steps taken before, more than 0 in a resumed run.
        total: Optimizer steps of the whole run, None when the Trainer has no end.
        optimizer: The optimizer that holds the adapters.
        learning_rates: The learning rate of a parameter at every step of the run, as far as the schedule
            can be foretold.
    """

    done: int
    total: int | None
    optimizer: Optimizer
    learning_rates: Callable[[nn.Parameter], Sequence[float]]


class SparseMethod:
    """A way to adapt a frozen model by low-rank layers, and to make them sparse while they train.

    A new method is a subclass in one file: it wraps layers in :meth:`adapt`, and changes adapters around each
    optimizer step in :meth:`before_step` and :meth:`after_step`. State that must survive a checkpoint
    belongs into parameters and buffers of the adapters. Every constructor argument is kept under its own
    name, so that checkpoints can name the method they were trained with.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names. Convolutions and embeddings
            are adapted when they are named.
        rank: Ranks r of every adapter; methods that prune ranks only ever remove from these.
        alpha: Numerator of the scale alpha / rank of the adapter's output; None: equal to rank, scale 1.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output (Kalajdzievski 2023,
            arXiv:2312.03732, Thm. 3.2).
        init_weights: ``lora``: A random and B zero. ``pissa``: A and B take the largest singular values out of the
            frozen weight, which is changed for that (:meth:`~lit_sparse.LowRankAdapter.start_from_principal`).
        gate_init: ``gaussian``: N(0, 1); ``ones``. For methods with gates.
        overrides: Other settings for some layers: a trailing name part or a regular expression, to the arguments that
            are otherwise there, among :attr:`overridable`. The first that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.
    """

    gated: ClassVar[bool] = False
    """Whether the adapters of this method have gates."""

    overridable: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    """Arguments that ``overrides`` may set for some layers."""

    def __init__(
        self,
        target_modules: str | list[str],
        rank: int,
        alpha: float | None,
        dropout: float = 0.0,
        layers: int | list[int] | None = None,
        exclude_modules: str | list[str] | None = None,
        train_head: bool | list[str] = True,
        use_rslora: bool = False,
        init_weights: InitWeights = "lora",
        gate_init: GateInit = "gaussian",
        overrides: Overrides | None = None,
    ) -> None:
        if not target_modules:
            raise UsageError(f"target_modules is {target_modules!r}: name at least one layer, or give 'all-linear'.")
        _require_rank_and_alpha(rank, alpha)
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be in [0, 1); got {dropout}.")
        if init_weights not in ("lora", "pissa"):
            raise UsageError(f"init_weights must be 'lora' or 'pissa'; got {init_weights!r}.")
        if gate_init not in ("gaussian", "ones"):
            raise UsageError(f"gate_init must be 'gaussian' or 'ones'; got {gate_init!r}.")
        if init_weights == "pissa" and self.gated and gate_init != "ones":
            raise UsageError("init_weights 'pissa' takes the weight's own ranks as they are: set gate_init to 'ones'.")
        self.target_modules = target_modules
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.layers = layers
        self.exclude_modules = exclude_modules
        self.train_head = train_head
        self.use_rslora = use_rslora
        self.init_weights: InitWeights = init_weights
        self.gate_init: GateInit = gate_init
        self.overrides = overrides
        for pattern, values in (overrides or {}).items():
            unknown = [name for name in values if name not in self.overridable or getattr(self, name, 0) is None]
            if unknown or not values:
                raise UsageError(
                    f"overrides of {pattern!r} set {unknown or 'nothing'}; what {type(self).__name__} can set for some "
                    f"layers is {list(self.overridable)}, each where the argument itself is in use."
                )
            _require_rank_and_alpha(values.get("rank", rank), values.get("alpha", alpha))

    def settings(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
        """What ``overrides`` sets for each layer; changes none.

        Args:
            layers: Full name to layer of all that are adapted.

        Raises:
            UsageError: If a pattern matches none of them, or PiSSA cannot start from the weight of one: it is quantized
                or has fewer singular values than there are ranks.
        """
        patterns = self.overrides or {}
        known = NamePatterns("overrides")
        idle = [p for p in patterns if not any(names_layer(p, name, known) for name in layers)]
        if idle:
            leaves = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(f"overrides {idle} match none of the {len(layers)} adapted layers, which end in {leaves}.")
        found = {
            name: next((dict(v) for p, v in patterns.items() if names_layer(p, name, known)), {}) for name in layers
        }
        if self.init_weights == "pissa":
            for name, layer in layers.items():
                require_principal(name, layer, int(found[name].get("rank", self.rank)))
        return found

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> LowRankAdapter:
        """Wrap one frozen layer.

        Args:
            layer: The layer.
            overrides: Arguments that are otherwise for this layer.
        """
        rank = int(overrides.get("rank", self.rank))
        adapter = make_adapter(layer, rank, self._scale(overrides), self.dropout, self.gated)
        adapter.overrides = overrides
        if adapter.gate is not None and self.gate_init == "ones":
            nn.init.ones_(adapter.gate)
        if self.init_weights == "pissa":
            adapter.start_from_principal()
        return adapter

    @property
    def scale(self) -> float:
        """What the product BA is multiplied by where nothing is overridden: alpha / rank, or alpha / √rank."""
        return self._scale({})

    def _scale(self, overrides: Mapping[str, float]) -> float:
        rank = overrides.get("rank", self.rank)
        alpha = overrides.get("alpha", self.alpha)
        return (rank if alpha is None else alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def parameter_groups(self, adapters: Sequence[LowRankAdapter]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Optimizer groups of the parameters that need options of their own; the rest is trained as usual."""
        return []

    def mismatch(self, adapter: LowRankAdapter) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if (adapter.gate is not None) != self.gated:
            return f"{'no gate' if self.gated else 'a gate'}"
        rank, scale = adapter.overrides.get("rank", self.rank), self._scale(adapter.overrides)
        if adapter.rank > rank or abs(adapter.scale - scale) > 1e-9 * scale:
            return f"rank {adapter.rank} and scale {adapter.scale:g}, not {rank:g} and {scale:g}"
        return None

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:  # noqa: ARG002
        """Called once, before the first step: raise for what cannot work.

        Returns:
            Warnings, a sentence or two each, of what will not do what the user wants.
        """
        return []

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> Any:  # noqa: ARG002
        """Called when gradients are final, but not clipped, and weights are those that produced them.

        Returns:
            Whatever :meth:`after_step` needs of it. It must change nothing but gradients: a gradient scaler
            may still skip the step, and then :meth:`after_step` is not called.
        """
        return None

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:
        """Called after the optimizer changed the weights: zero what is to be zero, in place."""

    def settled_after(self, total: int) -> int:  # noqa: ARG002
        """The optimizer step, of ``total``, after which adapters are as sparse as the schedule makes them.

        A run that stops early, as edits do, stops no earlier.
        """
        return 0

    def is_final(self, step: int, total: int | None, at_end: bool) -> bool:
        """Whether adapters are as sparse as this method makes them in the run.

        Masks are final when their schedule has settled. Gates are pulled towards zero at every step, so that a method
        with gates is final only at the end of the run, or at any time in a run without end.

        Args:
            step: Optimizer steps taken.
            total: Optimizer steps of the whole run, None when the Trainer has no end.
            at_end: Whether the run has come to its end, or to the last of several stages of thresholds.
        """
        if self.gated and not at_end:
            return False
        return self.settled_after(step + 1 if total is None else total) <= step

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:  # noqa: ARG002
        """At the end of a run: a sentence that says that nothing was pruned and what to change, or None."""
        return None

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.init_args().items())
        return f"{type(self).__name__}({arguments})"


def _require_rank_and_alpha(rank: float, alpha: float | None) -> None:
    if not rank >= 1:
        raise UsageError(f"rank must be at least 1; got {rank}.")
    if rank % 1:
        raise UsageError(f"rank must be a whole number; got {rank}.")
    if alpha is not None and not alpha > 0:
        raise UsageError(f"alpha must be positive, or the adapter would do nothing; got {alpha}.")


def names_layer(pattern: str, name: str, known: NamePatterns) -> bool:
    """Whether a key of ``overrides`` means the layer of this full name."""
    return matches_tail(name, pattern) or known.matches(pattern, name)
