"""lit_sparse.functional.sensitivity against slow, obvious references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import lit_sparse as ls
from lit_sparse.errors import UsageError
from lit_sparse.functional import moving_average, sensitivities, sensitivity, update_moving_average_

modest = settings(max_examples=50, deadline=None)
entries = st.floats(-100, 100, width=32)
decays = st.floats(0, 0.999)


def test_sensitivity_is_the_loss_lost_with_an_entry_when_the_loss_is_linear():
    torch.manual_seed(0)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    slope = torch.randn(3, 4, dtype=torch.float64)
    loss = (weight * slope).sum()
    loss.backward()
    actual = sensitivity(weight.detach(), weight.grad)
    for i in range(3):
        for j in range(4):
            pruned = weight.detach().clone()
            pruned[i, j] = 0
            change = abs(loss.item() - (pruned * slope).sum().item())
            assert actual[i, j].item() == pytest.approx(change, rel=1e-9, abs=1e-14)


def test_sensitivity_has_no_sign():
    w, g = torch.tensor([2.0, -2.0, 2.0, -2.0, 0.0]), torch.tensor([3.0, 3.0, -3.0, -3.0, 3.0])
    assert sensitivity(w, g).tolist() == [6.0, 6.0, 6.0, 6.0, 0.0]


@modest
@given(st.lists(entries, min_size=1, max_size=6), decays)
def test_moving_average_over_several_steps_is_the_weighted_sum(values, beta):
    average = torch.tensor([values[0]], dtype=torch.float64)
    for value in values[1:]:
        average = moving_average(average, torch.tensor([value], dtype=torch.float64), beta)
    last = len(values) - 1
    expected = beta**last * values[0]
    for age, value in enumerate(reversed(values[1:])):
        expected += (1 - beta) * beta**age * value
    assert average.item() == pytest.approx(expected, rel=1e-9, abs=1e-10)


def test_without_memory_the_average_is_the_value_and_a_constant_stays():
    average, value = torch.tensor([1.0, 5.0]), torch.tensor([0.1, 5.0])
    assert torch.equal(moving_average(average, value, 0.0), value)
    assert moving_average(average, value, 0.8)[1] == 5.0


@modest
@given(st.lists(st.lists(st.tuples(entries, entries), max_size=5), max_size=4), decays, st.booleans())
def test_the_foreach_form_equals_the_elementwise_form(rows, beta, narrow):
    averages = [torch.tensor([average for average, _ in row]) for row in rows]
    values = [torch.tensor([value for _, value in row]) for row in rows]
    values = [value.bfloat16() for value in values] if narrow else values
    expected = [moving_average(a, v, beta) for a, v in zip(averages, values, strict=True)]
    places = [average.data_ptr() for average in averages]
    update_moving_average_(averages, values, beta)
    assert [average.data_ptr() for average in averages] == places
    assert all(torch.equal(a, e) for a, e in zip(averages, expected, strict=True))
    assert all(a.dtype == torch.float32 for a in averages)


@pytest.mark.parametrize("beta", [-0.1, 1.0, math.nan])
def test_a_decay_outside_the_unit_interval_is_an_error(beta):
    with pytest.raises(UsageError, match=rf"beta must be at least 0 and below 1; got {beta}\."):
        moving_average(torch.ones(1), torch.ones(1), beta)
    with pytest.raises(UsageError, match=rf"beta must be at least 0 and below 1; got {beta}\."):
        update_moving_average_([torch.ones(1)], [torch.ones(1)], beta)


def test_as_many_values_as_averages_are_needed():
    with pytest.raises(UsageError, match="got 1 for 2 averages"):
        update_moving_average_([torch.ones(1), torch.ones(1)], [torch.ones(1)], 0.5)


def test_many_sensitivities_are_those_of_each() -> None:
    weights = [torch.randn(3, 4), torch.randn(5)]
    grads = [torch.randn(3, 4), torch.randn(5)]
    for many, weight, grad in zip(sensitivities(weights, grads), weights, grads, strict=True):
        assert torch.equal(many, sensitivity(weight, grad))


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_average_forgets_nothing_and_learns_nothing_from_a_value_that_is_not_finite(bad):
    averages = [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])]
    update_moving_average_(averages, [torch.tensor([bad, 4.0]), torch.tensor([[5.0]])], 0.5)
    assert [average.tolist() for average in averages] == [[1.0, 3.0], [[4.0]]]


@pytest.mark.parametrize("first", [0, 3])
def test_an_infinite_gradient_that_clipping_tamed_leaves_no_trace_in_the_sensitivities(first):
    torch.manual_seed(0)
    method = ls.RoseLoRA(["0"], rank=2, density=0.5, begin=0, end=4, train_head=False)
    net = torch.nn.Sequential(torch.nn.Linear(6, 6))
    adapter = ls.inject(net, method)["0"]
    optimizer = torch.optim.Adam(ls.parameter_groups(net, method), lr=1e-2)
    steps = ls.SparseSteps(method, net, optimizer, 8)
    for step in range(8):
        net(torch.randn(4, 6)).square().mean().backward()
        if step == first:
            adapter.lora_A.grad[0, 0] = math.inf
            adapter.lora_B_t.grad[1, 1] = -math.inf  # times zero at the start: NaN
        steps.observe()
        torch.nn.utils.clip_grad_value_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for buffer in (adapter.sensitivity_A, adapter.sensitivity_B_t):
        assert buffer.isfinite().all()
        assert buffer.any()
