"""lit_sparse.compact: the function stays, ranks at zero and what the optimizer remembers of them go."""

import copy
import functools

import pytest
import torch
from backbones import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import BertForSequenceClassification, MixtralForCausalLM
from transformers.optimization import Adafactor

import lit_sparse as ls
from lit_sparse.adapters.optimizer_state import require_cuttable_after_a_step
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


def test_experts_that_lost_all_ranks_are_merged():
    model = build_tiny(MixtralForCausalLM, num_local_experts=3, num_key_value_heads=4).eval()
    ls.inject(model, ls.SoRA("all-linear", rank=4, threshold=0.1, gate_init="ones"))
    with torch.no_grad():
        for name, adapter in ls.adapters_in(model):
            adapter.lora_B_t.normal_(std=0.1)
            adapter.gate.mul_("down_proj" not in name)
        before = model(IDS).logits
    assert ls.compact(model)["model.layers.0.mlp.experts.down_proj"] == 0
    torch.testing.assert_close(ls.merge(model)(IDS).logits, before, rtol=0, atol=1e-5)


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


OPTIMIZERS = {
    "AdamW": functools.partial(torch.optim.AdamW, foreach=False),
    "AdamW foreach": functools.partial(torch.optim.AdamW, foreach=True),
    "AdamW fused": functools.partial(torch.optim.AdamW, fused=True),
    "AMSGrad": functools.partial(torch.optim.AdamW, amsgrad=True),
    "SGD": functools.partial(torch.optim.SGD, momentum=0.9),
    "NAdam": torch.optim.NAdam,
    "Rprop": torch.optim.Rprop,
    "Adafactor of torch": torch.optim.Adafactor,
    "Adafactor of transformers": functools.partial(Adafactor, relative_step=False, scale_parameter=False),
    "AdamW of bitsandbytes": lambda groups, lr: pytest.importorskip("bitsandbytes").optim.AdamW(
        groups, lr=lr, optim_bits=32
    ),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_loop_goes_on_with_all_that_it_holds(kind, scaled):
    """The last loss with its graph, the optimizer, its schedule, a list for clipping, hooks and a gradient scaler."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 7))
    method = ls.SoRA(rank=5, threshold=0.1, gate_init="ones", train_head=False)
    adapters = list(ls.inject(model, method).values())
    optimizer = OPTIMIZERS[kind](ls.parameter_groups(model, method), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=12)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled and "bitsandbytes" not in kind)
    trained, hooked = [p for p in model.parameters() if p.requires_grad], []
    adapters[0].lora_A.register_hook(lambda gradient: hooked.append(gradient.shape[0]))
    losses, ranks = [], []
    for number in range(12):
        losses.append(model(torch.randn(8, 6)).square().sum())
        scaler.scale(losses[-1]).backward()
        scaler.unscale_(optimizer)
        steps.observe()
        assert nn.utils.clip_grad_norm_(trained, 1.0) > 0
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        schedule.step()
        if number % 3 == 2:
            with torch.no_grad():
                adapters[0].gate[0] = 0
                adapters[1].lora_B_t[-1] = 0
            before = [p.detach().clone() for p in trained]
            ls.compact(model, optimizer)
            assert all(p.grad is None for p in trained)
            assert any(p.shape != old.shape for p, old in zip(trained, before, strict=True))
        ranks.append([adapter.rank for adapter in adapters])
    assert ranks[0] == [5, 5]
    assert max(ranks[-1]) <= 1
    assert hooked == [rank for rank in (5, *(first for first, _ in ranks[:-1])) if rank]
    assert all(torch.isfinite(p).all() for p in trained)


@pytest.mark.parametrize("kind", ["Adafactor of torch", "Adafactor of transformers"])
def test_the_factors_of_adafactor_lose_the_rows_of_the_ranks(kind):
    model = nn.Sequential(nn.Linear(6, 10))
    method = ls.SoRA("all-linear", rank=4, threshold=0.1, gate_init="ones", train_head=False)
    adapter = ls.inject(model, method)["0"]
    optimizer = OPTIMIZERS[kind](ls.parameter_groups(model, method), lr=1e-2)
    for _ in range(2):
        model(torch.randn(8, 6)).square().sum().backward()
        optimizer.step()
    row, column = ("row_var", "col_var") if "torch" in kind else ("exp_avg_sq_row", "exp_avg_sq_col")
    with torch.no_grad():
        adapter.gate[1] = 0
    before = copy.deepcopy(optimizer.state[adapter.lora_A])
    ls.compact(model, optimizer)
    after = optimizer.state[adapter.lora_A]
    assert torch.equal(after[row], before[row][[0, 2, 3]])
    assert torch.equal(after[column], before[column])
    assert after["step"] == before["step"]


UNCUTTABLE = {
    "bitsandbytes": (
        lambda groups: pytest.importorskip("bitsandbytes").optim.AdamW8bit(groups, lr=1e-3),
        "'state1', a Tensor of .* torch.uint8",
    ),
    "torchao": (
        lambda groups: pytest.importorskip("torchao.optim").AdamW8bit(groups, lr=1e-3),
        "'exp_avg', a OptimState8bit",
    ),
    "LBFGS": (
        lambda groups: torch.optim.LBFGS([p for group in groups for p in group["params"]]),
        "LBFGS trains: it keeps",
    ),
    "a square A": (
        lambda groups: Adafactor(groups, lr=1e-3, relative_step=False),
        r"'exp_avg_sq_row', a Tensor of shape \(512,\)",
    ),
}


@pytest.mark.parametrize("kind", UNCUTTABLE)
def test_an_optimizer_whose_state_cannot_be_cut_is_refused_before_anything_changes(kind):
    make, message = UNCUTTABLE[kind]
    model = nn.Sequential(nn.Linear(512, 512))
    rank = 512 if "square" in kind else 8
    method = ls.SoRA("all-linear", rank=rank, threshold=0.1, gate_init="ones", train_head=False)
    adapter = ls.inject(model, method)["0"]
    optimizer = make(ls.parameter_groups(model, method))
    with pytest.raises(ls.UsageError, match=message):
        require_cuttable_after_a_step(optimizer, adapter.parameters())
    assert not optimizer.state

    def loss():
        optimizer.zero_grad()
        value = model(torch.ones(4, 512)).square().sum()
        value.backward()
        return value

    optimizer.step(torch.enable_grad()(loss))
    with torch.no_grad():
        adapter.gate[1] = 0
    parameters, state = copy.deepcopy(adapter.state_dict()), {p: dict(s) for p, s in optimizer.state.items()}
    with pytest.raises(ls.UsageError, match=message):
        ls.compact(model, optimizer)
    assert all(torch.equal(value, parameters[name]) for name, value in adapter.state_dict().items())
    assert all(optimizer.state[p][key] is value for p, entries in state.items() for key, value in entries.items())


def test_an_optimizer_whose_copy_cannot_step_is_refused():
    class Own(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("needs the model")

    parameter = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(ls.UsageError, match=r"a step of a copy, to see what it remembers, failed \(needs the model\)"):
        require_cuttable_after_a_step(Own([parameter], lr=0.1), [parameter])


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
