"""FSDP1 with replicated adapters."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import Literal

from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.plugins.precision.fsdp import FSDPPrecision
from lightning.pytorch.strategies import FSDPStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import lambda_auto_wrap_policy

from lit_sparse.errors import UsageError
from lit_sparse.strategies.blocks import transformer_blocks
from lit_sparse.strategies.sharded import ReplicatedAdapters, trained_parameters


class SparseFSDPStrategy(ReplicatedAdapters, FSDPStrategy):
    """Lightning's ``FSDPStrategy`` (FSDP1), which shards the frozen backbone and replicates everything trained.

    For a :class:`~lit_sparse.SparseModule`, ``strategy: fsdp`` in a YAML file means this strategy. Runs equal those
    under DDP: weights are gathered in their stored dtype, and mixed precision is autocast alone. Unlike Lightning's
    strategy it supports gradient clipping, and CPUs.

    Args:
        auto_wrap: Class names of the blocks, such as ``[LlamaDecoderLayer]``; None: found from the model. The weights
            of a block are gathered and freed together.
        cpu_offload: Keep the shards in host memory while they are not in use.
        sharding_strategy: ``FULL_SHARD``; ``SHARD_GRAD_OP``: keep weights gathered between forward and backward pass;
            ``HYBRID_SHARD``: shard within a node and replicate over nodes.
        process_group_backend: ``nccl``, ``gloo`` …; None: the device's.
        timeout: How long a process waits for the others in a collective.

    Raises:
        UsageError: At set-up, if the module has no adapters, its backbone is quantized or the blocks are not found, if
            the processes hold different frozen weights, or if ``cpu_offload`` is set on CPUs.
    """

    def __init__(
        self,
        auto_wrap: list[str] | None = None,
        cpu_offload: bool = False,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD"] = "FULL_SHARD",
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            cpu_offload=cpu_offload,
            sharding_strategy=sharding_strategy,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.auto_wrap = auto_wrap
        self._sharded: FullyShardedDataParallel | None = None

    @property
    def mixed_precision_config(self) -> None:
        """None: FSDP would compute embeddings and norms in half precision too, unlike autocast."""
        return

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """FSDP's plugin, with another way to clip gradients."""
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, FSDPPrecision) else _ReplicatedPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if type(precision_plugin) is FSDPPrecision:
            precision_plugin = _ReplicatedPrecision(precision_plugin.precision)  # type: ignore[arg-type]
        FSDPStrategy.precision_plugin.fset(self, precision_plugin)  # type: ignore[attr-defined]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._sharded is not None and self._sharded.module is model:
            return self._sharded  # it was sharded for fit, and is now tested
        self._require_shardable(model)
        if self.root_device.type == "cpu" and self.cpu_offload.offload_params:
            raise UsageError("On CPUs the shards are in host memory already: remove cpu_offload.")
        trained = trained_parameters(model)
        blocks = set(transformer_blocks(model, self.auto_wrap))
        self._sharded = FullyShardedDataParallel(
            model,
            auto_wrap_policy=partial(lambda_auto_wrap_policy, lambda_fn=blocks.__contains__),
            ignored_states=trained,
            device_id=self.root_device,
            cpu_offload=self.cpu_offload,
            sharding_strategy=self.sharding_strategy,
            use_orig_params=True,
        )
        self._replicate(model, trained)
        return self._sharded


class _ReplicatedPrecision(FSDPPrecision):
    """Clip by the norm of this process's gradients: every process holds all that is trained."""

    clip_grad_by_norm = Precision.clip_grad_by_norm

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Keep the dtype of loaded weights under 32-true, as DDP does; FSDP's plugin would make them float32."""
        return module if self.precision == "32-true" else super().convert_module(module)
