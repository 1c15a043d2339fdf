"""The numbers of a stored layer against the dense matrices, spelt out."""

import pytest
import torch

from lit_sparse.adapters.factors import LayerFactors
from lit_sparse.adapters.statistics import LayerSparsity, sparsity_of_layer
from lit_sparse.reporting.stored import StoredAdapters
from lit_sparse.reporting.table import table_of


def sparse(*shape, share=0.3):
    return torch.randn(*shape) * (torch.rand(*shape) < share)


def made(copies=1, rank=3, gated=True, scale=1.7):
    gate = torch.randn(copies * rank) if gated else None
    if gate is not None:
        gate[1] = 0
    A, B_t = sparse(copies * rank, 11), sparse(copies * rank, 7)
    A[0], B_t[2] = 0, 0  # dead without a gate
    ranks = (rank,) * copies
    return LayerFactors(
        name="layer", lora_A=A, lora_B_t=B_t, ranks=ranks, max_rank=rank + 1, gate=gate, scale=scale, alpha=5.0
    )


def numbers_of(layer):
    """What is left of a layer, and its row of the table."""
    sparsity = sparsity_of_layer(layer)
    table = table_of(StoredAdapters(name="x", kind="x", table=[sparsity], layers={"layer": layer}))
    (_, _, values) = table.rows["layer"]
    return sparsity, dict(zip((column.head for column in table.columns), values, strict=True))


def changes_by_rank(layer):
    """scale · gᵢ · Bᵢ Aᵢ of every rank."""
    scale = 1.0 if layer.scale is None else layer.scale
    gates = [1.0] * len(layer.lora_A) if layer.gate is None else layer.gate.tolist()
    rows = zip(gates, layer.lora_B_t.double(), layer.lora_A.double(), strict=True)
    return torch.stack([scale * gate * torch.outer(b, a) for gate, b, a in rows])


def slow_changes(layer):
    """scale · B diag(g) A of every copy, entry by entry."""
    return torch.stack([part.sum(0) for part in changes_by_rank(layer).split(layer.ranks)])


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scale", [1.7, None])
def test_numbers_are_those_of_the_dense_matrices(copies, gated, scale):
    layer = made(copies, gated=gated, scale=scale)
    (sparsity, row), changes = numbers_of(layer), slow_changes(layer)
    live = (changes_by_rank(layer) != 0).any(2).any(1)
    A, B_t = layer.lora_A.clone(), layer.lora_B_t.clone()
    A[~live] = B_t[~live] = 0
    assert sparsity.rank == int(live.sum())
    assert sparsity.max_rank == copies * 4
    assert sparsity.density_A == pytest.approx(float((A != 0).sum()) / (copies * 4 * 11))
    assert sparsity.density_B == pytest.approx(float((B_t != 0).sum()) / (copies * 4 * 7))
    assert sparsity.density_BA == pytest.approx(float((changes != 0).double().mean()))
    assert sparsity.density_BA <= sparsity.density_BA_bound + 1e-6
    assert sparsity.remaining_parameters == int((A != 0).sum() + (B_t != 0).sum())
    assert row["|A|"] == pytest.approx(float(A.norm()))
    assert row["|B|"] == pytest.approx(float(B_t.norm()))
    assert row["|ΔW|"] == pytest.approx(float(changes.norm()))
    assert layer.change_norms.tolist() == pytest.approx([float(change.norm()) for change in changes])
    assert row["bytes"] == 4 * copies * 3 * (11 + 7 + gated)


def test_experts_may_have_different_ranks_left():
    layer = made(copies=2, gated=False)
    few = LayerFactors(
        name="layer", lora_A=layer.lora_A[:4], lora_B_t=layer.lora_B_t[:4], ranks=(3, 1), max_rank=3, scale=1.7
    )
    sparsity, changes = sparsity_of_layer(few), slow_changes(few)
    assert few.change_norms.tolist() == pytest.approx([float(change.norm()) for change in changes])
    assert sparsity.density_BA == pytest.approx(float((changes != 0).double().mean()))
    assert (sparsity.max_rank, sparsity.adapted_parameters) == (6, 2 * 11 * 7)


def test_a_layer_without_ranks_changes_nothing():
    empty = LayerFactors(
        name="layer",
        lora_A=torch.empty(0, 11),
        lora_B_t=torch.empty(0, 7),
        ranks=(0,),
        max_rank=4,
        gate=torch.empty(0),
        scale=2.0,
    )
    sparsity, row = numbers_of(empty)
    assert (sparsity.rank, sparsity.max_rank, row["bytes"]) == (0, 4, 0)
    assert row["|A|"] == row["|B|"] == row["|ΔW|"] == sparsity.density_BA == 0


def test_a_table_without_factors_has_the_columns_it_has_numbers_for():
    sparsity = LayerSparsity("layer", 1, 2, 0.5, 0.25, 0.1, 0.2, 7, 77)
    table = table_of(StoredAdapters(name="x", kind="logs", table=[sparsity]))
    assert [column.head for column in table.columns] == ["A", "B", "BA", "bound", "left"]
    assert table.rows == {"layer": (1, 2, [0.5, 0.25, 0.1, 0.2, 7])}
