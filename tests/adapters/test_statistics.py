"""lit_sparse.adapters.statistics, and the table the monitor writes, against counting entry by entry."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.adapters.statistics import layer_sparsity, live_ranks, sparsity_of
from lit_sparse.callbacks.monitor import read_table, write_table


def sparse_adapter(base: nn.Module, rank: int, gated: bool) -> LowRankLinear:
    adapter = LowRankLinear(base, rank, 1.0, gated=gated)
    with torch.no_grad():
        for matrix in (adapter.lora_A, adapter.lora_B_t):
            matrix.copy_(torch.randn(matrix.shape) * (torch.rand(matrix.shape) < 0.3))
        if gated:
            adapter.gate.mul_(torch.rand(rank) < 0.5)
    return adapter


@pytest.fixture
def model() -> nn.Module:
    """Adapters of several widths and ranks, gated and not, one with no live rank at all."""
    parts = {
        "wide": sparse_adapter(nn.Linear(9, 5), 4, gated=True),
        "plain": sparse_adapter(nn.Linear(5, 9), 3, gated=False),
        "inner": nn.Sequential(nn.ReLU(), sparse_adapter(Conv1D(5, 9), 2, gated=True), nn.Linear(3, 3)),
        "dead": sparse_adapter(nn.Linear(6, 6), 2, gated=True),
    }
    with torch.no_grad():
        parts["dead"].gate.zero_()
        parts["wide"].gate[0], parts["wide"].gate[1] = 0.0, -0.5
    return nn.ModuleDict(parts)


def slow_live(adapter: LowRankLinear) -> list[int]:
    """The ranks whose own product, gate · Bᵢ · Aᵢ, has an entry that is not zero."""
    gate = [1.0] * adapter.rank if adapter.gate is None else adapter.gate.tolist()
    A, B = adapter.lora_A.tolist(), adapter.lora_B_t.tolist()
    return [i for i in range(adapter.rank) if any(gate[i] and a and b for a in A[i] for b in B[i])]


def slow_counts(adapter: LowRankLinear) -> dict[str, int]:
    """Count live ranks, non-zero entries in them, and the entries of BA that they reach."""
    A, B = adapter.lora_A.tolist(), adapter.lora_B_t.tolist()
    live = slow_live(adapter)
    return {
        "rank": len(live),
        "A": sum(value != 0 for i in live for value in A[i]),
        "B": sum(value != 0 for i in live for value in B[i]),
        "BA": len({(o, j) for i in live for o, b in enumerate(B[i]) if b != 0 for j, a in enumerate(A[i]) if a != 0}),
    }


def slow_bound(adapter: LowRankLinear) -> float:
    """1 − max(0, 1 + Σᵢ (s(Aᵢ) + s(Bᵢ) − s(Aᵢ) s(Bᵢ)) − r), s = share of zeros, dead ranks all zero."""
    live = slow_live(adapter)
    total = 1.0 - adapter.rank
    for i in range(adapter.rank):
        s_A = 1 - sum(v != 0 for v in adapter.lora_A[i].tolist()) / adapter.in_features if i in live else 1.0
        s_B = 1 - sum(v != 0 for v in adapter.lora_B_t[i].tolist()) / adapter.out_features if i in live else 1.0
        total += s_A + s_B - s_A * s_B
    return 1 - max(0.0, total)


def adapters_of(model: nn.Module) -> dict[str, LowRankLinear]:
    return {"wide": model["wide"], "plain": model["plain"], "inner.1": model["inner"][1], "dead": model["dead"]}


def test_layer_sparsity_counts_every_layer(model):
    layers = layer_sparsity(model)
    expected = adapters_of(model)
    assert [layer.name for layer in layers] == list(expected)
    for layer, adapter in zip(layers, expected.values(), strict=True):
        counts = slow_counts(adapter)
        assert layer.rank == counts["rank"]
        assert layer.max_rank == adapter.rank
        assert layer.density_A == pytest.approx(counts["A"] / (adapter.rank * adapter.in_features))
        assert layer.density_B == pytest.approx(counts["B"] / (adapter.rank * adapter.out_features))
        assert layer.density_BA == pytest.approx(counts["BA"] / (adapter.in_features * adapter.out_features))
        assert layer.density_BA_bound == pytest.approx(slow_bound(adapter), abs=1e-6)
        assert layer.density_BA <= layer.density_BA_bound + 1e-6
        assert layer.remaining_parameters == counts["A"] + counts["B"]
        assert layer.adapted_parameters == adapter.in_features * adapter.out_features


def test_a_layer_without_a_live_rank_has_nothing_left(model):
    dead = layer_sparsity(model)[-1]
    assert (dead.rank, dead.max_rank, dead.remaining_parameters) == (0, 2, 0)
    assert dead.density_A == dead.density_B == dead.density_BA == 0
    assert dead.density_BA_bound == pytest.approx(0, abs=1e-6)


def test_sparsity_of_is_the_total_over_layers(model):
    adapters = list(adapters_of(model).values())
    counts = [slow_counts(adapter) for adapter in adapters]
    ranks = sum(adapter.rank for adapter in adapters)
    figures = {name: value.item() for name, value in sparsity_of(adapters).items()}
    assert figures == pytest.approx(
        {
            "mean_rank": sum(c["rank"] for c in counts) / len(adapters),
            "zero_gates": 1 - sum(c["rank"] for c in counts) / ranks,
            "density_A": sum(c["A"] for c in counts) / sum(a.lora_A.numel() for a in adapters),
            "density_B": sum(c["B"] for c in counts) / sum(a.lora_B_t.numel() for a in adapters),
            "remaining_parameters": sum(c["A"] + c["B"] for c in counts),
        }
    )


def test_a_fresh_adapter_has_no_live_rank():
    fresh = LowRankLinear(nn.Linear(5, 4), 3, 1.0, gated=True)
    figures = sparsity_of([fresh])
    assert figures["mean_rank"] == 0
    assert figures["zero_gates"] == 1
    assert (figures["density_A"], figures["density_B"], figures["remaining_parameters"]) == (0, 0, 0)
    assert not any(figure.requires_grad for figure in figures.values())


@pytest.mark.parametrize("gated", [True, False])
def test_a_rank_is_live_when_gate_and_both_rows_are_not_zero(gated):
    adapter = LowRankLinear(nn.Linear(5, 4), 6, 1.0, gated=gated)
    with torch.no_grad():
        adapter.lora_B_t.fill_(1e-30)
        adapter.lora_A[4] = 0
        adapter.lora_B_t[5] = -0.0
        if gated:
            adapter.gate.copy_(torch.tensor([0.0, -0.0, 1e-30, -2.0, 1.0, 1.0]))
    expected = [False, False, True, True, False, False] if gated else [True, True, True, True, False, False]
    assert live_ranks(adapter).tolist() == expected
    assert slow_live(adapter) == [i for i, live in enumerate(expected) if live]


def test_a_model_without_adapters_has_no_layers():
    assert layer_sparsity(nn.Linear(2, 2)) == []


def test_a_table_reads_back_as_it_was_written(model, tmp_path):
    layers = layer_sparsity(model)
    path = tmp_path / "new folder" / "sparsity.csv"
    write_table(layers, path)
    assert read_table(path) == layers
    assert path.read_text().splitlines()[0].startswith("name,rank,max_rank,density_A,density_B,density_BA,")
    write_table([], path)  # overwrites
    assert read_table(path) == []
