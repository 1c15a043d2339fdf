"""The callbacks that a module brings to its Trainer."""

from __future__ import annotations

from lightning.pytorch import Callback, LightningModule

from lit_sparse.callbacks.finite_loss import FiniteLoss
from lit_sparse.callbacks.monitor import SparsityMonitor
from lit_sparse.callbacks.preflight import Preflight
from lit_sparse.callbacks.requeue import SlurmRequeue
from lit_sparse.callbacks.resume import ExactResume
from lit_sparse.callbacks.sparsify import Sparsify
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError


class OwnSparsify(Sparsify):
    """The Sparsify of a module: the Trainer replaces it, by its type, when it is given another module."""

    @property
    def state_key(self) -> str:
        """The key that any Sparsify has in checkpoints."""
        return Sparsify.__qualname__


def own_callbacks(module: LightningModule, sparsify: OwnSparsify) -> list[Callback]:
    """The callbacks of a module, without those that its Trainer has already.

    Raises:
        UsageError: If the Trainer has a Sparsify.
    """
    if any(not isinstance(callback, OwnSparsify) for callback in callbacks_of(module.trainer, Sparsify)):
        raise UsageError(
            f"{type(module).__name__} brings its own Sparsify; the Trainer has a second one. Remove it from the "
            "Trainer's callbacks."
        )
    kinds: tuple[type[Callback], ...] = (SparsityMonitor, FiniteLoss, ExactResume, SlurmRequeue, Preflight)
    return [sparsify, *(kind() for kind in kinds if not callbacks_of(module.trainer, kind))]
