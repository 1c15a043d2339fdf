"""FSDP1 around adapters."""

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
    """Lightning's ``FSDPStrategy`` (FSDP1) with the frozen backbone sharded and everything trained replicated.

    In a YAML ``strategy: fsdp`` means this one where the module is a :class:`~lit_sparse.SparseModule`. Runs are the
    same as under DDP: weights are gathered in the dtype in which they are stored, and mixed precision is autocast's
    alone. Gradient clipping works. On CPUs it works too, which Lightning's does not.

    Args:
        auto_wrap: Class names of the blocks that are sharded as one, such as ``[LlamaDecoderLayer]``; None: found from
            the model.
        cpu_offload: Keep the shards in host memory between their uses.
        sharding_strategy: ``FULL_SHARD``; ``SHARD_GRAD_OP``: keep weights gathered between forward and backward pass;
            ``HYBRID_SHARD``: shard within a node and replicate over nodes.
        process_group_backend: ``nccl``, ``gloo`` …; None: the device's.
        timeout: How long a process waits for the others in a collective.

    Raises:
        UsageError: At set-up, if the module has no adapters, its backbone is quantized or has no blocks as described,
            or the processes hold different frozen weights; if ``cpu_offload`` is given on CPUs.
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
        """None: FSDP would compute embeddings and norms in half precision as well, which autocast does not."""
        return

    @property
    def precision_plugin(self) -> FSDPPrecision:
        """FSDP's, but for clipping."""
        plugin = self._precision_plugin
        return plugin if isinstance(plugin, FSDPPrecision) else _ReplicatedPrecision("32-true")

    @precision_plugin.setter
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        if type(precision_plugin) is FSDPPrecision:
            precision_plugin = _ReplicatedPrecision(precision_plugin.precision)  # type: ignore[arg-type]
        FSDPStrategy.precision_plugin.fset(self, precision_plugin)  # type: ignore[attr-defined]

    def _setup_model(self, model: nn.Module) -> nn.Module:
        if self._sharded is not None and self._sharded.module is model:
            return self._sharded  # fit, then test
        self._require_shardable(model)
        if self.root_device.type == "cpu" and self.cpu_offload.offload_params:
            raise UsageError("cpu_offload keeps shards in host memory, where on CPUs they are anyway: leave it out.")
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
    """Clips by the norm of what this process holds, which is all that is trained."""

    clip_grad_by_norm = Precision.clip_grad_by_norm

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Leave weights as they were loaded unless half precision is asked for, as under DDP; FSDP's would widen."""
        return module if self.precision == "32-true" else super().convert_module(module)
