"""The mean gradient of frozen weights over some batches of all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_sparse.adapters.injection import disable_adapters
from lit_sparse.adapters.processes import together
from lit_sparse.errors import UsageError


def mean_gradients(
    model: nn.Module,
    weights: Sequence[Tensor],
    batches: Iterable[Any],
    loss: Callable[[Any], Tensor],
    needed_by: str,
) -> dict[Tensor, Tensor]:
    """The mean gradient of each weight over the batches of all processes, float32 in main memory.

    Args:
        model: Model with adapters, which are switched off.
        weights: Frozen weights, in the same order in all processes.
        batches: Those of this process.
        loss: The loss of a batch.
        needed_by: The setting that needs the gradients, for errors.

    Raises:
        UsageError: If there is no batch, or gradients are not finite or all zero.
    """
    weights = list(dict.fromkeys(weights))
    sums = {weight: torch.zeros(weight.shape) for weight in weights}
    count = torch.zeros(1)

    def collect(weight: Tensor) -> None:
        sums[weight] += weight.grad.cpu()  # type: ignore[union-attr]
        weight.grad = None

    hooks = [weight.requires_grad_(True).register_post_accumulate_grad_hook(collect) for weight in weights]
    try:
        with torch.enable_grad(), disable_adapters(model, head=False):
            for batch in batches:
                loss(batch).backward()
                count += 1
    finally:
        for hook, weight in zip(hooks, weights, strict=True):
            hook.remove()
            weight.requires_grad_(False)
        model.zero_grad()  # of the head
    device = weights[0].device
    counts = together(count, device, dist.all_reduce)
    if not counts:
        raise UsageError(f"There are no training batches to start from: {needed_by} needs at least one.")
    gradients = {weight: together(total, device, dist.all_reduce) / counts for weight, total in sums.items()}
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    if not finite or not any(bool(gradient.any()) for gradient in gradients.values()):
        raise UsageError(
            f"The gradients of the frozen weights are not finite, or all are zero: {needed_by} cannot start from them. "
            "Check the loss on the first training batches."
        )
    return gradients
