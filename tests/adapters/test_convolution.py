"""lit_sparse.adapters.convolution against one convolution whose weight is W0 + BA."""

import copy

import pytest
import torch
import torch.nn.functional as F
from backbones import build_tiny
from torch import Tensor, nn
from torch.func import functional_call
from transformers import ConvNextForImageClassification

import lit_sparse as ls
from lit_sparse.adapters.convolution import LowRankConv2d

SETTINGS = {
    "1 × 1": {"kernel_size": 1},
    "3 × 3": {"kernel_size": 3},
    "2 × 3 without bias": {"kernel_size": (2, 3), "bias": False},
    "strided": {"kernel_size": 3, "stride": (2, 3)},
    "padded": {"kernel_size": 3, "padding": (1, 2)},
    "padded to the same size": {"kernel_size": (2, 3), "padding": "same"},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular, to the same size": {"kernel_size": 3, "padding": "same", "padding_mode": "circular"},
    "dilated": {"kernel_size": 2, "dilation": (2, 3)},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4, "padding_mode": "reflect", "stride": 2},
}
IN, OUT, RANK, SCALE = 4, 8, 3, 7 / 3

every_setting = pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])


def trained(
    setting: dict, gated: bool = False, dtype: torch.dtype = torch.float64, dropout: float = 0.0
) -> LowRankConv2d:
    """An adapter whose parameters are as far from their start as training would take them."""
    adapter = LowRankConv2d(nn.Conv2d(IN, OUT, **setting, dtype=dtype), RANK, SCALE, dropout, gated)
    with torch.no_grad():
        for parameter in (adapter.lora_A, adapter.lora_B_t, adapter.gate):
            if parameter is not None:
                parameter.normal_()
    return adapter


def slow_delta(adapter: LowRankConv2d) -> Tensor:
    """scale · Σᵢ gᵢ Bᵢ Aᵢ, entry by entry: row o of B meets the kernel that a rank's row of A spells."""
    delta = torch.zeros_like(adapter.base.weight)
    gate = [1.0] * RANK if adapter.gate is None else adapter.gate.tolist()
    for out in range(OUT):
        for i in range(RANK):
            kernel = adapter.lora_A[i].detach().reshape(delta.shape[1:])
            delta[out] += SCALE * gate[i] * float(adapter.lora_B.detach()[out, i]) * kernel
    return delta.detach()


def changed_base(adapter: LowRankConv2d) -> nn.Conv2d:
    base = copy.deepcopy(adapter.base)
    base.weight += slow_delta(adapter)
    return base


@every_setting
@gated_or_not
@pytest.mark.parametrize("shape", [(2, IN, 7, 8), (IN, 7, 8), (0, IN, 7, 8)], ids=["batch", "one image", "no image"])
def test_the_output_is_that_of_one_convolution(setting, gated, shape):
    adapter = trained(setting, gated)
    x = torch.randn(shape, dtype=torch.float64)
    y = adapter(x)
    torch.testing.assert_close(y, changed_base(adapter)(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.delta_weight(), slow_delta(adapter), rtol=0, atol=1e-13)


def test_the_matrix_has_a_column_for_every_weight_of_an_output():
    adapter = LowRankConv2d(nn.Conv2d(6, 8, (2, 3), groups=2), 5, 1.0, gated=True)
    assert adapter.lora_A.shape == (5, 3 * 2 * 3)
    assert adapter.lora_B.shape == (8, 5)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"lora_A", "lora_B_t", "gate"}
    assert adapter.bias is adapter.base.bias


@pytest.mark.parametrize("name", ["3 × 3", "strided", "reflecting", "depthwise"])
@gated_or_not
def test_gradients_pass_gradcheck(name, gated):
    adapter = trained(SETTINGS[name], gated)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters() if "base" not in n}
    x = torch.randn(1, IN, 4, 4, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return functional_call(adapter, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@every_setting
def test_training_starts_exactly_at_the_frozen_output(setting):
    base = nn.Conv2d(IN, OUT, **setting)
    x = torch.randn(2, IN, 7, 8)
    assert torch.equal(LowRankConv2d(base, RANK, SCALE, gated=True)(x), base(x))


@pytest.mark.parametrize("name", ["3 × 3", "depthwise"])
def test_dropout_zeroes_inputs_of_the_adapter_in_training_only(name):
    adapter = trained(SETTINGS[name], dropout=0.4)
    x = torch.randn(2, IN, 7, 8, dtype=torch.float64)
    adapter.eval()
    torch.testing.assert_close(adapter(x), changed_base(adapter)(x), rtol=0, atol=1e-12)
    adapter.train()
    torch.manual_seed(1)
    y = adapter(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.4)
    expected = adapter.base(x) + adapter.base._conv_forward(dropped, slow_delta(adapter), None)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["3 × 3", "depthwise"])
@gated_or_not
def test_a_bfloat16_convolution_gets_float32_parameters_and_gives_bfloat16(name, gated):
    adapter = trained(SETTINGS[name], gated, torch.bfloat16)
    assert adapter.lora_A.dtype == adapter.lora_B_t.dtype == torch.float32
    x = torch.randn(2, IN, 7, 8, dtype=torch.bfloat16)
    y = adapter(x)
    assert y.dtype == torch.bfloat16
    exact = copy.deepcopy(adapter).double()
    expected = changed_base(exact)(x.double())
    # Sums of some fifty products, each rounded to 8 bits.
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    y.sum().backward()
    assert adapter.lora_A.grad.dtype == adapter.lora_B_t.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["3 × 3", "depthwise"])
def test_autocast_narrows_the_arithmetic_but_not_the_gradients(name):
    adapter = trained(SETTINGS[name], gated=True, dtype=torch.float32)
    x = torch.randn(2, IN, 7, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    expected = adapter(x)
    assert (y - expected).abs().max() < 0.03 * expected.abs().max()
    y.sum().backward()
    assert {p.grad.dtype for p in (adapter.lora_A, adapter.lora_B_t, adapter.gate)} == {torch.float32}


@every_setting
@gated_or_not
def test_merging_gives_a_plain_convolution_with_the_same_output(setting, gated):
    model = nn.Sequential(nn.Identity(), trained(setting, gated))
    x = torch.randn(2, IN, 7, 8, dtype=torch.float64)
    expected, delta = model(x), slow_delta(model[1])
    before = model[1].base.weight.clone()
    ls.merge(model)
    assert type(model[1]) is nn.Conv2d
    torch.testing.assert_close(model[1].weight, before + delta, rtol=0, atol=1e-13)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_switched_off_it_is_the_base():
    adapter = trained(SETTINGS["groups"], gated=True)
    x = torch.randn(2, IN, 7, 8, dtype=torch.float64)
    with ls.disable_adapters(adapter):
        assert torch.equal(adapter(x), adapter.base(x))
    assert not torch.equal(adapter(x), adapter.base(x))


def test_memory_in_channels_last_changes_nothing():
    adapter = trained(SETTINGS["3 × 3"], gated=True)
    x = torch.randn(2, IN, 7, 8, dtype=torch.float64)
    expected = adapter(x)
    adapter.to(memory_format=torch.channels_last)
    torch.testing.assert_close(adapter(x.to(memory_format=torch.channels_last)), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(adapter.delta_weight(), slow_delta(adapter), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [ls.SoRA(["dwconv"], threshold=0.1, rank=3), ls.RoseLoRA(["dwconv"], density=0.2)])
def test_the_depthwise_convolutions_of_convnext(method):
    # Not the layer scale of 1e-6, which hides what a block computes.
    config = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "layer_scale_init_value": 1.0}
    model = build_tiny(ConvNextForImageClassification, **config).double().eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x).logits
    adapters = ls.inject(model, method)
    assert {type(adapter) for adapter in adapters.values()} == {LowRankConv2d}
    assert {(a.base.groups, a.in_features, a.out_features) for a in adapters.values()} == {(8, 49, 8), (16, 49, 16)}
    assert torch.equal(model(x).logits, expected)
    with torch.no_grad():
        for adapter in adapters.values():
            adapter.lora_B_t.normal_()
    changed = model(x).logits
    assert (changed - expected).abs().max() > 1e-3
    torch.testing.assert_close(ls.merge(model)(x).logits, changed, rtol=0, atol=1e-12)


class Scaled(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Scaled(IN, OUT, 3), r"computes something else than Conv2d \(Scaled\)"),
        (nn.utils.parametrizations.weight_norm(nn.Conv2d(IN, OUT, 3)), "computes its weight from other parameters"),
        (nn.utils.parametrizations.spectral_norm(nn.Conv2d(IN, OUT, 3)), "computes its weight from other parameters"),
    ],
    ids=["own forward", "weight norm", "spectral norm"],
)
def test_a_convolution_that_computes_otherwise_is_refused(layer, reason):
    with pytest.raises(ls.UsageError, match=f"'0' of Sequential, which {reason}"):
        ls.inject(nn.Sequential(layer), ls.LoRA(["0"]))
