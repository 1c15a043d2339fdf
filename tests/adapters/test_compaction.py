"""lit_sparse.compact: the function stays, ranks at zero and what the optimizer remembers of them go."""

import copy

import pytest
import torch
from backbones import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertForSequenceClassification, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity, sparsity_of

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
METHODS = {
    "SoRA": ls.SoRA(rank=6, threshold=0.01, freeze_zero_after=2),
    "GatedRoseLoRA": ls.GatedRoseLoRA(rank=6, threshold=0.01, density=0.5),
}


def gates_of(model):
    return [adapter.gate for _, adapter in ls.adapters_in(model)]


def whole_numbers(model, seed=0):
    """Weights and gates that are small whole numbers: sums of their products are exact, in whatever order."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))


class Layers(nn.Module):
    """One of each kind of layer."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 12)
        self.convolution = nn.Conv2d(1, 3, 3)
        self.grouped = nn.Conv2d(3, 6, 2, groups=3)

    def forward(self, ids):
        rows = self.linear(self.embedding(ids))
        return self.grouped(self.convolution(rows.unsqueeze(1)))


@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=4, max_size=4))
@settings(deadline=None, max_examples=30)
def test_the_function_is_bit_for_bit_the_same_whichever_gates_are_zero(dead):
    model = Layers()
    ls.inject(model, ls.SoRA(["embedding", "linear", "convolution", "grouped"], rank=4, alpha=4, threshold=0.1))
    whole_numbers(model)
    with torch.no_grad():
        for gate, zeros in zip(gates_of(model), dead, strict=True):
            gate[gate == 0] = 1
            gate[torch.tensor(zeros)] = 0
        ids = torch.arange(24).view(2, 12) % 11
        before = model(ids)
        deltas = {name: adapter.delta_weight() for name, adapter in ls.adapters_in(model)}
        ranks = ls.compact(model)
        assert torch.equal(model(ids), before)
        for name, adapter in ls.adapters_in(model):
            assert torch.equal(adapter.delta_weight(), deltas[name])
    left = [4 - sum(zeros) for zeros in dead]
    assert list(ranks.values()) == (left if any(left) else [1, 0, 0, 0])


@pytest.mark.parametrize("name", METHODS)
def test_a_run_goes_on_as_if_ranks_at_zero_had_been_held_there(name):
    """Against the model with all ranks, whose zero gates a loop sets back to zero after every step."""
    torch.manual_seed(0)
    model = build_tiny(BertForSequenceClassification).double().eval()
    ls.inject(model, METHODS[name])
    full = copy.deepcopy(model)
    batch = {"input_ids": IDS, "labels": torch.tensor([0, 1])}
    runs = {}
    for kind, each in (("full", full), ("compact", model)):
        optimizer = torch.optim.AdamW(ls.parameter_groups(each, METHODS[name]), lr=0.02, foreach=False)
        runs[kind] = optimizer, ls.SparseSteps(METHODS[name], each, optimizer, total_steps=8)
    dead = None
    for number in range(8):
        for kind, each in (("full", full), ("compact", model)):
            optimizer, steps = runs[kind]
            each(**batch).loss.backward()
            steps.observe()
            optimizer.step()
            optimizer.zero_grad()
        if number == 3:
            with torch.no_grad():
                for gates in (gates_of(full), gates_of(model)):
                    for place, gate in enumerate(gates):
                        gate[: place % 6] = 0
            dead = [gate == 0 for gate in gates_of(full)]
            ls.compact(model, runs["compact"][0])
        if dead is not None:
            with torch.no_grad():
                for gate, mask in zip(gates_of(full), dead, strict=True):
                    gate[mask] = 0
    for (where, one), (_, other), mask in zip(ls.adapters_in(full), ls.adapters_in(model), dead, strict=True):
        assert other.rank == int((~mask).sum())
        assert other.max_rank == 6
        for part in ("lora_A", "lora_B_t", "gate"):
            expected, found = getattr(one, part)[~mask], getattr(other, part)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10, msg=f"{where}.{part}")
        for buffer, expected in one.named_buffers(recurse=False):
            torch.testing.assert_close(dict(other.named_buffers())[buffer], expected[~mask], rtol=0, atol=1e-10)
    assert {tuple(s["exp_avg"].shape) for s in runs["compact"][0].state.values()} == {
        tuple(p.shape) for p in model.parameters() if p.requires_grad
    }


def test_experts_keep_as_many_ranks_as_the_largest_needs():
    model = build_tiny(MixtralForCausalLM, num_local_experts=3, num_key_value_heads=4).double().eval()
    ls.inject(model, ls.SoRA("all-linear", rank=4, threshold=0.1, gate_init="ones"))
    adapter = model.model.layers[0].mlp.experts.gate_up_proj
    with torch.no_grad():
        for other in model.parameters():
            other.add_(0.05 * torch.randn(other.shape, generator=torch.Generator().manual_seed(1)))
        adapter.gate.copy_(torch.tensor([1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0]))
        before = model(IDS).logits
        ranks = ls.compact(model)
        torch.testing.assert_close(model(IDS).logits, before, rtol=0, atol=1e-12)
    assert ranks["model.layers.0.mlp.experts.gate_up_proj"] == 2
    assert adapter.gate.tolist() == [1, 2, 0, 0, 0, 3]
    assert adapter.lora_A.shape[0] == 3 * 2


def test_what_is_logged_does_not_forget_the_ranks_that_are_gone():
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.SoRA(rank=4, threshold=0.1, gate_init="ones"))
    with torch.no_grad():
        for place, (_, adapter) in enumerate(ls.adapters_in(model)):
            adapter.lora_B_t.normal_()
            adapter.gate[: place % 5] = 0
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    before, layers = {k: float(v) for k, v in sparsity_of(adapters).items()}, layer_sparsity(model)
    ls.compact(model)
    assert {k: float(v) for k, v in sparsity_of(adapters).items()} == pytest.approx(before)
    assert layer_sparsity(model) == layers
    assert METHODS["SoRA"].shortfall(adapters) is None


def test_a_compacted_model_is_merged_and_counted():
    model = build_tiny(BertForSequenceClassification).double().eval()
    ls.inject(model, ls.SoRA(rank=4, threshold=0.1, gate_init="ones"))
    with torch.no_grad():
        for place, (_, adapter) in enumerate(ls.adapters_in(model)):
            adapter.lora_B_t.normal_()
            adapter.gate[: place % 5] = 0
        before = model(IDS).logits
        ls.compact(model)
        torch.testing.assert_close(ls.merge(model)(IDS).logits, before, rtol=0, atol=1e-10)


def test_ranks_that_are_zero_without_a_gate_go_too():
    model = build_tiny(BertForSequenceClassification)
    adapters = ls.inject(model, ls.RoseLoRA(["query"], rank=3))
    first, second = adapters.values()
    with torch.no_grad():
        for adapter in (first, second):
            adapter.lora_B_t.normal_()
        first.lora_A[1], second.lora_B_t[:2] = 0, 0
    before = model.eval()(IDS).logits
    assert list(ls.compact(model).values()) == [2, 1]
    torch.testing.assert_close(model(IDS).logits, before)


def test_a_model_without_a_trained_adapter_is_refused():
    model = build_tiny(BertForSequenceClassification)
    with pytest.raises(ls.UsageError, match="holds no adapter to compact"):
        ls.compact(model)
    adapters = ls.inject(model, ls.RoseLoRA(["query"], rank=3))
    with pytest.raises(ls.UsageError, match="Train first"):
        ls.compact(model)
    assert {adapter.rank for adapter in adapters.values()} == {3}
