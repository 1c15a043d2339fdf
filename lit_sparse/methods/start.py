"""What A and B start from: chance, the frozen weight, or its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import replace_values
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.injection import adapters_in, disable_adapters
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import allotted_ranks, compressed_gradient, gradient_factors
from lit_sparse.methods.base import InitWeights, SparseMethod
from lit_sparse.methods.method import Method
from lit_sparse.methods.step import Run


@dataclass(eq=False, repr=False, kw_only=True)
class Start(SparseMethod):
    """Methods with a choice of how A and B start.

    Args:
        init_weights: ``lora``: A random and B zero. ``pissa``: A and B take the largest singular values out of the
            frozen weight (Meng et al. 2024, arXiv:2404.02948), and only the rest of it stays frozen. ``gora``: ranks
            and B come from gradients of the first training batches (:func:`~lit_sparse.start_from_gradients`).
            ``lora_ga``: A and B are singular vectors of these gradients, and the frozen weight gives up scale · BA.
            With gates, gate_init must be ``ones``. A rank of ``pissa`` or ``lora_ga`` whose gate reaches zero is lost
            to the model.
        gora_batches: Batches, of each process, whose gradients are averaged; for ``lora_ga`` too.
        gora_gamma: γ, the size of GoRA's start: scale · BA has about γ times the norm of the gradient.
        lora_ga_gamma: γ of LoRA-GA, the paper's 16: A and B are singular vectors times ⁴√out_features / √γ.
    """

    init_weights: InitWeights = "lora"
    gora_batches: int = 64
    gora_gamma: float = 0.05
    lora_ga_gamma: float = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("gora_batches", self.gora_batches, at_least=1)
        require_range("gora_gamma", self.gora_gamma, above=0)
        require_range("lora_ga_gamma", self.lora_ga_gamma, above=0)

    @property
    def gradient_start(self) -> str | None:
        """GoRA and LoRA-GA take gradients."""
        return f"init_weights {self.init_weights!r}" if self.init_weights in ("gora", "lora_ga") else None

    @property
    def start_batches(self) -> int:
        """Batches for GoRA and LoRA-GA."""
        return self.gora_batches

    def has_started(self, adapters: Sequence[LowRankAdapter]) -> bool:
        """Whether any B is not zero."""
        return bool(torch.stack([adapter.lora_B_t.detach().any() for adapter in adapters]).any())

    def start(self, adapters: Mapping[str, LowRankAdapter], gradients: Mapping[Tensor, Tensor]) -> dict[str, int]:
        """GoRA: allot ranks by the importance of layers, and set B. LoRA-GA: take A and B out of the weights."""
        held = list(adapters.values())
        if self.init_weights == "lora_ga":
            for adapter in held:
                _follow(adapter, gradients[adapter.weight], self.lora_ga_gamma)
            return {name: adapter.rank for name, adapter in adapters.items()}
        units = [a.copies * math.sqrt(a.in_features + a.out_features) for a in held]
        highest = [min(a.in_features, a.out_features) for a in held]
        ranks = allotted_ranks(_importances(held, gradients), units, [a.rank for a in held], highest)
        for (name, adapter), rank in zip(adapters.items(), ranks, strict=True):
            _give_rank(self, name, adapter, rank)
            _descend(adapter, gradients[adapter.weight], self.gora_gamma)
        return dict(zip(adapters, ranks, strict=True))

    def check(self, adapters: Sequence[LowRankAdapter], run: Run) -> list[str]:
        """Check that a run by gradients has started from them."""
        if self.gradient_start is not None and not run.done and not self.has_started(adapters):
            raise UsageError(
                f"init_weights is {self.init_weights!r}, but every B is still zero. In a training loop of your own, "
                "call lit_sparse.start_from_gradients(model, method, batches) after inject, before the optimizer is "
                "made."
            )
        return super().check(adapters, run)


def start_from_gradients(
    model: nn.Module, method: Method, batches: Iterable[Any], loss: Callable[[Any], Tensor] | None = None
) -> dict[str, int]:
    """Start new adapters from the gradients of the frozen weights, averaged over some batches.

    GoRA (``init_weights: gora``): layers get their ranks by their importance, the mean |W ∘ G|, from half to four times
    ``method.rank``, under the budget of a uniform rank. B is such that scale · BA approximates a step of gradient
    descent by the rows of a random A. LoRA-GA (``init_weights: lora_ga``): A has the first r right singular vectors of
    G, B the next r left ones, and the frozen weight gives up scale · BA, so that the model computes what it did. SHiRA
    (``mask: gradient`` and ``snip``): each layer's entries are those with the
    largest |G| or |W ∘ G|. But for LoRA-GA, the frozen weights keep their values.

    Under the Trainer, :class:`~lit_sparse.Sparsify` calls it when training starts. In a loop of your own, call it after
    :func:`~lit_sparse.inject`, before the optimizer is made and before DDP wraps the model, which then broadcasts A and
    B. Gradients are averaged over all processes. Each batch costs a forward and a backward pass of the adapted weights.
    The device holds the gradient of one weight at a time; their sums, float32, are in main memory.

    Args:
        model: Model with new adapters, whole, on the device and in the mode (train or eval) in which it is to compute.
        method: The injected method. The first ``gora_batches`` or ``mask_batches`` batches are used.
        batches: Training batches, on the model's device.
        loss: The loss of a batch; None: ``model(**batch).loss``.

    Returns:
        Full layer name to rank, or to the number of entries. Modules of this library take ranks from the checkpoint
        when they resume; a module of your own must be injected with these ranks in ``overrides``, and keep
        the frozen weights of LoRA-GA.

    Raises:
        UsageError: If the method starts otherwise, the adapters are not new, there are no batches, or gradients are
            not finite or all zero.

    Source:
        He et al. 2025 (arXiv:2502.12171), Eqs. (5)–(10), for GoRA; Wang et al. 2024 (arXiv:2407.05000) for
        LoRA-GA; Bhardwaj et al. 2024 (arXiv:2406.13175) for SHiRA.
    """
    adapters = dict(adapters_in(model))
    if method.gradient_start is None:
        raise UsageError(
            "start_from_gradients is for init_weights 'gora' and 'lora_ga', and for SHiRA's masks 'gradient' and "
            f"'snip'; {method!r} starts without gradients."
        )
    held = list(adapters.values())
    if not held or method.has_started(held):
        raise UsageError(f"{type(model).__name__} has no new adapters: inject into a freshly loaded model, then start.")
    chosen = islice(batches, method.start_batches)
    weights = list(dict.fromkeys(a.weight for a in held))  # in the same order in all processes, unlike a set
    gradients = _mean_gradients(model, weights, chosen, loss or (lambda batch: model(**batch).loss))
    if not gradients:
        raise UsageError(f"There are no training batches to start from: {method.gradient_start} needs at least one.")
    finite = all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    if not finite or not any(bool(gradient.any()) for gradient in gradients.values()):
        raise UsageError(
            f"The gradients of the frozen weights are not finite, or all are zero: {method.gradient_start} cannot "
            "start from them. Check the loss on the first training batches."
        )
    return method.start(adapters, gradients)


def take_ranks(model: nn.Module, method: Method, record: Any) -> None:
    """Give adapters the ranks that GoRA allotted in the run of a checkpoint; of other methods they stay.

    Args:
        model: Model with adapters.
        method: Its method.
        record: What the checkpoint says of adapters, with ``ranks`` by name. What cannot be is left to later checks.
    """
    ranks = record.get("ranks") if isinstance(record, dict) else None
    if not isinstance(method, SparseMethod) or method.init_weights != "gora" or not isinstance(ranks, dict):
        return
    for name, adapter in adapters_in(model):
        if not isinstance(adapter, LowRankAdapter):
            continue
        rank, most = ranks.get(name), min(adapter.in_features, adapter.out_features)
        if isinstance(rank, int) and 1 <= rank <= most and rank != adapter.max_rank:
            _give_rank(method, name, adapter, rank)


def start_record(model: nn.Module) -> dict[str, list[Tensor]]:
    """The A and Bᵀ that LoRA-GA took out of the frozen weights, by layer: checkpoints hold none of these weights."""
    held = [(name, adapter) for name, adapter in adapters_in(model) if isinstance(adapter, LowRankAdapter)]
    return {name: list(adapter.start) for name, adapter in held if adapter.start is not None}


def take_starts(model: nn.Module, record: Mapping[str, Sequence[Tensor]]) -> None:
    """Take the start of a checkpoint's run out of pretrained weights, unless it was taken from them before.

    Args:
        model: Model with adapters, for which the checkpoint was found to fit.
        record: What :func:`start_record` gave.

    Raises:
        UsageError: If the model's weights gave up another start, or one that the checkpoint does not have.
    """
    for name, taken in start_record(model).items():
        if name not in record or not all(map(torch.equal, taken, record[name])):
            raise UsageError(
                f"The frozen weights of this {type(model).__name__} gave up the start of another run of LoRA-GA, the "
                f"first at {name!r}, and are not those that the checkpoint belongs to. Load it into a new module."
            )
    for name, adapter in adapters_in(model):
        if name in record and isinstance(adapter, LowRankAdapter) and adapter.start is None:
            adapter.take_start(*record[name])


def _mean_gradients(
    model: nn.Module, weights: Sequence[Tensor], batches: Iterable[Any], loss: Callable[[Any], Tensor]
) -> dict[Tensor, Tensor]:
    """The mean gradient of each weight over the batches of all processes, float32 in main memory; none of no batch."""
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
    device = next(iter(weights)).device
    counts = _together(count, device, dist.all_reduce)
    if not counts:
        return {}
    return {weight: _together(total, device, dist.all_reduce) / counts for weight, total in sums.items()}


def _together(values: Tensor, device: torch.device, collective: Callable[[Tensor], Any]) -> Tensor:
    """What a collective makes of the values of all processes, sent from ``device``, in main memory."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    sent = values.to(device)
    collective(sent)
    return sent.cpu()


def _importances(adapters: Sequence[LowRankAdapter], gradients: Mapping[Tensor, Tensor]) -> list[float]:
    """Mean |W ∘ G| of each layer, summed over its experts; those of the first process, so that ranks are equal."""
    means = [a.copies * (a.weight.detach().cpu() * gradients[a.weight]).abs().mean() for a in adapters]
    found: list[float] = _together(
        torch.stack(means), adapters[0].weight.device, partial(dist.broadcast, src=0)
    ).tolist()
    return found


@torch.no_grad()
def _give_rank(method: SparseMethod, name: str, adapter: LowRankAdapter, rank: int) -> None:
    """Start an adapter anew with another number of ranks; parameters stay the same objects."""
    layer: Any = adapter.layer
    if isinstance(adapter, LowRankExperts):
        layer = ExpertWeight(adapter.layer, name.rpartition(".")[2])
    fresh = method.adapt(layer, {**adapter.overrides, "rank": rank})
    for own, parameter in adapter.named_parameters(recurse=False):
        replace_values(parameter, fresh.get_parameter(own).data)
    adapter._buffers.update(fresh._buffers)
    adapter.max_rank, adapter.scale, adapter.overrides = fresh.max_rank, fresh.scale, fresh.overrides


@torch.no_grad()
def _follow(adapter: LowRankAdapter, gradient: Tensor, gamma: float) -> None:
    """Set A and B, of each expert by themselves, and take them out of the frozen weight."""
    matrices = adapter._as_matrix(gradient.to(adapter.lora_A))
    shape = (adapter.copies, adapter.out_features, adapter.in_features)
    lora_A, lora_B_t = gradient_factors(matrices.reshape(shape), adapter.rank, gamma)
    adapter.lora_A.copy_(lora_A.flatten(0, 1))
    adapter.lora_B_t.copy_(lora_B_t.flatten(0, 1))
    adapter.take_start(adapter.lora_A, adapter.lora_B_t)


@torch.no_grad()
def _descend(adapter: LowRankAdapter, gradient: Tensor, gamma: float) -> None:
    """Set B, of each expert by itself."""
    matrices = adapter._as_matrix(gradient).reshape(adapter.copies, adapter.out_features, adapter.in_features)
    rows = (adapter.lora_A.split(adapter.rank), adapter.lora_B_t.split(adapter.rank))
    for lora_A, lora_B_t, matrix in zip(*rows, matrices, strict=True):
        lora_B_t.copy_(compressed_gradient(lora_A.cpu(), matrix, adapter.scale, gamma))
