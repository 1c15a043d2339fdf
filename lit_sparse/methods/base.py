"""What every sparse method answers, and what it is told about the run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from lit_sparse.adapters.linear import FrozenLinear, LowRankLinear
from lit_sparse.errors import UsageError


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
            parts such as ``["query", "value"]``; or one regular expression over full names.
        rank: Ranks r of every adapter; methods that prune ranks only ever remove from these.
        alpha: Numerator of the scale alpha / rank of the adapter's output.
        dropout: Probability of zeroing an entry of the adapter's input in training.
        layers: Numbers of the transformer blocks to adapt; None: all.
        exclude_modules: Layers to leave out: a list of trailing name parts or a regular expression.
        train_head: Train the task head (classifier, score …), found by structure; or the names of the
            modules to train whole.

    Raises:
        UsageError: If an argument is outside its range or ``target_modules`` is empty.
    """

    gated: ClassVar[bool] = False
    """Whether the adapters of this method have gates."""

    def __init__(
        self,
        target_modules: str | list[str],
        rank: int,
        alpha: float,
        dropout: float,
        layers: list[int] | None,
        exclude_modules: str | list[str] | None,
        train_head: bool | list[str],
    ) -> None:
        if not target_modules:
            raise UsageError(f"target_modules is {target_modules!r}: name at least one layer, or give 'all-linear'.")
        if rank < 1:
            raise UsageError(f"rank must be at least 1; got {rank}.")
        if not alpha > 0:
            raise UsageError(f"alpha must be positive, or the adapter would do nothing; got {alpha}.")
        if not 0 <= dropout < 1:
            raise UsageError(f"dropout must be in [0, 1); got {dropout}.")
        self.target_modules = target_modules
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.layers = layers
        self.exclude_modules = exclude_modules
        self.train_head = train_head

    def adapt(self, base: FrozenLinear) -> LowRankLinear:
        """Wrap one frozen layer."""
        return LowRankLinear(base, self.rank, self.scale * self.rank, self.dropout, self.gated)

    @property
    def scale(self) -> float:
        """What the product BA is multiplied by: alpha / rank."""
        return self.alpha / self.rank

    def parameter_groups(self, adapters: Sequence[LowRankLinear]) -> list[dict[str, Any]]:  # noqa: ARG002
        """Optimizer groups of the parameters that need options of their own; the rest is trained as usual."""
        return []

    def mismatch(self, adapter: LowRankLinear) -> str | None:
        """Why ``adapter`` cannot be one of this method's, or None."""
        if (adapter.gate is not None) != self.gated:
            return f"{'no gate' if self.gated else 'a gate'}"
        if adapter.rank > self.rank or abs(adapter.scale - self.scale) > 1e-9 * self.scale:
            return f"rank {adapter.rank} and scale {adapter.scale:g}, not {self.rank} and {self.scale:g}"
        return None

    def check(self, adapters: Sequence[LowRankLinear], run: Run) -> list[str]:  # noqa: ARG002
        """Called once, before the first step: raise for what cannot work.

        Returns:
            Warnings, a sentence or two each, of what will not do what the user wants.
        """
        return []

    def before_step(self, adapters: Sequence[LowRankLinear], step: Step) -> Any:  # noqa: ARG002
        """Called when gradients are final, but not clipped, and weights are those that produced them.

        Returns:
            Whatever :meth:`after_step` needs of it. It must change nothing but gradients: a gradient scaler
            may still skip the step, and then :meth:`after_step` is not called.
        """
        return None

    def after_step(self, adapters: Sequence[LowRankLinear], step: Step, observed: Any) -> None:
        """Called after the optimizer changed the weights: zero what is to be zero, in place."""

    def shortfall(self, adapters: Sequence[LowRankLinear]) -> str | None:  # noqa: ARG002
        """At the end of a run: a sentence that says that nothing was pruned and what to change, or None."""
        return None

    def init_args(self) -> dict[str, Any]:
        """The constructor arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.init_args().items())
        return f"{type(self).__name__}({arguments})"
