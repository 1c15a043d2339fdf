"""Base of the strategies that shard the frozen backbone and replicate everything trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, distributed, nn
from torch.optim import Optimizer
from torchmetrics import Metric

from lit_sparse.adapters.frozen import frozen_sample, require_match
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.naming import clean_name
from lit_sparse.adapters.processes import is_distributed
from lit_sparse.adapters.quantized import is_four_bit, quantized_layers
from lit_sparse.errors import UsageError
from lit_sparse.strategies.replicas import average_gradients, broadcast_from_first


class ReplicatedAdapters(ParallelStrategy):
    """Mix-in for a sharding strategy: every process holds everything trained, and keeps it equal.

    Adapters are small, and methods choose and zero whole rows and columns. FSDP ignores these parameters, so this class
    synchronizes them: they start as those of process 0, and their gradients are averaged in one flat collective before
    each optimizer step, before they are observed and clipped. Checkpoints are ordinary files of the trained parameters,
    written once. Any strategy with any number of processes can resume from them.
    """

    shards_four_bits = False
    """Whether weights that bitsandbytes packed to 4 bits can be sharded."""

    # Weights and optimizer are restored as in a single process, before anything is sharded.
    restore_checkpoint_after_setup = False
    lightning_restore_optimizer = True
    save_checkpoint = Strategy.save_checkpoint
    load_checkpoint = Strategy.load_checkpoint
    optimizer_state = Strategy.optimizer_state
    load_optimizer_state_dict = Strategy.load_optimizer_state_dict

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Take a step, with gradients averaged right after the backward pass."""
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

        def averaged() -> Any:
            result = closure()
            average_gradients(parameters)
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Trained parameters and buffers, under the names that they have in a single process."""
        module = self._module()
        state = {name: parameter.detach() for name, parameter in module.named_parameters() if parameter.requires_grad}
        for prefix, part in module.named_modules():
            for name, buffer in part.named_buffers(recurse=False):
                if name not in part._non_persistent_buffers_set:
                    state[f"{prefix}.{name}" if prefix else name] = buffer
        return {clean_name(name): value for name, value in state.items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load trained parameters; frozen weights may be absent.

        Raises:
            UsageError: If ``strict`` and other entries are missing or unknown.
        """
        module = self._module()
        keys = module.load_state_dict(checkpoint["state_dict"], strict=False)
        if strict:
            require_match(module, keys, f"The checkpoint does not fit {type(module).__name__}")

    def _module(self) -> LightningModule:
        module = self.lightning_module
        if module is None:
            raise RuntimeError("The strategy is not connected to a module.")
        return module

    def _require_shardable(self, module: nn.Module) -> None:
        """Check that the module can be sharded, and that the processes hold the same frozen weights."""
        name = type(self).__name__
        packed = [n for n, layer in quantized_layers(module) if not (self.shards_four_bits and is_four_bit(layer))]
        if packed:
            raise UsageError(
                f"{name} cannot shard quantized weights such as those of {packed[0]!r}. Use bitsandbytes' 4 bits "
                "(load_in_4bit) and strategy fsdp2, strategy ddp, or a bfloat16 backbone."
            )
        if not any(True for _ in adapters_in(module)):
            raise UsageError(
                f"{name} needs adapters, but {type(module).__name__} has none. Call lit_sparse.inject in __init__ or "
                "configure_model, or use Lightning's strategy."
            )
        if is_distributed():
            digest = _digest(frozen_sample(module))
            digests: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(digests, digest)
            if len(set(digests)) > 1:
                raise UsageError(
                    "The processes hold different frozen weights, because some were initialized at random. Call "
                    "seed_everything with one seed, or load the backbone from a folder."
                )

    def _replicate(self, module: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        """Move trained parameters to the device, and copy those of process 0 to all processes."""
        for parameter in trained:
            parameter.data = parameter.data.to(self.root_device)
        for metric in module.modules():
            if isinstance(metric, Metric):
                metric.to(self.root_device)
        adapters = [adapter for _, adapter in adapters_in(module)]
        buffers = [buffer for adapter in adapters for buffer in adapter.buffers(recurse=False)]
        broadcast_from_first([*(parameter.data for parameter in trained), *buffers])


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Every parameter with ``requires_grad``, once, in the model's order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _digest(sample: Tensor | None) -> str:
    if sample is None:
        return ""
    return hashlib.sha256(sample.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
