"""lit_sparse.adapters.experts against a loop over tokens and their experts, each with a weight of W0 + BA."""

import copy
from dataclasses import replace
from inspect import signature
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from architectures import ARCHITECTURES, text
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.integrations.moe import use_experts_implementation

import lit_sparse as ls
from lit_sparse.adapters.experts import AdaptedExperts, ExpertWeight, LowRankExperts, expert_weights
from lit_sparse.adapters.grouped import RowGroups
from lit_sparse.adapters.statistics import layer_sparsity, sparsity_of
from lit_sparse.adapters.survey import left_out

FAMILIES = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "GPT-OSS"]
EXPERTS, HIDDEN, INNER, RANK, SCALE = 4, 16, 12, 3, 7 / 3
BOTH = ["gate_up_proj", "down_proj"]


class Ungated(nn.Module):
    """Experts without a gate, as Nemotron-H's, and a norm after each, as Muse Spark's."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(EXPERTS, INNER, HIDDEN))
        self.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER))
        self.act_fn = nn.ReLU()
        self.post_expert_norm = nn.LayerNorm(HIDDEN)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return slow_output(self, {}, hidden_states, top_k_index, top_k_weights)


# Older versions of transformers have no experts with a norm.
_NORM = (
    {"has_post_expert_norm": True} if "has_post_expert_norm" in signature(use_experts_implementation).parameters else {}
)
Ungated = use_experts_implementation(Ungated, has_gate=False, **_NORM)


def model_of(family: str) -> PreTrainedModel:
    return next(a for a in ARCHITECTURES if a.name == family).build()


def experts_of(family: str) -> nn.Module:
    """The experts of one block in float64, with weights and biases of a size at which every term counts."""
    if family == "ungated":
        module = Ungated(SimpleNamespace(_experts_implementation="eager"))
    else:
        model = model_of(family)
        model.set_experts_implementation("eager")  # the default one knows no float64
        module = model.model.layers[0].mlp.experts
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.5)
    return module


def adapted(module: nn.Module, names: list[str], gated: bool = False, dropout: float = 0.0) -> AdaptedExperts:
    """Adapters as training would leave them."""
    weights = {weight.name: weight for weight in expert_weights(module)}
    adapters = {name: LowRankExperts(weights[name], RANK, SCALE, dropout, gated) for name in names}
    with torch.no_grad():
        for adapter in adapters.values():
            for parameter in (adapter.lora_A, adapter.lora_B_t, adapter.gate):
                if parameter is not None:
                    parameter.normal_(std=0.5)
    return AdaptedExperts(module, adapters)


def routed(tokens: int = 6, chosen: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, the experts of each token and their weights."""
    x = torch.randn(tokens, HIDDEN, dtype=torch.float64)
    index = torch.stack([torch.randperm(EXPERTS)[:chosen] for _ in range(tokens)]) if tokens else torch.empty(0, chosen)
    return x, index.long(), torch.rand(tokens, chosen, dtype=torch.float64)


def slow_deltas(layer: AdaptedExperts) -> dict[str, list[Tensor]]:
    """For each adapted weight and expert, scale · Σᵢ gᵢ Bᵢ Aᵢ from that expert's own ranks, as (out, in)."""
    deltas: dict[str, list[Tensor]] = {}
    for name, adapter in layer.named_children():
        if not isinstance(adapter, LowRankExperts) or not adapter.enabled:
            continue
        for expert in range(EXPERTS):
            delta = torch.zeros(adapter.out_features, adapter.in_features, dtype=adapter.lora_A.dtype)
            for i in range(expert * RANK, (expert + 1) * RANK):
                gate = 1.0 if adapter.gate is None else adapter.gate[i]
                delta = delta + SCALE * gate * torch.outer(adapter.lora_B_t[i], adapter.lora_A[i])
            deltas.setdefault(name, []).append(delta)
    return deltas


def slow_output(base: nn.Module, deltas: dict[str, list[Tensor]], x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Token by token, expert by expert, with the matrix of each written out."""

    def project(name: str, expert: int, row: Tensor) -> Tensor:
        matrix = getattr(base, name)[expert]
        matrix = matrix.t() if base.is_transposed else matrix
        matrix = matrix + deltas[name][expert] if name in deltas else matrix
        return matrix @ row + (getattr(base, f"{name}_bias")[expert] if base.has_bias else 0)

    rows = []
    for token, row in enumerate(x):
        total = torch.zeros_like(row)
        for place, expert in enumerate(index[token].tolist()):
            if not base.has_gate:
                hidden = project("up_proj", expert, row).clamp(min=0)
            elif base.has_bias:  # GPT-OSS: interleaved, clamped
                both = project("gate_up_proj", expert, row)
                gate, up = both[::2].clamp(max=base.limit), both[1::2].clamp(-base.limit, base.limit)
                hidden = (up + 1) * gate * torch.sigmoid(base.alpha * gate)
            else:
                gate, up = project("gate_up_proj", expert, row).chunk(2)
                hidden = nn.functional.silu(gate) * up
            output = project("down_proj", expert, hidden)
            if getattr(base, "has_post_expert_norm", False):
                output = base.post_expert_norm(output)
            total = total + weights[token, place] * output
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros_like(x)


every_family = pytest.mark.parametrize("family", [*FAMILIES, "ungated"])
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["no gates", "gates"])


@every_family
def test_the_weights_are_found_and_their_shapes_are_those_of_one_expert(family):
    module = experts_of(family)
    up, down = expert_weights(module)
    assert (up.name, down.name) == ("up_proj" if family == "ungated" else "gate_up_proj", "down_proj")
    inner = down.weight.numel() // (EXPERTS * HIDDEN)
    for weight, in_features, out_features in (
        (up, HIDDEN, inner if family == "ungated" else 2 * inner),
        (down, inner, HIDDEN),
    ):
        adapter = LowRankExperts(weight, RANK, SCALE, gated=True)
        assert (adapter.copies, adapter.rank) == (EXPERTS, RANK)
        assert adapter.lora_A.shape == (EXPERTS * RANK, in_features)
        assert adapter.lora_B_t.shape == (EXPERTS * RANK, out_features)
        assert adapter.gate.shape == (EXPERTS * RANK,)
        assert adapter.weight is weight.weight
        assert adapter.delta_weight().shape == weight.weight.shape
        assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"lora_A", "lora_B_t", "gate"}


def test_other_modules_have_no_expert_weights():
    assert expert_weights(nn.Linear(2, 2)) == []
    assert expert_weights(model_of("Mixtral").model.layers[0].mlp) == []


@every_family
@gated_or_not
def test_training_starts_at_the_output_of_the_base(family, gated):
    module = experts_of(family)
    x, index, weights = routed()
    expected = module(x, index, weights)
    layer = AdaptedExperts(
        module, {w.name: LowRankExperts(w, RANK, SCALE, gated=gated) for w in expert_weights(module)}
    )
    torch.testing.assert_close(layer(x, index, weights), expected, rtol=0, atol=1e-12)


@every_family
@gated_or_not
@pytest.mark.parametrize("which", ["up", "down", "both"])
def test_the_output_is_that_of_the_loop(family, gated, which):
    module = experts_of(family)
    names = [weight.name for weight in expert_weights(module)]
    layer = adapted(module, {"up": names[:1], "down": names[1:], "both": names}[which], gated)
    x, index, weights = routed()
    expected = slow_output(module, slow_deltas(layer), x, index, weights)
    assert (expected - slow_output(module, {}, x, index, weights)).abs().max() > 0.1
    torch.testing.assert_close(layer(x, index, weights), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
@pytest.mark.parametrize(
    "index",
    [[[2], [2], [0]], [[1], [1], [1]], [[3, 0]], [[0, 1, 2, 3], [3, 2, 1, 0]]],
    ids=["one each", "all to one", "one token", "all experts"],
)
def test_experts_without_a_token_and_any_number_of_experts(family, index):
    layer = adapted(experts_of(family), BOTH, gated=True)
    index = torch.tensor(index)
    x, weights = torch.randn(len(index), HIDDEN, dtype=torch.float64), torch.rand(index.shape, dtype=torch.float64)
    y = layer(x, index, weights)
    torch.testing.assert_close(y, slow_output(layer.base, slow_deltas(layer), x, index, weights), rtol=0, atol=1e-11)
    y.sum().backward()
    idle = sorted(set(range(EXPERTS)) - set(index.flatten().tolist()))
    for name in BOTH:
        gradient = getattr(layer, name).lora_A.grad.view(EXPERTS, -1)
        assert (gradient == 0).all(1).nonzero().flatten().tolist() == idle


@every_family
def test_no_token_at_all(family):
    module = experts_of(family)
    layer = adapted(module, [weight.name for weight in expert_weights(module)], gated=True)
    x, index, weights = routed(tokens=0)
    y = layer(x.requires_grad_(), index, weights)
    assert y.shape == (0, HIDDEN)
    assert y.dtype == torch.float64
    y.sum().backward()  # as a process has it that got no token, whose peers wait for its gradients
    assert not layer.down_proj.lora_A.grad.any()


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS", "ungated"])
def test_gradients_are_those_of_the_loop(family):
    module = experts_of(family)
    layer = adapted(module, [weight.name for weight in expert_weights(module)], gated=True)
    x, index, weights = routed()
    x.requires_grad_()
    weights.requires_grad_()
    wanted = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 2 + 2 * 3
    loss_weight = torch.randn_like(x)
    expected = torch.autograd.grad(
        (slow_output(module, slow_deltas(layer), x, index, weights) * loss_weight).sum(), wanted
    )
    found = torch.autograd.grad((layer(x, index, weights) * loss_weight).sum(), wanted)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_gradients_pass_gradcheck():
    layer = adapted(experts_of("Qwen3-MoE"), ["down_proj"], gated=True)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}
    x, index, weights = routed(tokens=3)
    x, weights = 0.2 * x, weights.requires_grad_()

    def call(weights, *values):
        return functional_call(layer, dict(zip(parameters, values, strict=True)), (x, index, weights))

    assert torch.autograd.gradcheck(call, (weights, *parameters.values()))


def test_a_gate_belongs_to_one_expert():
    layer = adapted(experts_of("Mixtral"), ["down_proj"], gated=True)
    x, _, weights = routed(tokens=EXPERTS, chosen=1)
    index = torch.arange(EXPERTS).unsqueeze(1)
    before = layer(x, index, weights)
    with torch.no_grad():
        layer.down_proj.gate[2 * RANK + 1] = 0
    changed = (layer(x, index, weights) != before).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    layer = adapted(experts_of("Mixtral"), ["down_proj"], dropout=0.5)
    x, index, weights = routed()
    expected = slow_output(layer.base, slow_deltas(layer), x, index, weights)
    torch.testing.assert_close(layer.eval()(x, index, weights), expected, rtol=0, atol=1e-11)
    assert (layer.train()(x, index, weights) - expected).abs().max() > 0.1
    with torch.no_grad():
        layer.down_proj.lora_B_t.zero_()
    plain = slow_output(layer.base, {}, x, index, weights)
    torch.testing.assert_close(layer(x, index, weights), plain, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_switched_off_adapters_give_exactly_the_base(family):
    layer = adapted(experts_of(family), BOTH, gated=True)
    x, index, weights = routed()
    with ls.disable_adapters(layer):
        assert torch.equal(layer(x, index, weights), layer.base(x, index, weights))
    layer.down_proj.enabled = False  # one alone
    expected = slow_output(layer.base, slow_deltas(layer), x, index, weights)
    torch.testing.assert_close(layer(x, index, weights), expected, rtol=0, atol=1e-11)
    assert (expected - layer.base(x, index, weights)).abs().max() > 0.1


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_a_bfloat16_model_and_autocast_compute_in_bfloat16(family):
    layer = adapted(experts_of(family), BOTH, gated=True)
    x, index, weights = routed()
    x, index, weights = x[:3], index[:3], weights[:3]
    expected = layer(x, index, weights)

    narrow = copy.deepcopy(layer).to(torch.bfloat16)
    assert narrow.base.down_proj.dtype == torch.bfloat16
    assert narrow.down_proj.lora_A.dtype == torch.float64  # as every adapter, at least float32
    single = copy.deepcopy(layer).float()
    with torch.autocast("cpu", torch.bfloat16):
        cast = single(x.float(), index, weights.float())
    halved = narrow(x.bfloat16(), index, weights.float())  # routers give float32 weights
    assert (cast.dtype, halved.dtype) == (torch.float32, torch.bfloat16)
    for found in (cast, halved):
        assert 1e-4 < (found - expected).abs().max() / expected.abs().max() < 0.05
    cast.sum().backward()
    assert single.down_proj.lora_A.grad.dtype == torch.float32


# All experts in one product, where torch has it: not in float64, as above


needs_grouped = pytest.mark.skipif(not hasattr(nn.functional, "grouped_mm"), reason="torch has no grouped_mm")


@pytest.fixture
def no_wait(monkeypatch):
    """Fails where the number of rows of each expert is read, as the product of one expert after the other must."""

    def fail(groups):
        raise AssertionError("waited for the sizes of the groups")

    monkeypatch.setattr(RowGroups, "sizes", property(fail))


def wide_experts_of(family: str) -> nn.Module:
    """As :func:`experts_of`, with an inner size that fills 16 bytes in every dtype."""
    if family == "ungated":
        module = experts_of(family)
        module.up_proj = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, HIDDEN))
        module.down_proj = nn.Parameter(torch.randn(EXPERTS, HIDDEN, 2 * HIDDEN))
    else:
        architecture = next(a for a in ARCHITECTURES if a.name == family)
        sizes = dict.fromkeys(("intermediate_size", "moe_intermediate_size"), 2 * HIDDEN)
        model = replace(architecture, config={**architecture.config, **sizes}).build()
        module = model.model.layers[0].mlp.experts
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)
    return module


def gradients_of(layer, y: Tensor, x: Tensor, weights: Tensor, loss_weight: Tensor) -> list[Tensor]:
    wanted = [x, weights, *(p for p in layer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((y * loss_weight.to(y.dtype)).sum(), wanted))


@needs_grouped
@every_family
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1), (torch.float16, 0.01)])
@pytest.mark.parametrize("experts", [EXPERTS, EXPERTS - 2], ids=["all used", "two idle"])
def test_one_product_is_the_loop_in_values_and_gradients(family, dtype, close, experts, no_wait):
    module = wide_experts_of(family)
    layer = adapted(module, [weight.name for weight in expert_weights(module)], gated=True)
    x, index, weights = routed(tokens=9)
    index = index % experts
    x.requires_grad_()
    weights.requires_grad_()
    loss_weight = torch.randn_like(x)
    expected = slow_output(module, slow_deltas(layer), x, index, weights)
    wanted = gradients_of(layer, expected, x, weights, loss_weight)

    narrow = copy.deepcopy(layer).float().to(dtype)  # the adapters stay in float32
    own_x, own_weights = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weights))
    y = narrow(own_x, index, own_weights)
    assert y.dtype == dtype
    found = gradients_of(narrow, y, own_x, own_weights, loss_weight)
    for a, b in zip([y, *found], [expected, *wanted], strict=True):
        assert (a.double() - b).abs().max() / b.abs().max() < close
    idle = torch.stack([gradient.view(EXPERTS, -1).any(1) for gradient in found[2:]]).logical_not()
    assert idle.tolist() == [[expert >= experts for expert in range(EXPERTS)]] * (3 * 2)


@needs_grouped
@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_autocast_casts_what_one_product_takes(family, no_wait):
    layer = adapted(wide_experts_of(family), BOTH, gated=True)
    x, index, weights = routed()
    expected = slow_output(layer.base, slow_deltas(layer), x, index, weights)
    single = layer.float()
    with torch.autocast("cpu", torch.bfloat16):
        y = single(x.float(), index, weights.float())
    assert y.dtype == torch.float32
    assert 1e-4 < (y - expected).abs().max() / expected.abs().max() < 0.05
    y.sum().backward()
    assert single.down_proj.lora_A.grad.dtype == torch.float32


@needs_grouped
@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_any_number_of_ranks_is_one_product(family, no_wait):
    layer = adapted(wide_experts_of(family), BOTH, gated=True)
    with torch.no_grad():
        layer.gate_up_proj.gate.zero_()
        layer.down_proj.gate.view(EXPERTS, RANK)[:, 1:] = 0
    x, index, weights = routed()
    expected = slow_output(layer.base, slow_deltas(layer), x, index, weights)
    assert list(ls.compact(layer).values()) == [0, 1]
    found = layer.float()(x.float(), index, weights.float())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@needs_grouped
def test_dropout_is_off_in_evaluation_and_on_in_training(no_wait):
    layer = adapted(wide_experts_of("Mixtral"), BOTH, dropout=0.5).float()
    x, index, weights = routed()
    x, weights = x.float(), weights.float()
    expected = layer.eval()(x, index, weights)
    assert torch.equal(layer(x, index, weights), expected)
    assert (layer.train()(x, index, weights) - expected).abs().max() > 0.1


@pytest.mark.slow
@needs_grouped
def test_a_bfloat16_layer_compiles_in_one_graph():
    layer = adapted(wide_experts_of("Mixtral"), BOTH, gated=True).bfloat16()
    x, index, weights = routed()
    x, weights = x.bfloat16(), weights.bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, index, weights), layer(x, index, weights), rtol=0.05, atol=0.05)


@needs_grouped
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="needs a GPU for which torch has a kernel of its own",
)
def test_no_host_waits_for_a_gpu():
    layer = adapted(wide_experts_of("Mixtral"), BOTH, gated=True).bfloat16().cuda()
    x, index, weights = (tensor.cuda() for tensor in routed())
    x, weights = x.bfloat16().requires_grad_(), weights.bfloat16()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, index, weights).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# In a model


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_adapts_the_experts_and_names_what_stands_below_them(family):
    model = model_of(family)
    adapters = ls.inject(model, ls.LoRA(rank=2))
    names = [name for name, adapter in adapters.items() if isinstance(adapter, LowRankExperts)]
    assert names == [f"model.layers.{i}.mlp.experts.{name}" for i in (0, 1) for name in BOTH]
    assert [name for name, _ in ls.adapters_in(model)] == list(adapters)
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())
    assert not any("experts" in name for name in left_out(model) if not name.endswith("_bias"))


def test_the_weight_left_frozen_has_the_name_that_a_target_would_have():
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Module()
            self.part.base = model_of("Mixtral")  # a part of its name that is ours elsewhere

    model = Holder()
    chosen = ls.inject(model, ls.LoRA(["gate_up_proj"]))
    assert list(chosen) == [f"part.base.model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    for i in (0, 1):
        reason = left_out(model)[f"part.base.model.layers.{i}.mlp.experts.down_proj"]
        assert reason == "is not named by target_modules"


def test_a_deep_copy_is_equal_and_independent():
    layer = adapted(experts_of("Mixtral"), BOTH)
    x, index, weights = routed()
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x, index, weights), layer(x, index, weights))
    assert twin.down_proj.layer is twin.base is not layer.base
    with torch.no_grad():
        twin.base.down_proj.add_(1)
    assert not torch.equal(twin(x, index, weights), layer(x, index, weights))


@pytest.mark.parametrize("family", ["Mixtral", "GPT-OSS"])
def test_merging_changes_no_bit_that_an_expert_of_roselora_cannot_reach(family):
    model = model_of(family).double()
    model.set_experts_implementation("eager")
    batch = text()
    adapters = ls.inject(model, ls.RoseLoRA(BOTH, rank=2, density=0.1))
    before, reached = {}, {}
    with torch.no_grad():
        for name, adapter in adapters.items():
            adapter.weight[0, 0] = -0.0  # where a plain sum would write +0.0
            for matrix in (adapter.lora_A, adapter.lora_B_t):
                mask = ls.functional.top_fraction_mask(torch.rand_like(matrix), 0.1, dim=1)
                matrix.copy_(torch.randn_like(matrix) * mask)
            before[name] = adapter.weight.clone()
            # An expert at a time: the product of the supports of its own ranks.
            supports = [
                (b_t != 0).double().t() @ (a != 0).double() > 0
                for a, b_t in zip(adapter.lora_A.split(2), adapter.lora_B_t.split(2), strict=True)
            ]
            reached[name] = torch.stack([s.t() if adapter.layer.is_transposed else s for s in supports])
    model.eval()
    expected = model(**batch).logits
    ls.merge(model)
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=1e-12)
    for name, support in reached.items():
        weight = model.get_parameter(name)
        assert 0 < support.double().mean() < 0.1
        assert torch.equal(weight[~support].view(torch.int64), before[name][~support].view(torch.int64))
        assert (weight[support] != before[name][support]).all()


def test_statistics_are_counted_expert_by_expert():
    layer = adapted(experts_of("GPT-OSS"), BOTH, gated=True)
    with torch.no_grad():
        for _, adapter in ls.adapters_in(layer):
            for matrix in (adapter.lora_A, adapter.lora_B_t):
                matrix.mul_(torch.rand(matrix.shape) < 0.3)
            adapter.gate.mul_(torch.rand(EXPERTS * RANK) < 0.6)
    by_name = {layer.name: layer for layer in layer_sparsity(layer)}
    total = 0
    for name, adapter in ls.adapters_in(layer):
        entries_A = entries_B = ranks = reached = 0
        bounds = []
        for expert in range(EXPERTS):
            support, bound = set(), 0.0
            for i in range(expert * RANK, (expert + 1) * RANK):
                if adapter.gate[i] == 0:
                    continue
                columns = adapter.lora_A[i].nonzero().flatten().tolist()
                rows = adapter.lora_B_t[i].nonzero().flatten().tolist()
                ranks += 1
                entries_A += len(columns)
                entries_B += len(rows)
                support |= {(o, j) for o in rows for j in columns}
                bound += len(columns) / adapter.in_features * len(rows) / adapter.out_features
            reached += len(support)
            bounds.append(min(1.0, bound))
        found = by_name[name]
        assert 0 < ranks < EXPERTS * RANK
        assert (found.rank, found.max_rank) == (ranks, EXPERTS * RANK)
        assert found.remaining_parameters == entries_A + entries_B
        assert found.adapted_parameters == adapter.weight.numel()
        assert found.density_A == pytest.approx(entries_A / adapter.lora_A.numel())
        assert found.density_B == pytest.approx(entries_B / adapter.lora_B_t.numel())
        assert found.density_BA == pytest.approx(reached / adapter.weight.numel())
        assert found.density_BA_bound == pytest.approx(sum(bounds) / EXPERTS, abs=1e-6)
        total += entries_A + entries_B
    assert sparsity_of([adapter for _, adapter in ls.adapters_in(layer)])["remaining_parameters"] == total


class Watch(ls.RoseLoRA):
    """RoseLoRA that keeps the weights of its last step from before they are masked."""

    def after_step(self, adapters: Any, step: Any, observed: Any) -> None:
        self.unmasked = [adapter.lora_A.detach().clone() for adapter in adapters]
        super().after_step(adapters, step, observed)


@pytest.mark.parametrize("family", ["Qwen2-MoE", "GPT-OSS"])
def test_training_masks_every_experts_rows_and_a_checkpoint_restores_them(family, tmp_path):
    method = Watch(BOTH, rank=2, density=0.3, begin=0, end=2)
    module = ls.SparseModule(model_of(family), method, sgd, lr_schedule="constant", warmup=0.0)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=1, **quiet)
    trainer.fit(module, DataLoader([text()] * 3, batch_size=None))

    for (_, adapter), unmasked in zip(ls.adapters_in(module), method.unmasked, strict=True):
        keep = int(0.3 * adapter.in_features)
        for row, whole, scores in zip(adapter.lora_A, unmasked, adapter.get_buffer("sensitivity_A"), strict=True):
            best = sorted(range(adapter.in_features), key=lambda j: (-float(scores[j]), j))[:keep]
            expected = torch.zeros_like(row)
            expected[best] = whole[best]
            assert torch.equal(row, expected)
        assert (adapter.lora_B_t.count_nonzero(1) <= int(0.3 * adapter.out_features)).all()
        assert adapter.lora_B_t.any()

    trainer.save_checkpoint(tmp_path / "experts.ckpt")
    saved = torch.load(tmp_path / "experts.ckpt", weights_only=True)["state_dict"]
    assert not [name for name in saved if ".base." in name]
    loaded = ls.SparseModule.load_from_checkpoint(tmp_path / "experts.ckpt", backbone=model_of(family))
    assert torch.equal(loaded.eval()(**text()).logits, module.eval()(**text()).logits)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1.0)


# What cannot be adapted


def test_a_module_of_experts_alone_cannot_be_injected_into():
    with pytest.raises(ls.UsageError, match="has no linear layer, convolution or embedding to adapt"):
        ls.inject(experts_of("Mixtral"), ls.LoRA())


def quantize(model: PreTrainedModel, dtype: torch.dtype) -> None:
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.detach().to(dtype), requires_grad=False)


def share(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.experts.down_proj = model.model.layers[0].mlp.experts.down_proj


def spread(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.experts._is_expert_parallel = True


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: quantize(model, torch.int8), r"is quantized to torch\.int8"),
        (lambda model: quantize(model, torch.float8_e4m3fn), r"is quantized to torch\.float8_e4m3fn"),
        (share, r"shares its weight with 'model\.layers\.0\.mlp\.experts'"),
        (spread, "is spread over devices by expert parallelism"),
    ],
    ids=["integers", "float8", "shared", "expert parallel"],
)
def test_experts_that_cannot_be_adapted_are_refused_by_name(change, reason):
    model = model_of("Mixtral")
    change(model)
    with pytest.raises(ls.UsageError, match=rf"'model\.layers\.1\.mlp\.experts\.down_proj' .*{reason}"):
        ls.inject(model, ls.LoRA(r".*\.1\.mlp\.experts\.down_proj"))


def test_an_expert_weight_is_the_modules_own_parameter():
    module = experts_of("Mixtral")
    assert ExpertWeight(module, "down_proj").weight is module.down_proj
