"""The start of a run of the Trainer from its own training batches: of A and B, or a mask of SHiRA's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.callbacks.support import callbacks_of
from lit_sparse.errors import UsageError
from lit_sparse.methods.method import Method
from lit_sparse.methods.start import start_from_batches
from lit_sparse.strategies.sharded import ReplicatedAdapters


def start_run(trainer: Trainer, module: LightningModule, method: Method) -> None:
    """Start new adapters from the first batches of ``training_step``, if the method says so.

    Adapters of a resumed run have started. Call it when the strategy is set up, before the first step.

    Raises:
        UsageError: For gradients under FSDP, which shards the weights, with weight averaging, which copied the former
            adapters, with manual optimization, or as :func:`~lit_sparse.start_from_batches`.
    """
    if method.batch_start is None:
        return
    strategy = trainer.strategy
    if isinstance(strategy, ReplicatedAdapters) and method.starts_from_gradients:
        raise UsageError(
            f"{method.batch_start} needs the gradients of whole weights, which FSDP shards. Use a single device or "
            "ddp, or another start."
        )
    if method.has_started([adapter for _, adapter in adapters_in(module)]):
        return
    if not module.automatic_optimization:
        raise UsageError(
            f"{method.batch_start} takes the loss from training_step, which here steps the optimizer itself: call "
            "lit_sparse.start_from_batches(model, method, batches) in configure_model."
        )
    for averaging in callbacks_of(trainer, WeightAveraging):
        raise UsageError(
            f"{type(averaging).__name__} has copied the adapters before {method.batch_start} starts them. "
            "Remove it, or choose another start."
        )
    with _silent(module):
        start_from_batches(module, method, _batches(trainer), lambda batch: _loss(trainer, module, *batch))
    iter(trainer.fit_loop._data_fetcher)  # type: ignore[arg-type]  # the first epoch begins at its first batch again
    if isinstance(strategy, DDPStrategy):  # its buckets have the sizes of the former ranks
        strategy.model = strategy._setup_model(module)
        strategy._register_ddp_hooks()


def _batches(trainer: Trainer) -> Iterator[tuple[Any, int]]:
    trainer.fit_loop.setup_data()
    for batch, index, _ in trainer.fit_loop._combined_loader or ():
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch)), index


def _loss(trainer: Trainer, module: LightningModule, batch: Any, index: int) -> Tensor:
    # Half-precision gradients would need a scaled loss.
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    with nullcontext() if scaled else trainer.precision_plugin.train_step_context():
        sharded = isinstance(trainer.strategy, ReplicatedAdapters)  # whose wrapper of the module gathers weights
        found: Any = (trainer.strategy if sharded else module).training_step(batch, index)
    return found["loss"] if isinstance(found, dict) else found  # type: ignore[no-any-return]


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let the module log nothing, as Lightning keeps no results before training."""
    vars(module).update(log=lambda *_, **__: None, log_dict=lambda *_, **__: None)
    try:
        yield
    finally:
        del vars(module)["log"], vars(module)["log_dict"]
