"""The figures of a stored layer against the dense matrices, spelt out."""

import pytest
import torch

from lit_sparse.reporting.stored import StoredLayer, figures_of


def sparse(*shape, share=0.3):
    return torch.randn(*shape) * (torch.rand(*shape) < share)


def made(copies=1, rank=3, gated=True, scale=1.7):
    gate = torch.randn(copies * rank) if gated else None
    if gate is not None:
        gate[1] = 0
    A, B_t = sparse(copies * rank, 11), sparse(copies * rank, 7)
    A[0], B_t[2] = 0, 0  # dead without a gate
    return StoredLayer("layer", A, B_t, gate, scale, 5.0, copies, rank + 1)


def changes_by_rank(layer):
    """scale · gᵢ · Bᵢ Aᵢ of every rank."""
    scale = 1.0 if layer.scale is None else layer.scale
    gates = [1.0] * len(layer.lora_A) if layer.gate is None else layer.gate.tolist()
    rows = zip(gates, layer.lora_B_t.double(), layer.lora_A.double(), strict=True)
    return torch.stack([scale * gate * torch.outer(b, a) for gate, b, a in rows])


def slow_changes(layer):
    """scale · B diag(g) A of every copy, entry by entry."""
    return torch.stack([part.sum(0) for part in changes_by_rank(layer).split(layer.rank)])


@pytest.mark.parametrize("copies", [1, 4])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scale", [1.7, None])
def test_figures_are_those_of_the_dense_matrices(copies, gated, scale):
    layer = made(copies, gated=gated, scale=scale)
    figures, changes = figures_of(layer), slow_changes(layer)
    live = (changes_by_rank(layer) != 0).any(2).any(1)
    A, B_t = layer.lora_A.clone(), layer.lora_B_t.clone()
    A[~live] = B_t[~live] = 0
    assert figures.sparsity.rank == int(live.sum())
    assert figures.sparsity.max_rank == copies * 4
    assert figures.sparsity.density_A == pytest.approx(float((A != 0).sum()) / (copies * 4 * 11))
    assert figures.sparsity.density_B == pytest.approx(float((B_t != 0).sum()) / (copies * 4 * 7))
    assert figures.sparsity.density_BA == pytest.approx(float((changes != 0).double().mean()))
    assert figures.sparsity.density_BA <= figures.sparsity.density_BA_bound + 1e-6
    assert figures.sparsity.remaining_parameters == int((A != 0).sum() + (B_t != 0).sum())
    assert figures.norm_A == pytest.approx(float(A.norm()))
    assert figures.norm_B == pytest.approx(float(B_t.norm()))
    assert figures.norm_BA == pytest.approx(float(changes.norm()))
    assert layer.change_per_copy().tolist() == pytest.approx([float(change.norm()) for change in changes])
    assert figures.bytes == 4 * copies * 3 * (11 + 7 + gated)


def test_a_layer_without_ranks_changes_nothing():
    figures = figures_of(StoredLayer("empty", torch.empty(0, 11), torch.empty(0, 7), torch.empty(0), 2.0, 8.0, 1, 4))
    assert (figures.sparsity.rank, figures.sparsity.max_rank, figures.bytes) == (0, 4, 0)
    assert figures.norm_A == figures.norm_B == figures.norm_BA == figures.sparsity.density_BA == 0
