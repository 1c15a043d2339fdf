"""Keep replicated parameters equal in all processes, with one collective per dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, distributed, nn

from lit_sparse.adapters.processes import is_distributed


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its mean over all processes, in one flat collective.

    A process without a gradient for a parameter counts as zero, as under DDP with ``find_unused_parameters``. A
    parameter without a gradient in all processes keeps None.

    Args:
        parameters: The same parameters in the same order in every process.
    """
    if not is_distributed():
        return
    for group in _alike(parameters):
        gradients = [p.grad for p in group]
        present = [gradient is not None for gradient in gradients]
        pieces = [torch.zeros_like(p) if g is None else g for p, g in zip(group, gradients, strict=True)]
        # The collective also tells which parameters have a gradient; only a process that lacks one reads that.
        taking_part = group[0].new_ones(len(group)) if all(present) else group[0].new_tensor(present)
        flat = torch.cat([*(piece.flatten() for piece in pieces), taking_part])
        distributed.all_reduce(flat)
        *means, took_part = (flat / distributed.get_world_size()).split([*(p.numel() for p in group), len(group)])
        torch._foreach_copy_(pieces, [mean.view_as(p) for mean, p in zip(means, group, strict=True)])
        if not all(present):
            for parameter, piece, anywhere in zip(group, pieces, took_part.tolist(), strict=True):
                if parameter.grad is None and anywhere:
                    parameter.grad = piece


@torch.no_grad()
def broadcast_from_first(tensors: Sequence[Tensor]) -> None:
    """Overwrite each tensor in place with that of process 0."""
    if not is_distributed():
        return
    for group in _alike(tensors):
        flat = torch.cat([tensor.flatten() for tensor in group])
        distributed.broadcast(flat, src=0)
        pieces = flat.split([tensor.numel() for tensor in group])
        for tensor, piece in zip(group, pieces, strict=True):
            tensor.copy_(piece.view_as(tensor))


def _alike(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors by dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    yield from groups.values()
