"""lit_sparse.adapters.linear against its formula, written out."""

import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_full_backward_hook
from transformers.pytorch_utils import Conv1D

from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError
from lit_sparse.functional import top_fraction_mask
from lit_sparse.methods.gated_roselora import GatedRoseLoRA
from lit_sparse.methods.lora import LoRA
from lit_sparse.methods.roselora import RoseLoRA
from lit_sparse.methods.sora import SoRA

IN, OUT, RANK, SCALE = 5, 4, 3, 7 / 3
KINDS = ["linear", "linear without bias", "conv1d"]
SHAPES = [(IN,), (6, IN), (2, 3, IN), (2, 1, 3, IN), (0, IN), (2, 0, IN), (1, IN)]

every_kind = pytest.mark.parametrize("kind", KINDS)
gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])


def frozen(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    layer = Conv1D(OUT, IN) if kind == "conv1d" else nn.Linear(IN, OUT, bias=kind == "linear")
    if kind == "conv1d":
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer.to(dtype)


def trained(kind: str, gated: bool = False, dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> LowRankLinear:
    """An adapter whose parameters are as far from their start as training would take them."""
    adapter = LowRankLinear(frozen(kind, dtype), RANK, SCALE, dropout, gated)
    with torch.no_grad():
        for parameter in (adapter.lora_A, adapter.lora_B_t, adapter.gate):
            if parameter is not None:
                parameter.normal_()
    return adapter


def naive(base: nn.Module, x: Tensor, A: Tensor, B: Tensor, g: Tensor | None) -> Tensor:
    """base(x) + scale · (x Aᵀ ∘ g) Bᵀ, nothing folded, nothing in place."""
    weight = base.weight.t() if isinstance(base, nn.Linear) else base.weight
    frozen_output = x @ weight if base.bias is None else x @ weight + base.bias
    hidden = x @ A.t()
    return frozen_output + SCALE * (hidden if g is None else hidden * g) @ B.t()


def naive_of(adapter: LowRankLinear, x: Tensor) -> Tensor:
    return naive(adapter.base, x, adapter.lora_A, adapter.lora_B, adapter.gate)


@every_kind
@gated_or_not
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_is_the_formula(kind, gated, shape):
    adapter = trained(kind, gated)
    x = torch.randn(shape, dtype=torch.float64)
    y = adapter(x)
    assert y.shape == (*shape[:-1], OUT)
    torch.testing.assert_close(y, naive_of(adapter, x), rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("how", ["transposed", "strided", "expanded"])
def test_inputs_need_not_be_contiguous(kind, how):
    x = {
        "transposed": lambda: torch.randn(3, IN, 2, dtype=torch.float64).transpose(1, 2),
        "strided": lambda: torch.randn(4, 6, 2 * IN, dtype=torch.float64)[:, ::2, ::2],
        "expanded": lambda: torch.randn(1, 1, IN, dtype=torch.float64).expand(3, 2, IN),
    }[how]()
    assert not x.is_contiguous()
    before = x.clone()
    adapter = trained(kind, gated=True)
    torch.testing.assert_close(adapter(x), naive_of(adapter, x), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before)


@every_kind
@gated_or_not
def test_gradients_pass_gradcheck(kind, gated):
    adapter = trained(kind, gated)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters() if "base" not in n}
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)

    def call(x, *values):
        return functional_call(adapter, dict(zip(parameters, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *parameters.values()))


@every_kind
@gated_or_not
def test_gradients_are_those_of_the_formula(kind, gated):
    adapter = trained(kind, gated)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    loss_weight = torch.randn(2, 3, OUT, dtype=torch.float64)
    wanted = [x, adapter.lora_A, adapter.lora_B_t] + ([adapter.gate] if gated else [])
    expected = torch.autograd.grad((naive_of(adapter, x) * loss_weight).sum(), wanted)
    (adapter(x) * loss_weight).sum().backward()
    for tensor, gradient in zip(wanted, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-12, atol=1e-12)
    assert all(p.grad is None for p in adapter.base.parameters())


@every_kind
@gated_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(6, IN), (2, 3, IN)], ids=str)
def test_training_starts_exactly_at_the_frozen_output(kind, gated, dtype, shape):
    base = frozen(kind, dtype)
    x = torch.randn(shape, dtype=dtype)
    expected = base(x)
    assert torch.equal(LowRankLinear(base, RANK, SCALE, gated=gated)(x), expected)


def test_the_parameters_start_as_the_papers_say():
    adapter = LowRankLinear(nn.Linear(400, 30), 64, 1.0, gated=True)
    bound = 1 / math.sqrt(400)  # Kaiming-uniform with a = √5
    assert adapter.lora_A.abs().max() <= bound
    assert adapter.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not adapter.lora_B.any()
    assert (adapter.gate == 1).all()


def test_only_the_adapter_is_trainable():
    adapter = LowRankLinear(nn.Linear(IN, OUT), RANK, SCALE, gated=True)
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"lora_A", "lora_B_t", "gate"}
    assert adapter.lora_A.shape == (RANK, IN)
    assert adapter.lora_B.shape == (OUT, RANK)
    assert adapter.gate.shape == (RANK,)
    assert adapter.rank == RANK


def test_dropout_acts_in_training_only_and_on_the_adapter_only():
    adapter = trained("linear", dropout=0.5)
    x = torch.randn(200, IN, dtype=torch.float64)
    clean = naive_of(adapter, x)
    torch.testing.assert_close(adapter.eval()(x), clean)
    assert not torch.allclose(adapter.train()(x), clean)
    with torch.no_grad():
        adapter.lora_B_t.zero_()  # the frozen path alone: nothing may be dropped from it
    assert torch.equal(adapter(x), adapter.base(x))


def test_dropout_zeroes_inputs_of_A_and_rescales_the_rest():
    layer = nn.Linear(1000, 1, bias=False, dtype=torch.float64)
    adapter = LowRankLinear(layer, 1, 1.0, dropout=0.25)
    with torch.no_grad():
        layer.weight.zero_()
        adapter.lora_A.copy_(2.0 ** torch.arange(1000).remainder(2))
        adapter.lora_B_t.fill_(1.0)
    x = torch.eye(1000, dtype=torch.float64)  # row i shows what became of input i
    shares = adapter(x).detach().squeeze() / adapter.lora_A.detach().squeeze()
    assert set(shares.tolist()) == {0.0, 1 / 0.75}
    assert (shares == 0).double().mean() == pytest.approx(0.25, abs=0.05)


@every_kind
@gated_or_not
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_base_gets_float32_parameters(kind, gated, dtype):
    adapter = trained(kind, gated, dtype)
    assert {p.dtype for n, p in adapter.named_parameters() if "base" not in n} == {torch.float32}
    x = torch.randn(2, 3, IN, dtype=dtype, requires_grad=True)
    y = adapter(x)
    assert y.dtype == dtype
    reference = copy.deepcopy(adapter).float()
    wide = x.detach().float().requires_grad_()
    expected = naive_of(reference, wide)
    # Each of a handful of roundings is within eps of the numbers that are added.
    size = 8 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=size)

    y.float().square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if "base" not in name:
            assert parameter.grad.dtype == torch.float32
            gradient = reference.get_parameter(name).grad
            size = 16 * torch.finfo(dtype).eps * gradient.abs().max().item()
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=size)
    assert x.grad.dtype == dtype


@every_kind
@gated_or_not
def test_autocast_narrows_the_arithmetic_but_not_the_gradients(kind, gated):
    adapter = trained(kind, gated, torch.float32)
    reference = copy.deepcopy(adapter)
    x = torch.randn(2, 3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        y = adapter(x)
    assert y.dtype == torch.bfloat16
    expected = naive_of(reference, x)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    y.float().square().sum().backward()
    expected.square().sum().backward()
    for name, parameter in adapter.named_parameters():
        if "base" not in name:
            gradient = reference.get_parameter(name).grad
            assert parameter.grad.dtype == torch.float32
            torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0.1 * gradient.abs().max().item())


@pytest.mark.parametrize("how", ["half", "bfloat16", "to float16", "to bfloat16", "to an example tensor"])
def test_narrowing_a_model_narrows_the_base_alone(how):
    narrow = {
        "half": lambda m: m.half(),
        "bfloat16": lambda m: m.bfloat16(),
        "to float16": lambda m: m.to(torch.float16),
        "to bfloat16": lambda m: m.to(device="cpu", dtype=torch.bfloat16),
        "to an example tensor": lambda m: m.to(torch.zeros(1, dtype=torch.float16)),
    }[how]
    method = GatedRoseLoRA(threshold=0.1, freeze_zero_after=3, rank=RANK)  # the method with the most buffers
    adapter = method.adapt(frozen("linear", torch.float32))
    adapter.sensitivity_A.normal_()
    adapter(torch.randn(2, IN)).sum().backward()
    before = copy.deepcopy(adapter.state_dict())
    gradient = adapter.lora_B_t.grad.clone()
    model = narrow(nn.Sequential(adapter, nn.Linear(OUT, 1)))
    assert model[0] is adapter
    assert {model[0].base.weight.dtype, model[0].base.bias.dtype} == {model[1].weight.dtype}
    assert model[1].weight.dtype in (torch.float16, torch.bfloat16)
    for name, tensor in adapter.state_dict().items():
        if not name.startswith("base."):
            assert tensor.dtype == before[name].dtype
            assert torch.equal(tensor, before[name])
    assert torch.equal(adapter.lora_B_t.grad, gradient)
    x = torch.randn(2, IN, dtype=model[1].weight.dtype)
    assert model(x).dtype == x.dtype


def test_a_model_can_be_widened_and_back():
    adapter = trained("linear", gated=True, dtype=torch.float32)
    before = copy.deepcopy(adapter.state_dict())
    adapter.double()
    assert {t.dtype for t in adapter.state_dict().values()} == {torch.float64}
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), naive_of(adapter, x), rtol=1e-12, atol=1e-12)
    adapter.float()
    assert all(torch.equal(t, before[n]) and t.dtype == torch.float32 for n, t in adapter.state_dict().items())


def test_a_model_moves_to_another_device_and_dtype_at_once():
    adapter = RoseLoRA(rank=RANK).adapt(frozen("linear", torch.float32))
    adapter.to(device="meta", dtype=torch.float16)
    state = adapter.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    assert {n for n, t in state.items() if t.dtype == torch.float32} == {n for n in state if "base" not in n}
    assert adapter.to_empty(device="cpu").lora_A.device.type == "cpu"


def test_parameters_are_born_where_the_base_is():
    with torch.device("meta"):
        base = nn.Linear(IN, OUT)
    assert all(p.is_meta for p in LowRankLinear(base, RANK, SCALE, gated=True).parameters())


@every_kind
def test_a_forward_hook_of_the_base_keeps_the_frozen_output(kind):
    adapter = trained(kind, gated=True)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = adapter(x)
    kept = []
    adapter.base.register_forward_hook(lambda module, args, output: kept.append(output))
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)
    frozen_rows = naive(adapter.base, x, torch.zeros(1, IN).double(), torch.zeros(OUT, 1).double(), None)
    torch.testing.assert_close(kept[0], frozen_rows.reshape(-1, OUT), rtol=1e-12, atol=1e-12)


@every_kind
@pytest.mark.parametrize("hook", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_a_backward_hook_of_the_base_works(kind, hook):
    adapter = trained(kind, gated=True)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(adapter(x).square().sum(), x)
    seen = []
    getattr(adapter.base, hook)(lambda module, *gradients: seen.append(gradients[-1][0]))
    y = adapter(x)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(seen[0], 2 * y.detach().reshape(-1, OUT))


def test_global_hooks_see_the_frozen_output_too():
    adapter = trained("linear")
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    expected, frozen_output = adapter(x), adapter.base(x)
    kept = {}
    handles = [
        register_module_forward_hook(lambda module, args, output: kept.update({module: output})),
        register_module_full_backward_hook(lambda module, grad_input, grad_output: None),
    ]
    try:
        y = adapter(x)
        y.sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    assert torch.equal(y, expected)
    assert torch.equal(kept[adapter.base], frozen_output)


@every_kind
@gated_or_not
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference_gives_the_same_numbers(kind, gated, context):
    adapter = trained(kind, gated)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = adapter(x)
    assert expected.requires_grad
    with context():
        y = adapter(x)
    assert not y.requires_grad
    assert torch.equal(y, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(("kind", "gated"), [("linear", False), ("linear", True), ("conv1d", True)])
def test_compiles_in_one_graph(kind, gated, backend):
    torch._dynamo.reset()
    adapter = trained(kind, gated)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    compiled = torch.compile(adapter, fullgraph=True, backend=backend)
    parameters = [p for p in adapter.parameters() if p.requires_grad]
    expected = torch.autograd.grad(adapter(x).square().sum(), parameters)
    y = compiled(x)
    torch.testing.assert_close(y, adapter(x))
    for gradient, wanted in zip(torch.autograd.grad(y.square().sum(), parameters), expected, strict=True):
        torch.testing.assert_close(gradient, wanted)
    adapter.enabled = False  # must not be baked into the graph
    torch.testing.assert_close(compiled(x), adapter.base(x))


@every_kind
@gated_or_not
def test_a_deep_copy_is_equal_and_independent(kind, gated):
    adapter = trained(kind, gated)
    x = torch.randn(3, IN, dtype=torch.float64)
    expected = adapter(x).detach()
    twin = copy.deepcopy(adapter)
    with torch.no_grad():
        twin.lora_B.add_(1)
        assert not torch.allclose(twin(x), expected)
    assert torch.equal(adapter(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapter))(x), expected)  # noqa: S301


@every_kind
@gated_or_not
def test_a_state_dict_survives_a_file(kind, gated):
    adapter, file = trained(kind, gated), io.BytesIO()
    torch.save(adapter.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    optional = {"gate"} if gated else set()
    bias = set() if kind == "linear without bias" else {"base.bias"}
    assert set(state) == {"lora_A", "lora_B_t", "base.weight"} | optional | bias
    other = LowRankLinear(frozen(kind), RANK, SCALE, gated=gated)
    other.load_state_dict(state)
    x = torch.randn(3, IN, dtype=torch.float64)
    assert torch.equal(other(x), adapter(x))


@every_kind
@gated_or_not
def test_the_base_with_delta_weight_added_is_the_adapter(kind, gated):
    adapter = trained(kind, gated)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = adapter(x)
    delta = adapter.delta_weight()
    assert delta.shape == adapter.base.weight.shape
    assert not delta.requires_grad
    merged = copy.deepcopy(adapter.base)
    merged.weight.add_(delta)
    torch.testing.assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


def test_lora_B_is_a_window_on_the_parameter():
    adapter = trained("linear")
    with torch.no_grad():
        adapter.lora_B[1, 2] = 42.0
    assert adapter.lora_B_t[2, 1] == 42.0
    x = torch.randn(3, IN, dtype=torch.float64)
    torch.testing.assert_close(adapter(x), naive_of(adapter, x))


def test_weight_and_bias_are_those_of_the_base():
    adapter = trained("linear")
    assert adapter.weight is adapter.base.weight
    assert adapter.bias is adapter.base.bias
    assert trained("linear without bias").bias is None
    assert (adapter.in_features, adapter.out_features) == (IN, OUT)
    assert (trained("conv1d").in_features, trained("conv1d").out_features) == (IN, OUT)


@gated_or_not
def test_printing_a_model_shows_the_rank(gated):
    shown = repr(trained("linear", gated))
    assert f"in_features={IN}, out_features={OUT}, rank={RANK}" in shown
    assert ("gated" in shown) == gated


def test_switched_off_it_is_the_base():
    adapter = trained("linear", dropout=0.5)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    adapter.enabled = False
    assert torch.equal(adapter(x), adapter.base(x))


def test_only_linear_layers_can_be_adapted():
    with pytest.raises(UsageError, match=r"LowRankLinear adapts nn.Linear and Conv1D; got Embedding\."):
        LowRankLinear(nn.Embedding(3, 3), RANK, SCALE)


@pytest.mark.parametrize("rank", [0, -3])
def test_rank_must_be_positive(rank):
    with pytest.raises(UsageError, match=f"rank must be at least 1; got {rank}"):
        LowRankLinear(nn.Linear(IN, OUT), rank, SCALE)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, 1.5, math.nan])
def test_dropout_must_be_a_probability_below_one(dropout):
    with pytest.raises(UsageError, match=f"dropout must be at least 0 and below 1; got {dropout}"):
        LowRankLinear(nn.Linear(IN, OUT), RANK, SCALE, dropout)


def slow_support(A: Tensor, B: Tensor, live: Tensor) -> Tensor:
    """Entries of BA that some live rank reaches with two non-zero factors, found one by one."""
    reached = torch.zeros(B.shape[0], A.shape[1], dtype=torch.bool)
    for row in range(B.shape[0]):
        for column in range(A.shape[1]):
            reached[row, column] = any(
                bool(live[i]) and A[i, column] != 0 and B[row, i] != 0 for i in range(A.shape[0])
            )
    return reached


@pytest.mark.parametrize("base", [nn.Linear(40, 30), nn.Linear(40, 30, bias=False), Conv1D(30, 40)], ids=repr)
@pytest.mark.parametrize(
    "method",
    [RoseLoRA(rank=4, density=0.1), GatedRoseLoRA(rank=4, density=0.1, threshold=0.1)],
    ids=["RoseLoRA", "GatedRoseLoRA"],
)
def test_merging_changes_no_bit_outside_the_support(base, method):
    """The promise of RoseLoRA: what BA cannot reach stays bit-identical."""
    adapter = method.adapt(copy.deepcopy(base))
    live = torch.ones(4, dtype=torch.bool)
    with torch.no_grad():
        # Weights of every magnitude: where a change of the last bit would show.
        adapter.base.weight.normal_().mul_(10.0 ** torch.randint(-30, 4, adapter.base.weight.shape))
        for matrix in (adapter.lora_A, adapter.lora_B_t):
            matrix.normal_().mul_(top_fraction_mask(torch.rand_like(matrix), method.density, dim=1))
        if adapter.gate is not None:
            adapter.gate[2] = 0
            live[2] = False
        before = adapter.base.weight.clone()
        after = before + adapter.delta_weight()
    reached = slow_support(adapter.lora_A, adapter.lora_B, live)
    reached = reached.t() if isinstance(base, Conv1D) else reached
    assert 0 < reached.float().mean() < 0.1
    untouched = ~reached
    assert torch.equal(before[untouched].view(torch.int32), after[untouched].view(torch.int32))
    large = reached & (adapter.delta_weight().abs() > 1e-3 * before.abs())
    assert (before != after)[large].all()
    assert large.any()


@pytest.mark.parametrize(
    ("method", "scale"),
    [
        (LoRA(rank=4, alpha=8), 2.0),
        (SoRA(rank=4, alpha=2, threshold=0.1), 0.5),
        (RoseLoRA(rank=4), 1.0),
        (GatedRoseLoRA(rank=4, alpha=12, threshold=0.1), 3.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_method_passes_its_arguments_on(method, scale):
    adapter = method.adapt(nn.Linear(IN, OUT))
    assert (adapter.rank, adapter.scale) == (4, scale)
    assert (adapter.gate is not None) == method.gated
