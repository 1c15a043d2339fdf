"""FSDP2 around adapters, its shards cut straight out of the files of the weights."""

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

from lit_sparse.strategies.blocks import transformer_blocks
from lit_sparse.strategies.sharded import ReplicatedAdapters, trained_parameters

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class SparseFSDP2Strategy(ReplicatedAdapters, ModelParallelStrategy):
    """FSDP2 (``fully_shard``) for the frozen backbone, with everything trained replicated.

    In a YAML ``strategy: fsdp2`` means this one where the module is a :class:`~lit_sparse.SparseModule`. Runs are the
    same as under DDP: weights are gathered in the dtype in which they are stored, and mixed precision is autocast's.

    A backbone that ``from_pretrained`` read in the dtype of its files lies mapped in host memory, not read: every
    process copies out of it, block by block, only the rows that it keeps.

    Args:
        auto_wrap: Class names of the blocks that are sharded as one, such as ``[LlamaDecoderLayer]``; None: found from
            the model.
        cpu_offload: Keep the shards in host memory between their uses.
        process_group_backend: ``nccl``, ``gloo`` …; None: the device's.
        timeout: How long a process waits for the others in a collective.

    Raises:
        UsageError: At set-up, if the module has no adapters, its backbone is quantized or has no blocks as described,
            or the processes hold different frozen weights.
    """

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
        """Make one group of all processes, which share the data and the backbone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """Shard the module, then make its optimizers."""
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
        options: dict[str, Any] = {
            "mesh": self.device_mesh["data_parallel"],
            "ignored_params": set(trained),
            "offload_policy": CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        }
        device = torch.device("cpu") if self.cpu_offload else self.root_device
        for unit in [*transformer_blocks(module, self.auto_wrap), *_roots(module)]:
            _shard_from_memory(unit, device, options)
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                part._buffers[name] = buffer.to(self.root_device)
        self._replicate(module, trained)


def _roots(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost parts that are called: what of them is in no block is gathered while they run."""
    # Not the LightningModule itself: its steps are called, its forward is not.
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _roots(child)
        elif any(not parameter.requires_grad for parameter in child.parameters()):
            yield child


def _shard_from_memory(unit: nn.Module, device: torch.device, options: dict[str, Any]) -> None:
    """Shard the frozen parameters of ``unit`` that are not yet, reading of each only what this process keeps."""
    whole: dict[nn.Parameter, Tensor] = {}
    empty: dict[nn.Parameter, nn.Parameter] = {}
    for part in unit.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and not parameter.requires_grad and not isinstance(parameter, DTensor):
                if parameter not in empty:  # a tied one is one
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
    """Copy the rows that this process keeps: as many as others, the last ones fewer, as ``torch.chunk`` would."""
    mesh = shard.device_mesh
    rows = -(-values.shape[0] // mesh.size())
    first = min(rows * mesh.get_local_rank(), values.shape[0])
    shard.to_local().copy_(values[first : first + rows])
