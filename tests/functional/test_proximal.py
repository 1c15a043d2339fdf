"""lit_sparse.functional.proximal against slow, obvious references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_sparse.errors import UsageError
from lit_sparse.functional import (
    optimizer_metric_threshold,
    released_threshold,
    released_threshold_,
    soft_threshold,
    soft_threshold_,
)

POINTS = [-3.0, -1.5, -1.0, -0.6, -0.3, -0.2, 0.0, 0.2, 0.3, 0.6, 1.0, 1.5, 3.0]
PAIRS = [(soft_threshold, soft_threshold_), (released_threshold, released_threshold_)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
finite = st.floats(-4, 4, width=32)
thresholds = st.floats(0, 2, width=32)
modest = settings(max_examples=100, deadline=None)


def slow_prox_l1(x: float, threshold: float, curvature: float = 1.0) -> float:
    """argmin_z ½·curvature·(z − x)² + threshold·|z|, by trying every z on a fine grid."""
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    return grid[(0.5 * curvature * (grid - x) ** 2 + threshold * grid.abs()).argmin()].item()


def released_statements(x: torch.Tensor, threshold: float) -> torch.Tensor:
    """What the release does to a parameter, statement by statement."""
    p = x.clone()
    p[p > threshold] -= threshold
    p[p < -threshold] += threshold
    p[p.abs() < threshold] = 0
    return p


@pytest.mark.parametrize("threshold", [0.0, 0.3, 1.0])
def test_soft_threshold_is_the_proximal_map_of_l1(threshold):
    x = torch.tensor(POINTS, dtype=torch.float64)
    expected = torch.tensor([slow_prox_l1(v, threshold) for v in POINTS], dtype=torch.float64)
    torch.testing.assert_close(soft_threshold(x, threshold), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("operator", [soft_threshold, released_threshold])
@pytest.mark.parametrize("threshold", [0.0, torch.tensor(0.0)])
def test_zero_threshold_is_the_identity_even_at_zero(operator, threshold):
    x = torch.tensor([-1.0, -0.0, 0.0, 1e-45, 2.0])
    assert torch.equal(operator(x, threshold), x)


@pytest.mark.parametrize("operator", [soft_threshold, released_threshold])
@pytest.mark.parametrize("threshold", [0.3, torch.tensor(0.3), torch.tensor([0.3, 0.1])])
def test_nan_stays_nan(operator, threshold):
    assert operator(torch.tensor([math.nan, math.nan]), threshold).isnan().all()


@modest
@given(st.lists(finite, min_size=2, max_size=8), thresholds)
def test_soft_threshold_is_odd_monotone_and_nonexpansive(values, threshold):
    x = torch.tensor(sorted(values), dtype=torch.float64)
    y = soft_threshold(x, threshold)
    assert torch.equal(soft_threshold(-x, threshold), -y)
    assert (y.diff() >= 0).all()
    assert (y.diff() <= x.diff() + 1e-15).all()
    assert torch.equal(y == 0, x.abs() <= threshold)


@modest
@given(st.lists(finite, min_size=1, max_size=8), thresholds, st.sampled_from(DTYPES))
def test_released_threshold_is_what_the_release_does(values, threshold, dtype):
    x = torch.tensor([*values, threshold, -threshold, 2 * threshold, -2 * threshold], dtype=dtype)
    assert torch.equal(released_threshold(x, threshold), released_statements(x, threshold))


@modest
@given(st.floats(1.001, 1.999), st.sampled_from([-1, 1]), st.floats(1e-4, 1))
def test_released_threshold_also_removes_up_to_twice_the_threshold(multiple, sign, threshold):
    x = torch.tensor([sign * multiple * threshold], dtype=torch.float64)
    assert released_threshold(x, threshold).item() == 0
    assert soft_threshold(x, threshold).item() != 0


def test_released_threshold_leaves_an_entry_at_the_threshold_alone():
    x = torch.tensor([0.5, -0.5, 1.0, -1.0])
    assert released_threshold(x, 0.5).tolist() == [0.5, -0.5, 0.5, -0.5]
    assert soft_threshold(x, 0.5).tolist() == [0.0, 0.0, 0.5, -0.5]


@pytest.mark.parametrize("operator", [soft_threshold, released_threshold])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_number_a_scalar_tensor_and_a_full_tensor_act_alike(operator, dtype):
    x = torch.tensor(POINTS, dtype=dtype)
    expected = operator(x, 0.3)
    assert expected.dtype == dtype
    one = torch.tensor(0.3, dtype=torch.float64)
    for threshold in (one, one.expand(1), one.expand_as(x), torch.full_like(x, 0.3)):
        actual = operator(x, threshold)
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@modest
@given(st.lists(st.lists(finite, max_size=5), max_size=4), thresholds, st.sampled_from(DTYPES), st.booleans())
def test_foreach_forms_equal_the_elementwise_forms(rows, threshold, dtype, as_tensor):
    given_threshold = torch.tensor(threshold, dtype=torch.float64) if as_tensor else threshold
    for operator, in_place in PAIRS:
        tensors = [torch.tensor(row, dtype=dtype) for row in rows]
        expected = [operator(tensor, threshold) for tensor in tensors]
        in_place(tensors, given_threshold)
        assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


@pytest.mark.parametrize(("operator", "in_place"), PAIRS)
def test_foreach_forms_take_mixed_dtypes_layouts_and_one_threshold_for_each(operator, in_place):
    torch.manual_seed(0)
    tensors = [
        torch.randn(4),
        torch.randn(3, 2, dtype=torch.float64).T,
        torch.randn(5, dtype=torch.bfloat16),
        torch.randn(2, 3),
    ]
    limits = [torch.rand(4), torch.rand(2, 3), torch.tensor(0.4), torch.rand(3)]
    expected = [operator(t, limit) for t, limit in zip(tensors, limits, strict=True)]
    before = [(id(t), t.data_ptr()) for t in tensors]
    in_place(tensors, limits)
    assert [(id(t), t.data_ptr()) for t in tensors] == before
    assert all(torch.equal(t, e) for t, e in zip(tensors, expected, strict=True))


def test_the_foreach_form_computes_in_the_dtype_of_each_tensor():
    wide, narrow = torch.tensor([0.3125]), torch.tensor([0.3125], dtype=torch.bfloat16)
    soft_threshold_([wide, narrow], 0.3)  # which is 0.30078125 in bfloat16
    assert (wide.item(), narrow.item()) == (pytest.approx(0.0125, rel=1e-5), 0.01171875)


@pytest.mark.parametrize(("operator", "in_place"), PAIRS)
def test_foreach_forms_change_parameters_without_gradients(operator, in_place):
    gate = torch.nn.Parameter(torch.tensor([0.1, -2.0]))
    expected = operator(gate.detach(), 0.5)
    in_place((gate,), 0.5)
    assert torch.equal(gate.detach(), expected)
    assert gate.is_leaf


@pytest.mark.parametrize(("operator", "in_place"), PAIRS)
@pytest.mark.parametrize("threshold", [0.3, torch.empty((), device="meta"), torch.tensor(0.3)])
def test_no_value_is_read_back_by_the_host(operator, in_place, threshold):
    gates = [torch.empty(4, device="meta"), torch.empty(2, device="meta")]  # reading a value would raise
    assert operator(gates[0], threshold).device.type == "meta"
    in_place(gates, threshold)


@pytest.mark.parametrize("operator", [soft_threshold, released_threshold])
@pytest.mark.parametrize("threshold", [-0.1, math.nan])
def test_a_negative_threshold_is_an_error(operator, threshold):
    with pytest.raises(UsageError, match=rf"threshold must be at least 0; got {threshold}\."):
        operator(torch.ones(2), threshold)


@pytest.mark.parametrize("in_place", [soft_threshold_, released_threshold_])
def test_thresholds_that_do_not_fit_the_tensors_are_errors(in_place):
    gates = [torch.ones(2), torch.ones(2)]
    with pytest.raises(UsageError, match=r"at least 0; got -1\.0"):
        in_place(gates, -1.0)
    with pytest.raises(UsageError, match=r"got a single tensor of shape \(2,\)"):
        in_place(gates, torch.ones(2))
    with pytest.raises(UsageError, match="got 1 for 2 tensors"):
        in_place(gates, [torch.ones(2)])
    assert all(torch.equal(gate, torch.ones(2)) for gate in gates)


@pytest.mark.parametrize("step", [1, 10, torch.tensor(10.0), torch.tensor(10)])
def test_optimizer_metric_threshold_gives_the_proximal_map_in_adams_metric(step):
    weight, lr, beta2, eps = 0.7, 0.05, 0.999, 1e-3
    second_moment = torch.tensor([1e-8, 1e-6, 1e-5, 1e-4, 1e-3], dtype=torch.float64)
    threshold = optimizer_metric_threshold(weight, lr, second_moment, step, beta2, eps)
    for x in (-1.3, 0.2, 2.5):
        actual = soft_threshold(torch.full_like(second_moment, x), threshold)
        scale = [math.sqrt(v / (1 - beta2 ** float(step))) + eps for v in second_moment.tolist()]
        expected = [slow_prox_l1(x, weight, curvature=d / lr) for d in scale]
        torch.testing.assert_close(actual.tolist(), expected, rtol=0, atol=1e-4)


def test_optimizer_metric_threshold_is_the_lr_of_adams_own_step():
    """With λ = 1 the threshold is how far Adam's first step moves an entry, for every size of gradient."""
    gradient = torch.tensor([1e-6, 1e-3, 1.0], dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.Adam([parameter], lr=0.01, betas=(0.9, 0.99), eps=1e-5)
    parameter.grad = gradient.clone()
    optimizer.step()
    state = optimizer.state[parameter]
    threshold = optimizer_metric_threshold(1.0, 0.01, state["exp_avg_sq"], state["step"], 0.99, 1e-5)
    torch.testing.assert_close(threshold * gradient, -parameter.detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("step", [1.0, 2.0, 1000.0])
def test_a_counter_tensor_is_as_exact_as_a_number(step):
    second_moment = torch.tensor([1e-4, 1.0], dtype=torch.float64)
    number = optimizer_metric_threshold(0.5, 1e-3, second_moment, step, 0.999, 1e-8)
    tensor = optimizer_metric_threshold(
        0.5, torch.tensor(1e-3).double(), second_moment, torch.tensor(step), 0.999, 1e-8
    )
    torch.testing.assert_close(tensor, number, rtol=2e-7, atol=0)


@pytest.mark.parametrize("step", [3, torch.tensor(3.0)])
def test_optimizer_metric_threshold_without_memory_or_gradient(step):
    threshold = optimizer_metric_threshold(0.5, 0.1, torch.tensor([4.0, 0.0]), step, 0.0, 0.5)
    torch.testing.assert_close(threshold, torch.tensor([0.05 / 2.5, 0.05 / 0.5]))


def test_optimizer_metric_threshold_reads_no_value_back():
    scalar = torch.empty((), device="meta")
    threshold = optimizer_metric_threshold(0.5, scalar, torch.empty(3, device="meta"), scalar, 0.999, 1e-8)
    assert threshold.shape == (3,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": -1.0}, r"weight must be at least 0; got -1\.0"),
        ({"weight": math.nan}, "weight must be at least 0; got nan"),
        ({"weight": math.inf}, "weight must be finite and at least 0; got inf"),
        ({"step": 0}, "step must be at least 1; got 0"),
        ({"beta2": 1.0}, r"beta2 must be at least 0 and below 1; got 1\.0"),
        ({"beta2": -0.1}, r"beta2 must be at least 0 and below 1; got -0\.1"),
        ({"eps": 0.0}, r"eps must be above 0; got 0\.0"),
    ],
)
def test_impossible_optimizer_settings_are_errors(changed, message):
    arguments = {
        "weight": 1.0,
        "lr": 0.1,
        "second_moment": torch.ones(2),
        "step": 1,
        "beta2": 0.999,
        "eps": 1e-8,
    }
    with pytest.raises(UsageError, match=message):
        optimizer_metric_threshold(**(arguments | changed))
