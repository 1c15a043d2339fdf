"""What A and B start from: chance, the frozen weight, its gradient, or the inputs of its layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.adapters.compaction import replace_values
from lit_sparse.adapters.experts import ExpertWeight, LowRankExperts
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.processes import of_first
from lit_sparse.errors import UsageError, require_range
from lit_sparse.functional import allotted_ranks, compressed_gradient, gradient_factors
from lit_sparse.methods.base import InitWeights, SparseMethod, divisor
from lit_sparse.methods.eva import principal_inputs
from lit_sparse.methods.gradients import mean_gradients
from lit_sparse.methods.method import Method
from lit_sparse.methods.step import Run


@dataclass(eq=False, repr=False, kw_only=True)
class Start(SparseMethod):
    """Methods with a choice of how A and B start.

    Args:
        init_weights: ``lora``: A random and B zero. ``pissa``: A and B take the largest singular values out of the
            frozen weight (Meng et al. 2024, arXiv:2404.02948), and only the rest of it stays frozen. ``gora``: ranks
            and B come from gradients of the first training batches (:func:`~lit_sparse.start_from_batches`).
            ``lora_ga``: A and B are singular vectors of these gradients, and the frozen weight gives up scale · BA.
            ``eva``: ranks and A come from the principal components of each layer's inputs in the first training
            batches, and B is zero; needs PEFT. With gates, gate_init must be ``ones``. A rank of ``pissa`` or
            ``lora_ga`` whose gate reaches zero is lost to the model.
        start_batches: Batches, of each process, that ``gora``, ``lora_ga`` and ``eva`` take; ``eva`` at most so many.
        gora_gamma: γ, the size of GoRA's start: scale · BA has about γ times the norm of the gradient.
        lora_ga_gamma: γ of LoRA-GA, the paper's 16: A and B are singular vectors times ⁴√out_features / √γ.
        eva_rho: ρ of EVA, PEFT's 2: a layer gets at most ρ times the ranks that it would have. 1: ranks stay uniform.
    """

    init_weights: InitWeights = "lora"
    start_batches: int = 64
    gora_gamma: float = 0.05
    lora_ga_gamma: float = 16.0
    eva_rho: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_range("start_batches", self.start_batches, at_least=1)
        require_range("gora_gamma", self.gora_gamma, above=0)
        require_range("lora_ga_gamma", self.lora_ga_gamma, above=0)
        require_range("eva_rho", self.eva_rho, at_least=1)

    @property
    def batch_start(self) -> str | None:
        """GoRA and LoRA-GA take gradients, EVA inputs of layers."""
        return f"init_weights {self.init_weights!r}" if self.init_weights in ("gora", "lora_ga", "eva") else None

    @property
    def starts_from_gradients(self) -> bool:
        """Not EVA, which takes forward passes alone."""
        return super().starts_from_gradients and self.init_weights != "eva"

    @torch.no_grad()
    def has_started(self, adapters: Sequence[LowRankAdapter]) -> bool:
        """Whether any B is not zero; for EVA, also whether all rows of A have norm 1, and random ones are shorter."""
        moved = torch.stack([adapter.lora_B_t.any() for adapter in adapters]).any()
        if moved or self.init_weights != "eva":
            return bool(moved)
        norms = torch.cat([adapter.lora_A.norm(dim=1) for adapter in adapters])
        return bool(((norms - 1).abs() < 1e-3).all())

    def start(
        self,
        model: nn.Module,
        adapters: Mapping[str, LowRankAdapter],
        batches: Iterable[Any],
        loss: Callable[[Any], Tensor],
    ) -> dict[str, int]:
        """Set ranks, A, B and frozen weights as ``init_weights`` says."""
        held = list(adapters.values())
        if self.init_weights == "eva":
            for name, rows in principal_inputs(model, adapters, self.eva_rho, batches, loss).items():
                _follow_inputs(self, name, adapters[name], rows)
            return {name: adapter.rank for name, adapter in adapters.items()}
        gradients = mean_gradients(
            model, [a.weight for a in held], batches, loss, f"init_weights {self.init_weights!r}"
        )
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
        """Check that a run that starts from batches has started."""
        if self.batch_start is not None and not run.done and not self.has_started(adapters):
            raise UsageError(
                f"init_weights is {self.init_weights!r}, but A and B are still those of LoRA. In a training loop of "
                "your own, call lit_sparse.start_from_batches(model, method, batches) after inject, before the "
                "optimizer is made."
            )
        return super().check(adapters, run)


def start_from_batches(
    model: nn.Module, method: Method, batches: Iterable[Any], loss: Callable[[Any], Any] | None = None
) -> dict[str, int]:
    """Start new adapters from some batches: from the gradients of the frozen weights, or the inputs of their layers.

    GoRA (``init_weights: gora``): layers get their ranks by their importance, the mean |W ∘ G|, from half to four times
    ``method.rank``, under the budget of a uniform rank. B is such that scale · BA approximates a step of gradient
    descent by the rows of a random A. LoRA-GA (``init_weights: lora_ga``): A has the first r right singular vectors of
    G, B the next r left ones, and the frozen weight gives up scale · BA, so that the model computes what it did. SHiRA
    (``mask: gradient`` and ``snip``): each layer's entries are those with the
    largest |G| or |W ∘ G|. EVA (``init_weights: eva``): A has the first principal components of the layer's inputs, and
    layers have as many ranks as they have components among those of all layers that explain most, up to ``eva_rho``
    times their rank; the scale stays. But for LoRA-GA, the frozen weights keep their values.

    Under the Trainer, :class:`~lit_sparse.Sparsify` calls it when training starts. In a loop of your own, call it after
    :func:`~lit_sparse.inject`, before the optimizer is made and before DDP wraps the model, which then broadcasts A and
    B. Gradients are averaged over all processes. Each batch costs a forward and a backward pass of the adapted weights.
    The device holds the gradient of one weight at a time; their sums, float32, are in main memory. EVA takes forward
    passes alone, in evaluation mode, until its components have converged, and computes with the inputs of all
    processes.

    Args:
        model: Model with new adapters, whole, on the device and in the mode (train or eval) in which it is to compute.
        method: The injected method. The first ``start_batches`` batches are used.
        batches: Training batches, on the model's device.
        loss: The loss of a batch; None: ``model(**batch).loss``. EVA calls it for the forward pass.

    Returns:
        Full layer name to rank, or to the number of entries. Modules of this library take ranks from the checkpoint
        when they resume. In a loop of your own, save ``{name: dict(adapter.overrides) for name, adapter in
        adapters_in(model) if adapter.overrides}`` and give it to the method as ``overrides`` before you inject it and
        load the state: these are the new ranks, and under EVA the ``alpha`` with which each layer keeps its scale. Save
        the frozen weights of LoRA-GA, too.

    Raises:
        UsageError: If the method starts otherwise, the adapters are not new, there are no batches, gradients are not
            finite or all zero, or inputs are not finite, all equal or too few.

    Source:
        He et al. 2025 (arXiv:2502.12171), Eqs. (5)–(10), for GoRA; Wang et al. 2024 (arXiv:2407.05000) for
        LoRA-GA; Paischer et al. 2024 (arXiv:2410.07170) for EVA; Bhardwaj et al. 2024 (arXiv:2406.13175) for SHiRA.
    """
    adapters = dict(adapters_in(model))
    if method.batch_start is None:
        raise UsageError(
            "start_from_batches is for init_weights 'gora', 'lora_ga' and 'eva', and for SHiRA's masks 'gradient' and "
            f"'snip'; {method!r} starts without batches."
        )
    held = list(adapters.values())
    if not held or method.has_started(held):
        raise UsageError(f"{type(model).__name__} has no new adapters: inject into a freshly loaded model, then start.")
    chosen = islice(batches, method.start_batches)
    return method.start(model, adapters, chosen, loss or (lambda batch: model(**batch).loss))


def take_ranks(model: nn.Module, method: Method, record: Any) -> None:
    """Give adapters the ranks that GoRA or EVA allotted in the run of a checkpoint; of other methods they stay.

    Args:
        model: Model with adapters.
        method: Its method.
        record: What the checkpoint says of adapters, with ``ranks`` by name. What cannot be is left to later checks.
    """
    ranks = record.get("ranks") if isinstance(record, dict) else None
    if (
        not isinstance(method, SparseMethod)
        or method.init_weights not in ("gora", "eva")
        or not isinstance(ranks, dict)
    ):
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


def _importances(adapters: Sequence[LowRankAdapter], gradients: Mapping[Tensor, Tensor]) -> list[float]:
    """Mean |W ∘ G| of each layer, summed over its experts; those of the first process, so that ranks are equal."""
    means = [a.copies * (a.weight.detach().cpu() * gradients[a.weight]).abs().mean() for a in adapters]
    found: list[float] = of_first(torch.stack(means), adapters[0].weight.device).tolist()
    return found


@torch.no_grad()
def _give_rank(method: SparseMethod, name: str, adapter: LowRankAdapter, rank: int) -> None:
    """Start an adapter anew with another number of ranks; parameters stay the same objects."""
    layer: Any = adapter.layer
    if isinstance(adapter, LowRankExperts):
        layer = ExpertWeight(adapter.layer, name.rpartition(".")[2])
    overrides = {**adapter.overrides, "rank": rank}
    if method.init_weights == "eva":  # the scale of the layer stays
        overrides["alpha"] = adapter.scale * divisor(rank, method.use_rslora)
    fresh = method.adapt(layer, overrides)
    for own, parameter in adapter.named_parameters(recurse=False):
        replace_values(parameter, fresh.get_parameter(own).data)
    adapter._buffers.update(fresh._buffers)
    adapter.max_rank, adapter.scale, adapter.overrides = fresh.max_rank, fresh.scale, fresh.overrides


@torch.no_grad()
def _follow_inputs(method: SparseMethod, name: str, adapter: LowRankAdapter, rows: Tensor) -> None:
    """Set A; B is zero."""
    if len(rows) != adapter.rank:
        _give_rank(method, name, adapter, len(rows))
    adapter.lora_A.copy_(rows)


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
