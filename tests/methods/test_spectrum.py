"""Ranks turned into singular directions, and cut by them: against dense products and their gradients."""

import itertools
import math
from typing import Any

import pytest
import torch
from nets import TARGETS, Net, of_net, train
from torch import Tensor, nn

import lit_sparse as ls
from lit_sparse.adapters.base import LowRankAdapter
from lit_sparse.methods.account import Account
from lit_sparse.methods.spectrum import Spectrum, cut, turn

OPTIMIZERS: dict[str, Any] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-2, amsgrad=True),
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-2, momentum=0.9),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-2, centered=True, momentum=0.9),
}
AVERAGES = {"AdamW": "exp_avg", "SGD": "momentum_buffer", "RMSprop": "grad_avg"}


def trained(optimizer: str = "AdamW", rank: int = 3) -> tuple[Net, list[LowRankAdapter], torch.optim.Optimizer]:
    """A net after six steps, and its optimizer."""
    torch.manual_seed(0)
    method, net = ls.SoRA(TARGETS, rank=rank, budget=0.5, begin=90, end=90, train_head=False), Net()
    adapters = list(ls.inject(net, method).values())
    made = OPTIMIZERS[optimizer](ls.parameter_groups(net, method))
    for _ in range(6):
        of_net(net).backward()
        made.step()
        made.zero_grad()
    with torch.no_grad():
        for adapter in adapters:
            adapter.gate.mul_(torch.rand_like(adapter.gate) + 0.5)  # type: ignore[union-attr, arg-type]
    return net, adapters, made


def updates(adapters: list[LowRankAdapter]) -> list[Tensor]:
    """Of every copy of every adapter, in float64."""
    found = []
    for adapter in adapters:
        B = (adapter.lora_B_t * adapter.gate.unsqueeze(1)).detach().double() * adapter.scale  # type: ignore[union-attr]
        A = adapter.lora_A.detach().double()
        found += [b.T @ a for a, b in zip(A.split(adapter.rank), B.split(adapter.rank), strict=True)]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_turning_keeps_the_function_and_turns_averages_of_gradients(name: str) -> None:
    net, adapters, optimizer = trained(name)
    adapters[2].gate.data[1] = 0.0  # type: ignore[union-attr]
    ids = torch.randint(11, (8, 7))

    def gradients() -> dict[nn.Parameter, Tensor]:
        net.zero_grad()
        nn.functional.cross_entropy(net(ids), ids.sum(1) % 3).backward()
        return {p: p.grad.clone() for a in adapters for p in (a.lora_A, a.lora_B_t)}  # type: ignore[union-attr]

    before, changes = gradients(), updates(adapters)
    for parameter, gradient in before.items():
        optimizer.state[parameter][AVERAGES[name]].copy_(gradient)
    for adapter in adapters:
        spectrum = Spectrum.of(adapter)
        turn(adapter, spectrum, spectrum.values > 0, optimizer)
    for now, then in zip(updates(adapters), changes, strict=True):
        torch.testing.assert_close(now, then, atol=1e-6, rtol=1e-5)
    for parameter, gradient in gradients().items():
        remembered = optimizer.state[parameter][AVERAGES[name]]
        torch.testing.assert_close(remembered, gradient, atol=1e-6, rtol=1e-4)
    for adapter in adapters:
        rows = adapter.lora_A.detach()[adapter.gate != 0]
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)) * rows[0].square().sum(), atol=1e-5, rtol=1e-5)
    for state in optimizer.state.values():
        assert all((v >= 0).all() for k, v in state.items() if k.endswith(("_sq", "square_avg")))


def test_what_an_optimizer_of_ones_own_remembers_stays() -> None:
    _, adapters, optimizer = trained()
    state = optimizer.state[adapters[0].lora_A]
    state["mine"] = torch.rand_like(adapters[0].lora_A)
    before = state["mine"].clone()
    spectrum = Spectrum.of(adapters[0])
    turn(adapters[0], spectrum, spectrum.values > 0, optimizer)
    assert torch.equal(state["mine"], before)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_cut_leaves_the_largest_singular_values_for_their_cost(share: float) -> None:
    _, adapters, optimizer = trained()
    account = Account.of(share, adapters)
    before = updates(adapters)
    values = [
        (float(value) / math.sqrt(cost), cost, layer)
        for layer, (change, cost) in enumerate(zip(before, account.costs, strict=True))
        for value in torch.linalg.svdvals(change)[:3]
    ]
    left, kept = account.limit, [0] * len(adapters)
    for _, cost, layer in sorted(values, reverse=True):
        if cost <= left:
            kept[layer], left = kept[layer] + 1, left - cost
    cut(adapters, account, account.limit, optimizer)
    assert [int((a.gate != 0).sum()) for a in adapters] == kept  # type: ignore[union-attr]
    for change, now, rank in zip(before, updates(adapters), kept, strict=True):
        left_v, s, right_v = torch.linalg.svd(change, full_matrices=False)
        torch.testing.assert_close(now, (left_v[:, :rank] * s[:rank]) @ right_v[:rank], atol=1e-6, rtol=1e-5)


def test_a_layer_that_loses_nothing_keeps_its_ranks_as_they_are() -> None:
    _, adapters, optimizer = trained()
    for adapter in adapters[1:]:
        adapter.lora_B_t.data.mul_(1e-3)
    rows = adapters[0].lora_A.detach().clone()
    account = Account.of(0.5, adapters)
    cut(adapters, account, account.limit, optimizer)
    assert torch.equal(adapters[0].lora_A, rows)
    assert any(bool((a.gate == 0).any()) for a in adapters[1:])


def test_values_that_are_not_finite_are_left_to_those_who_report_them() -> None:
    _, adapters, optimizer = trained()
    adapters[0].lora_A.data[0, 0] = math.nan
    account = Account.of(0.5, adapters)
    cut(adapters, account, account.limit, optimizer)
    assert all(bool((a.gate != 0).all()) for a in adapters)


def test_closed_ranks_stay_closed_between_two_cuts() -> None:
    opened: list[list[int]] = []

    def look(_: int) -> None:
        opened.append([int((a.gate != 0).sum()) for _, a in ls.adapters_in(model)])  # type: ignore[union-attr]

    method, model = ls.SoRA(TARGETS, rank=4, budget=0.3, begin=0.1, end=0.7, train_head=False), Net()
    train(method, model, of_net, 60, 3e-2, after=look)
    for before, after in itertools.pairwise(opened):
        assert all(a <= b for a, b in zip(after, before, strict=True))
    assert len({tuple(counts) for counts in opened}) > 4


def test_a_smaller_budget_after_the_end_cuts_nothing_and_says_so() -> None:
    method, model = ls.SoRA(TARGETS, rank=4, budget=0.6, begin=0, end=4, train_head=False), Net()
    train(method, model, of_net, 6)
    before = [a.gate.detach().clone() for _, a in ls.adapters_in(model)]  # type: ignore[union-attr]
    other = ls.SoRA(TARGETS, rank=4, budget=0.3, begin=0, end=4, train_head=False)
    optimizer = torch.optim.SGD(ls.parameter_groups(model, other), lr=0.0)
    with pytest.warns(UserWarning, match="more than the budget of 134, and nothing is cut after end=4"):
        sparse = ls.SparseSteps(other, model, optimizer, 12, steps_taken=6)
    of_net(model).backward()
    sparse.observe()
    optimizer.step()
    after = [a.gate.detach() for _, a in ls.adapters_in(model)]  # type: ignore[union-attr]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_masks_have_no_singular_directions() -> None:
    with pytest.raises(ls.UsageError, match="score 'singular' turns whole ranks, and masks keep entries"):
        ls.GatedRoseLoRA(budget=0.5, score="singular")
