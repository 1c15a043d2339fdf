"""The base of all sparse methods."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.layers import Layer, make_adapter, require_start
from lit_sparse.adapters.patterns import NamePatterns, matches_tail
from lit_sparse.errors import UsageError, require_choice, require_range
from lit_sparse.methods.step import Run, Step, require_ratio

InitWeights = Literal["lora", "pissa", "gora"]
GateInit = Literal["gaussian", "ones"]
Overrides = dict[str, dict[str, int | float]]


@dataclass(eq=False, repr=False)
class SparseMethod(ABC):  # with a plain class as its base, jsonargparse takes sub-classes of a dataclass
    """A way to adapt a frozen model by low-rank layers, and to make them sparse while they train.

    A new method is a sub-class in one file, as a rule a dataclass: its fields are the arguments that it adds, and the
    command line shows those of its bases with their help. It changes adapters around each optimizer step, in
    :meth:`before_step` and :meth:`after_step`, adds a :meth:`penalty` to the loss, or computes the gates of the forward
    pass from a trained parameter, in :meth:`effective_gate`. State that must survive a checkpoint belongs into
    parameters and buffers of the adapters. A method with a constructor of its own keeps every argument under its name,
    so that checkpoints can say how the method was made.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names. Convolutions and embeddings
            are adapted when they are named.
        rank: Ranks r of every adapter. Methods that prune ranks start from these and only remove some.
        alpha: Numerator of the scale alpha / rank of the adapter's output; None: equal to rank, scale 1.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        use_rslora: Scale by alpha / √rank, so that a large rank does not shrink the output (Kalajdzievski 2023,
            arXiv:2312.03732, Thm. 3.2).
        loraplus_lr_ratio: LoRA+: B has this multiple of the optimizer's learning rate, and A has that rate itself
            (Hayou et al. 2024, arXiv:2402.12354). 1: both have the same.
        overrides: Settings for some layers, such as ``{"attention.output.dense": {"rank": 16}}``. Keys are trailing
            name parts or regular expressions; values replace the arguments in :attr:`overridable`. The first key
            that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.
    """

    gated: ClassVar[bool] = False
    """Whether the adapters of this method have gates."""

    overridable: ClassVar[tuple[str, ...]] = ("rank", "alpha")
    """Arguments that ``overrides`` may set for some layers."""

    init_weights = "lora"
    gate_init = cast("str | None", "gaussian")  # an annotation would make it a field

    target_modules: str | list[str] = "all-linear"
    _: KW_ONLY
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    layers: int | list[int] | None = None
    exclude_modules: str | list[str] | None = None
    train_head: bool | list[str] = True
    use_rslora: bool = False
    loraplus_lr_ratio: float = 1.0
    overrides: Overrides | None = None

    def __post_init__(self) -> None:
        """Check the arguments; a sub-class checks its own after these."""
        if not self.target_modules:
            raise UsageError(
                f"target_modules is {self.target_modules!r}: name at least one layer, or give 'all-linear'."
            )
        require_range("rank", self.rank, at_least=1)
        if self.rank % 1:
            raise UsageError(f"rank must be a whole number; got {self.rank}.")
        require_range("alpha", self.alpha, above=0)
        require_range("dropout", self.dropout, at_least=0, below=1)
        require_range("loraplus_lr_ratio", self.loraplus_lr_ratio, above=0)
        require_choice("init_weights", self.init_weights, ("lora", "pissa", "gora"))
        if self.gate_init is not None:
            require_choice("gate_init", self.gate_init, ("gaussian", "ones"))
        if self.init_weights != "lora" and self.gated and not self.gates_start_at_one:
            raise UsageError(f"init_weights {self.init_weights!r} is for gates of 1: set gate_init to 'ones'.")
        for pattern, values in (self.overrides or {}).items():
            unknown = [name for name in values if name not in self.overridable or getattr(self, name, 0) is None]
            if unknown or not values:
                raise UsageError(
                    f"overrides of {pattern!r} set {unknown or 'nothing'}; {type(self).__name__} can set "
                    f"{list(self.overridable)} for some layers, each where the argument itself is in use."
                )
            self._require_valid(**values, overrides=None)

    def _require_valid(self, **arguments: Any) -> None:
        """Check what this method would be with other arguments."""
        other = copy.copy(self)
        vars(other).update(arguments)
        other.__post_init__()

    def settings(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
        """What ``overrides`` sets for each layer; changes none.

        Args:
            layers: Full name to layer of all that are adapted.

        Raises:
            UsageError: If a pattern matches none of them, or ``init_weights`` cannot start from the weight of one: it
                is quantized, or for PiSSA has fewer singular values than there are ranks.
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

    def penalty(self, adapters: Sequence[LowRankAdapter]) -> Tensor | None:  # noqa: ARG002
        """What the method adds to the loss, or None.

        Its gradient is added to that of the loss once per optimizer step, before gradients are clipped. The loss that
        is logged is without it. For a gradient in closed form, :meth:`before_step` is cheaper.

        Args:
            adapters: All of the model's.

        Returns:
            A scalar, differentiable with respect to parameters of the adapters.
        """
        return None

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

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Called once, before the first step: raise for settings that cannot work.

        Returns:
            Warnings, a sentence or two each, about settings that will hardly do what the user wants.
        """
        if self.loraplus_lr_ratio != 1 and not run.done:
            require_ratio(self.loraplus_lr_ratio, adapters, run.optimizer)
        return []

    def before_step(self, adapters: Sequence[LowRankAdapter], step: Step) -> Any:  # noqa: ARG002
        """Called when gradients are final, but not clipped, and weights are those that produced them.

        Returns:
            Whatever :meth:`after_step` needs. It must change nothing but gradients: a gradient scaler
            may still skip the step, and then :meth:`after_step` is not called.
        """
        return None

    def after_step(self, adapters: Sequence[LowRankAdapter], step: Step, observed: Any) -> None:  # noqa: B027
        """Called after the optimizer changed the weights: zero what is to be zero, in place."""

    def set_threshold(self, threshold: float) -> None:  # noqa: ARG002
        """Use this threshold from the next step on, as :class:`~lit_sparse.ThresholdStages` asks.

        Raises:
            UsageError: If the method has no threshold, does not use it, or ``threshold`` is outside its range.
        """
        raise UsageError(f"ThresholdStages sets the threshold of a method, and {type(self).__name__} has none.")

    def settled_after(self, total: int) -> int:  # noqa: ARG002
        """The optimizer step, of ``total``, after which adapters get no sparser. An edit takes as many at least."""
        return 0

    def ranks_stay_after(self, total: int | None) -> int | None:  # noqa: ARG002
        """The optimizer step, of ``total``, after which gates at zero stay at zero; None: they may always come back.

        :class:`~lit_sparse.CompactRanks` removes their ranks right after that step.
        """
        return None

    def is_final(self, step: int, total: int | None, at_end: bool) -> bool:
        """Whether adapters are as sparse as this method makes them in the run.

        Masks and budgets are final when their schedule has settled, and gates when they are no longer pulled
        (``refit``). A threshold pulls gates towards zero at every step, so that without these a method with gates is
        final only at the end of the run, or at any time in a run without end.

        Args:
            step: Optimizer steps taken.
            total: Optimizer steps of the whole run, None when the Trainer has no end.
            at_end: Whether the run has come to its end, or to the last of several stages of thresholds.
        """
        if self.gated and not at_end:
            return False
        return self.settled_after(step + 1 if total is None else total) <= step

    def goal(self, adapters: Sequence[LowRankAdapter]) -> str | None:  # noqa: ARG002
        """A sentence on what the method will leave of the adapters, where that is known before training, or None."""
        return None

    def shortfall(self, adapters: Sequence[LowRankAdapter]) -> str | None:  # noqa: ARG002
        """At the end of a run: a sentence that says that nothing was pruned and what to change, or None."""
        return None

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.init_args().items())
        return f"{type(self).__name__}({arguments})"


def names_layer(pattern: str, name: str, known: NamePatterns) -> bool:
    """Whether a key of ``overrides`` means the layer of this full name."""
    return matches_tail(name, pattern) or known.matches(pattern, name)
