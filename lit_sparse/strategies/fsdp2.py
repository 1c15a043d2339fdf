"""FSDP2 with replicated adapters, whose shards are read directly from the weight files."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lit_sparse.adapters.quantized import make_shardable, quantized_layers
from lit_sparse.strategies.blocks import transformer_blocks
from lit_sparse.strategies.sharded import ReplicatedAdapters, trained_parameters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class SparseFSDP2Strategy(ReplicatedAdapters, ModelParallelStrategy):
    """FSDP2 (``fully_shard``) for the frozen backbone, with everything trained replicated.

    For a :class:`~lit_sparse.SparseModule`, ``strategy: fsdp2`` in a YAML file means this strategy. Runs equal those
    under DDP: weights are gathered in their stored dtype, and mixed precision is autocast alone.

    ``from_pretrained`` in the dtype of the files only maps the weights into memory. Every process then copies, block by
    block, the rows that it keeps.

    Args:
        auto_wrap: Class names of the blocks, such as ``[LlamaDecoderLayer]``; None: found from the model. The weights
            of a block are gathered and freed together.
        cpu_offload: Keep the shards in host memory while they are not in use.
        process_group_backend: ``nccl``, ``gloo`` …; None: the device's.
        timeout: How long a process waits for the others in a collective.

    Raises:
        UsageError: At set-up, if the module has no adapters, its backbone is quantized otherwise than by bitsandbytes
            to 4 bits, the blocks are not found, or the processes hold different frozen weights.
    """

    shards_four_bits = True

    def __init__(
        self,
        auto_wrap: list[str] | None = None,
        cpu_offload: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)
        self.auto_wrap = auto_wrap
        self.cpu_offload = cpu_offload

    def setup_environment(self) -> None:
        """Make one group of all processes, which divide data and backbone among them."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, then make the optimizers."""
        if self.accelerator is None or self.model is None:
            raise RuntimeError("The strategy is not connected to an accelerator and a module.")
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        module = self._module()
        if not any(isinstance(part, FSDPModule) for part in module.modules()):
            self._shard(module)
        self.barrier()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    def _shard(self, module: nn.Module) -> None:
        self._require_shardable(module)
        trained = trained_parameters(module)
        policy, device = OffloadPolicy(), self.root_device
        if self.cpu_offload:
            policy, device = CPUOffloadPolicy(pin_memory=device.type == "cuda"), torch.device("cpu")
        for _, layer in quantized_layers(module):
            make_shardable(layer, self.root_device)
        mesh = self.device_mesh["data_parallel"]
        options: dict[str, Any] = {"mesh": mesh, "ignored_params": set(trained), "offload_policy": policy}
        for unit in [*transformer_blocks(module, self.auto_wrap), *_roots(module)]:
            _shard_from_memory(unit, device, options)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.root_device)
        self._replicate(module, trained)


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with a forward pass, during which their weights outside of blocks are gathered."""
    # Not the LightningModule itself: its steps are called instead of its forward.
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _roots(child)
        elif any(not parameter.requires_grad for parameter in child.parameters()):
            yield child


def _shard_from_memory(unit: nn.Module, device: torch.device, options: dict[str, Any]) -> None:
    """Shard the frozen parameters of ``unit`` that are not sharded yet, reading only the rows to keep."""
    whole: dict[nn.Parameter, Tensor] = {}
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for part in unit.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter not in empty:  # tied parameters stay tied
                    empty[parameter] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
                    whole[empty[parameter]] = parameter.detach()
                part._parameters[name] = empty[parameter]
    places = {
        id(parameter): (part, name)
        for part in unit.modules()
        for name, parameter in part._parameters.items()
        if parameter in whole
    }
    fully_shard(unit, **options)
    unit._apply(lambda tensor: torch.empty_like(tensor, device=device) if _is_empty(tensor) else tensor)
    for parameter, values in whole.items():
        part, name = places[id(parameter)]
        shard = part._parameters[name]
        if isinstance(shard, DTensor):
            _cut(values, shard)


def _is_empty(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor) and tensor.is_meta


@torch.no_grad()
def _cut(values: Tensor, shard: DTensor) -> None:
    """Copy the rows that this process keeps, divided as by ``torch.chunk``: the last processes may have fewer."""
    mesh = shard.device_mesh
    rows = -(-values.shape[0] // mesh.size())
    first = min(rows * mesh.get_local_rank(), values.shape[0])
    shard.to_local().copy_(values[first : first + rows])
