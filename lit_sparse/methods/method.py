"""The base of all methods, of whatever kind their adapters are."""

from __future__ import annotations

import copy
import inspect
from abc import ABC
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter
from lit_sparse.adapters.layers import Layer
from lit_sparse.adapters.patterns import NamePatterns, matches_tail
from lit_sparse.errors import UsageError
from lit_sparse.methods.step import Run, Step

Overrides = dict[str, dict[str, int | float]]


@dataclass(eq=False, repr=False)
class Method(ABC):  # with a plain class as its base, jsonargparse takes sub-classes of a dataclass
    """A way to adapt a frozen model, and to keep the change sparse while it trains.

    Methods with low-rank adapters are sub-classes of :class:`~lit_sparse.SparseMethod`. Those that change single
    entries of the weights (:class:`~lit_sparse.SHiRA`) make adapters of the class :class:`~lit_sparse.DeltaLinear`.

    A method is a sub-class in one file, as a rule a dataclass: its fields are the arguments that it adds, and the
    command line shows those of its bases with their help. It changes adapters around each optimizer step, in
    :meth:`before_step` and :meth:`after_step`, or adds a :meth:`penalty` to the loss. State that must survive a
    checkpoint belongs into parameters and buffers of the adapters. A method with a constructor of its own keeps every
    argument under its name, so that checkpoints can say how the method was made.

    Args:
        target_modules: ``"all-linear"``: every linear layer but the task head; a list of whole trailing name
            parts such as ``["query", "value"]``; or one regular expression over full names. Convolutions and embeddings
            are adapted when they are named.
        layers: Numbers of the transformer blocks to adapt, or one number; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.
        overrides: Settings for some layers, such as ``{"attention.output.dense": {"rank": 16}}``. Keys are trailing
            name parts or regular expressions; values replace the arguments in :attr:`overridable`. The first key
            that matches a layer holds for it.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.
    """

    gated: ClassVar[bool] = False
    """Whether the adapters of this method have gates."""

    overridable: ClassVar[tuple[str, ...]] = ()
    """Arguments that ``overrides`` may set for some layers."""

    init_weights = "lora"
    start_batches = 0

    target_modules: str | list[str] = "all-linear"
    _: KW_ONLY
    layers: int | list[int] | None = None
    exclude_modules: str | list[str] | None = None
    train_head: bool | list[str] = True
    overrides: Overrides | None = None

    def __post_init__(self) -> None:
        """Check the arguments; a sub-class checks its own after these."""
        if not self.target_modules:
            raise UsageError(
                f"target_modules is {self.target_modules!r}: name at least one layer, or give 'all-linear'."
            )
        for pattern, values in (self.overrides or {}).items():
            # None is an argument that is not in use, but for alpha: there, it is the rank.
            unused = {name for name in values if name != "alpha" and getattr(self, name, 0) is None}
            unknown = [name for name in values if name not in self.overridable or name in unused]
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

    @property
    def batch_start(self) -> str | None:
        """The argument, in words, by which :meth:`start` chooses something of the adapters before training, or None."""
        return None

    @property
    def starts_from_gradients(self) -> bool:
        """Whether this start takes gradients of whole weights, which FSDP shards; else forward passes alone."""
        return self.batch_start is not None

    @property
    def moves_entries(self) -> bool:
        """Whether parameters of the adapters stand for other entries after some steps, and so have no average."""
        return False

    def has_started(self, adapters: Sequence[Any]) -> bool:  # noqa: ARG002
        """Whether :meth:`start` was called, in this run or the one of a checkpoint; waits for the device."""
        return True

    def start(
        self, model: nn.Module, adapters: Mapping[str, Any], batches: Iterable[Any], loss: Callable[[Any], Tensor]
    ) -> dict[str, int]:
        """Choose something of new adapters by batches; see :func:`~lit_sparse.start_from_batches`.

        Args:
            model: Model with the adapters.
            adapters: By full layer name.
            batches: The first ones of this process, ``start_batches`` at most.
            loss: The loss of a batch.

        Returns:
            Full layer name to the size that was given to the adapter: ranks, or entries.
        """
        raise NotImplementedError(f"{type(self).__name__} has no start from batches.")

    def settings(self, layers: Mapping[str, Layer]) -> dict[str, dict[str, float]]:
        """What ``overrides`` sets for each layer; changes none.

        Args:
            layers: Full name to layer of all that are adapted.

        Raises:
            UsageError: If a pattern matches none of them, or a layer cannot be adapted by this method.
        """
        patterns = self.overrides or {}
        known = NamePatterns("overrides")
        idle = [p for p in patterns if not any(names_layer(p, name, known) for name in layers)]
        if idle:
            leaves = sorted({name.rpartition(".")[2] for name in layers})
            raise UsageError(f"overrides {idle} match none of the {len(layers)} adapted layers, which end in {leaves}.")
        return {
            name: next((dict(v) for p, v in patterns.items() if names_layer(p, name, known)), {}) for name in layers
        }

    def adapt(self, layer: Layer, overrides: Mapping[str, float] = MappingProxyType({})) -> Adapter:
        """Wrap one frozen layer.

        Args:
            layer: The layer.
            overrides: Arguments that this layer has in place of the method's.
        """
        raise NotImplementedError

    def penalty(self, adapters: Sequence[Any]) -> Tensor | None:  # noqa: ARG002
        """What the method adds to the loss, or None.

        Its gradient is added to that of the loss once per optimizer step, before gradients are clipped. The loss that
        is logged is without it. For a gradient in closed form, :meth:`before_step` is cheaper.

        Args:
            adapters: All of the model's.

        Returns:
            A scalar, differentiable with respect to parameters of the adapters.
        """
        return None

    def parameter_groups(self, adapters: Sequence[Any]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Optimizer groups of the parameters that need options of their own; the rest is trained as usual."""
        return []

    @property
    def changes_weights(self) -> bool:
        """Whether the frozen weights give up what A and B start from."""
        return self.init_weights in ("pissa", "lora_ga")

    def mismatch(self, adapter: Any) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        raise NotImplementedError

    def check(self, adapters: Sequence[Any], run: Run) -> list[str]:  # noqa: ARG002
        """Called once, before the first step: raise for settings that cannot work.

        Returns:
            Warnings, a sentence or two each, about settings that will hardly do what the user wants.
        """
        return []

    def prepare(self, adapters: Sequence[Any], step: Step) -> None:  # noqa: B027
        """Called before the first step of a run or of its rest, and again if a loop of your own loads a checkpoint.

        Args:
            adapters: All of the model's. A checkpoint may still be loaded into them.
            step: The next one.
        """

    def before_step(self, adapters: Sequence[Any], step: Step) -> Any:  # noqa: ARG002
        """Called when gradients are final, but not clipped, and weights are those that produced them.

        Returns:
            Whatever :meth:`after_step` needs. It must change nothing but gradients: a gradient scaler
            may still skip the step, and then :meth:`after_step` is not called.
        """
        return None

    def after_step(self, adapters: Sequence[Any], step: Step, observed: Any) -> None:  # noqa: B027
        """Called after the optimizer changed the weights: zero what is to be zero, in place."""

    def release(self, adapters: Sequence[Any]) -> None:  # noqa: B027
        """Called when the optimizer is no longer followed, however the run ends."""

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

    def goal(self, adapters: Sequence[Any]) -> str | None:  # noqa: ARG002
        """A sentence on what the method will leave of the adapters, where that is known before training, or None."""
        return None

    def shortfall(self, adapters: Sequence[Any]) -> str | None:  # noqa: ARG002
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
