"""What is left of adapters: ranks, densities, remaining parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_sparse.adapters.base import Adapter, LowRankAdapter
from lit_sparse.adapters.delta import DeltaLinear
from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.injection import adapters_in
from lit_sparse.functional import product_density, product_sparsity_bound


@dataclass(frozen=True)
class LayerSparsity:
    """What is left of one adapter.

    Args:
        name: Full name of the layer.
        rank: Live ranks, see :func:`live_ranks`. Experts' ranks are added up. 0 without factors.
        max_rank: Ranks at the start, 0 without factors. Densities of A and B are shares of their entries.
        density_A: Share of non-zero entries of A, dead ranks counted as zero; None without factors.
        density_B: The same of B.
        density_BA: Share of the frozen weight's entries that BA, or a change without factors, reaches (its support).
        density_BA_bound: The most that share can be by Proposition 1 of RoseLoRA; None without factors.
        remaining_parameters: Non-zero entries of A and B in live ranks, or of the change, what a sparse file must hold.
        adapted_parameters: Entries of the frozen weight.
    """

    name: str
    rank: int
    max_rank: int
    density_A: float | None
    density_B: float | None
    density_BA: float
    density_BA_bound: float | None
    remaining_parameters: int
    adapted_parameters: int


@torch.no_grad()
def sparsity_of(adapters: Sequence[Adapter]) -> dict[str, Tensor]:
    """Metrics over all adapters, cheap enough to log while training: no host sync, layers of one width together.

    Args:
        adapters: At least one, all of one kind.

    Returns:
        Scalars on the adapters' device. Without factors, ``density_BA`` (the share of the weights that change) and
        ``remaining_parameters``. With them, ``mean_rank`` (live ranks per layer), ``zero_gates`` (share of dead ranks),
        ``density_A``, ``density_B`` (share of non-zero entries, dead ranks counted as zero) and
        ``remaining_parameters``.
    """
    deltas = [adapter for adapter in adapters if isinstance(adapter, DeltaLinear)]
    if deltas:
        changed = torch.cat([adapter.values.detach() for adapter in deltas]).count_nonzero()
        weights = sum(adapter.in_features * adapter.out_features for adapter in deltas)
        return {"density_BA": changed / weights, "remaining_parameters": changed}
    return _sparsity_of_factors([adapter for adapter in adapters if isinstance(adapter, LowRankAdapter)])


def _sparsity_of_factors(adapters: Sequence[LowRankAdapter]) -> dict[str, Tensor]:
    per_rank_A = _nonzero_per_rank([a.lora_A for a in adapters])
    per_rank_B = _nonzero_per_rank([a.lora_B_t for a in adapters])
    live = _live(adapters, per_rank_A, per_rank_B)
    nonzero_A, nonzero_B = (per_rank_A * live).sum(), (per_rank_B * live).sum()
    ranks = [adapter.copies * adapter.max_rank for adapter in adapters]  # those that compaction took out included
    return {
        "mean_rank": live.sum() / len(adapters),
        "zero_gates": 1 - live.sum() / sum(ranks),
        "density_A": nonzero_A / sum(r * a.in_features for r, a in zip(ranks, adapters, strict=True)),
        "density_B": nonzero_B / sum(r * a.out_features for r, a in zip(ranks, adapters, strict=True)),
        "remaining_parameters": nonzero_A + nonzero_B,
    }


@torch.no_grad()
def layer_sparsity(model: nn.Module) -> list[LayerSparsity]:
    """What is left of every adapter of ``model``, in the model's order; forms BA's support, so not for every step."""
    return [sparsity_of_layer(parts_of(name, adapter)) for name, adapter in adapters_in(model)]


def parts_of(name: str, adapter: Adapter) -> LayerFactors | LayerEntries:
    """What a file would hold of an adapter, sharing its memory."""
    if isinstance(adapter, DeltaLinear):
        return LayerEntries.of(name, adapter)
    if isinstance(adapter, LowRankAdapter):
        return LayerFactors.of(name, adapter)
    raise TypeError(f"{type(adapter).__name__} is of an unknown kind.")


@torch.no_grad()
def is_changed(adapters: Sequence[Adapter]) -> bool:
    """Whether any adapter changes anything: it has a live rank, or a value that is not zero. Waits for the device."""
    deltas = [adapter.values.detach() for adapter in adapters if isinstance(adapter, DeltaLinear)]
    factors = [adapter for adapter in adapters if isinstance(adapter, LowRankAdapter)]
    return any(bool(values.any()) for values in deltas) or bool(factors and live_ranks_of_all(factors).any())


@torch.no_grad()
def live_ranks(adapter: LowRankAdapter | LayerFactors) -> Tensor:
    """Which ranks contribute to the product: their gate, their row of A and their row of Bᵀ are not zero.

    This is the only rule for it: logs, tables, compaction and every export count by it, whether a method closes gates
    or zeroes rows. Before the first step no rank is live, since B starts at zero.

    Args:
        adapter: An adapter in a model, or what a file holds of one.

    Returns:
        Booleans, shape ``(copies · rank,)``, on the adapter's device.
    """
    return live_ranks_of_all([adapter])


@torch.no_grad()
def live_ranks_of_all(adapters: Sequence[LowRankAdapter | LayerFactors]) -> Tensor:
    """:func:`live_ranks` of several adapters, without a host sync and with layers of one width together.

    Args:
        adapters: At least one, on one device.

    Returns:
        Booleans, shape ``(sum of copies · rank,)``, in the order of the adapters.
    """
    per_rank_A = _nonzero_per_rank([a.lora_A for a in adapters])
    return _live(adapters, per_rank_A, _nonzero_per_rank([a.lora_B_t for a in adapters]))


@torch.no_grad()
def sparsity_of_layer(layer: LayerFactors | LayerEntries) -> LayerSparsity:
    """What is left of one layer."""
    if isinstance(layer, LayerEntries):
        changed = int(layer.values.count_nonzero())
        return LayerSparsity(layer.name, 0, 0, None, None, changed / layer.weights, None, changed, layer.weights)
    live = live_ranks(layer)
    A, B_t = layer.lora_A * live.unsqueeze(1), layer.lora_B_t * live.unsqueeze(1)
    nonzero_A, nonzero_B = int(A.count_nonzero()), int(B_t.count_nonzero())
    pairs = [(a, b_t.t()) for a, b_t in zip(A.split(layer.ranks), B_t.split(layer.ranks), strict=True)]
    max_rank = len(pairs) * layer.max_rank
    return LayerSparsity(
        name=layer.name,
        rank=int(live.sum()),
        max_rank=max_rank,
        density_A=nonzero_A / (max_rank * layer.in_features),
        density_B=nonzero_B / (max_rank * layer.out_features),
        density_BA=sum(float(product_density(a, b)) for a, b in pairs) / len(pairs),
        density_BA_bound=1 - sum(float(product_sparsity_bound(a, b)) for a, b in pairs) / len(pairs),
        remaining_parameters=nonzero_A + nonzero_B,
        adapted_parameters=len(pairs) * layer.out_features * layer.in_features,
    )


def _live(adapters: Sequence[LowRankAdapter | LayerFactors], per_rank_A: Tensor, per_rank_B: Tensor) -> Tensor:
    live = (per_rank_A > 0) & (per_rank_B > 0)
    gates = [a.effective_gate() if isinstance(a, LowRankAdapter) else a.gate for a in adapters]
    if all(gate is None for gate in gates):
        return live
    factors = [
        a.lora_A.new_ones(len(a.lora_A)) if gate is None else gate for a, gate in zip(adapters, gates, strict=True)
    ]
    return live & torch.cat(factors).ne(0)


def _nonzero_per_rank(matrices: Sequence[Tensor]) -> Tensor:
    """Non-zero entries in each row of all ``matrices``, in their order, shape ``(sum of ranks,)``."""
    return per_rank(matrices, lambda rows: rows.ne(0).sum(1))


def per_rank(matrices: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """A number for each row of all ``matrices``, in their order, with rows of one width together.

    Args:
        matrices: At least one, of shape ``(ranks, width)``.
        reduce: Maps ``(rows, width)`` to ``(rows,)``, each row by itself.

    Returns:
        Shape ``(sum of ranks,)``.
    """
    by_width: dict[int, list[int]] = {}
    for index, matrix in enumerate(matrices):
        by_width.setdefault(matrix.shape[1], []).append(index)
    numbers: dict[int, Tensor] = {}
    for indices in by_width.values():
        rows = reduce(torch.cat([matrices[i] for i in indices]))
        numbers.update(zip(indices, rows.split([matrices[i].shape[0] for i in indices]), strict=True))
    return torch.cat([numbers[i] for i in range(len(matrices))])
