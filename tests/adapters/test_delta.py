"""lit_sparse.DeltaLinear: single trained entries of a frozen weight, against a dense reference."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls

LAYERS = {
    "linear": lambda: nn.Linear(12, 7),
    "without bias": lambda: nn.Linear(12, 7, bias=False),
    "Conv1D": lambda: Conv1D(7, 12),
}


def layer_of(kind, dtype=torch.float32):
    torch.manual_seed(0)
    return LAYERS[kind]().to(dtype)


@torch.no_grad()
def adapter_of(base, count=9, scale=0.5):
    adapter = ls.DeltaLinear(base, count)
    generator = torch.Generator().manual_seed(1)
    adapter.indices.copy_(torch.randperm(base.weight.numel(), generator=generator)[:count].sort().values)
    adapter.values.copy_(torch.randn(count, generator=generator) * scale)
    return adapter


def dense_of(adapter):
    """ΔW, entry by entry."""
    rows, columns = adapter.base.weight.shape
    dense = torch.zeros(rows, columns, dtype=adapter.values.dtype)
    for place, value in zip(adapter.indices.tolist(), adapter.values.tolist(), strict=True):
        dense[place // columns, place % columns] = value
    return dense


def reference(base, weight, x):
    return F.linear(x, weight.t() if isinstance(base, Conv1D) else weight, base.bias)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("hooked", [False, True])
def test_outputs_and_gradients_are_those_of_the_dense_weight(kind, hooked):
    base = layer_of(kind, torch.float64)
    if hooked:  # by which the layer cannot be fused
        base.register_forward_hook(lambda *_: None)
    adapter = adapter_of(base)
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    delta = dense_of(adapter).requires_grad_()
    other = x.detach().clone().requires_grad_()
    y, expected = adapter(x), reference(base, base.weight + delta, other)
    torch.testing.assert_close(y, expected)
    coefficients = torch.randn_like(y)
    (y * coefficients).sum().backward()
    (expected * coefficients).sum().backward()
    torch.testing.assert_close(x.grad, other.grad)
    torch.testing.assert_close(adapter.values.grad, delta.grad.flatten()[adapter.indices.long()])
    assert base.weight.grad is None


def test_the_hand_written_backward_is_differentiable_twice():
    adapter = adapter_of(layer_of("linear", torch.float64))
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def function(x, values):
        with torch.no_grad():
            adapter.values.copy_(values)
        return torch.func.functional_call(adapter, {"values": values}, (x,))

    values = adapter.values.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(function, (x, values))
    assert torch.autograd.gradgradcheck(function, (x, values))


@pytest.mark.parametrize("kind", LAYERS)
def test_merging_changes_the_trained_entries_alone_bit_for_bit(kind):
    base = layer_of(kind)
    with torch.no_grad():
        base.weight.flatten()[0] = -0.0
    model = nn.Sequential(adapter_of(base))
    adapter, before = model[0], base.weight.detach().clone()
    with torch.no_grad():
        adapter.values[3] = 0.0
    expected, x = dense_of(adapter), torch.randn(4, 12)
    live = model(x)
    assert ls.merge(model)[0] is base
    bits = (base.weight.view(torch.int32) != before.view(torch.int32)).flatten()
    trained = adapter.indices.long()[adapter.values != 0]
    assert set(bits.nonzero().flatten().tolist()) == set(trained.tolist())
    torch.testing.assert_close(base.weight, before + expected, rtol=0, atol=0)
    torch.testing.assert_close(model(x), live)


def test_a_merge_is_undone_bit_for_bit():
    model = nn.Sequential(adapter_of(layer_of("linear")))
    adapter, before = model[0], model[0].base.weight.detach().clone()
    ls.merge(model, keep=True)
    assert not torch.equal(model[0].weight, before)
    assert list(ls.unmerge(model).values()) == [adapter]
    assert torch.equal(adapter.base.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_the_live_model_is_the_merged_one(dtype):
    """Values of a thousandth of the weight, which a product of their own would keep and the rounded sum does not."""
    model = nn.Sequential(adapter_of(layer_of("linear", dtype), scale=1e-3))
    assert model[0].values.dtype == torch.float32
    x = torch.randn(4, 12).to(dtype)
    live = model(x)
    assert live.dtype == dtype
    assert torch.equal(ls.merge(model)(x), live)


def test_autocast_computes_in_its_own_dtype_and_trains_float32():
    adapter = adapter_of(layer_of("linear"))
    x = torch.randn(4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert adapter.values.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), adapter(x), rtol=0.03, atol=0.03)


def test_no_dense_weight_is_kept_between_the_passes():
    """Of what a pass saves for the backward one, only the frozen weight and the input are that large."""
    base = nn.Linear(64, 64)
    adapter, kept = adapter_of(base, 40), []
    x = torch.randn(8, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        adapter(x)
    large = [t for t in kept if t.numel() >= 64 * 64]
    assert [t.data_ptr() for t in large] == [base.weight.data_ptr()]


def test_switched_off_it_is_the_frozen_layer():
    model = nn.Sequential(adapter_of(layer_of("linear")))
    x = torch.randn(4, 12)
    with ls.disable_adapters(model):
        assert torch.equal(model(x), model[0].base(x))
    assert not torch.equal(model(x), model[0].base(x))


def test_values_keep_their_precision_and_places_survive_copies():
    adapter = adapter_of(layer_of("linear"))
    adapter.half()
    assert adapter.base.weight.dtype == torch.float16
    assert adapter.values.dtype == torch.float32
    assert adapter.indices.dtype == torch.int32
    for other in (copy.deepcopy(adapter), pickle.loads(pickle.dumps(adapter))):  # noqa: S301
        assert torch.equal(other.indices, adapter.indices)
    fresh = ls.DeltaLinear(layer_of("linear"), 9)
    assert not fresh.is_placed
    fresh.load_state_dict({n: t for n, t in adapter.state_dict().items() if not n.startswith("base")}, strict=False)
    assert fresh.is_placed
    assert torch.equal(fresh.delta_weight(), adapter.delta_weight())


def test_it_is_compiled_with_the_same_gradients():
    adapter = adapter_of(layer_of("linear"))
    compiled = torch.compile(copy.deepcopy(adapter), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 12)
    for module in (adapter, compiled):
        module(x).square().sum().backward()
    torch.testing.assert_close(compiled.values.grad, adapter.values.grad)


def test_it_works_on_the_meta_device_and_with_all_entries():
    adapter = ls.DeltaLinear(nn.Linear(12, 7, device="meta"), 84)
    assert adapter(torch.empty(3, 12, device="meta")).shape == (3, 7)
    whole = ls.DeltaLinear(layer_of("linear"), 84)
    assert whole.is_placed


@pytest.mark.parametrize("count", [0, 85])
def test_impossible_numbers_of_entries_are_refused(count):
    with pytest.raises(ls.UsageError, match=f"A weight of 84 entries cannot have {count} trained ones"):
        ls.DeltaLinear(nn.Linear(12, 7), count)


def test_other_layers_are_refused():
    with pytest.raises(ls.UsageError, match=r"adapts nn\.Linear and Conv1D that are not quantized; got Embedding"):
        ls.DeltaLinear(nn.Embedding(12, 7), 3)
