"""lit_sparse.adapters.embedding against an embedding of W0 + BA."""

import copy

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from torch.func import functional_call

import lit_sparse as ls
from lit_sparse.adapters.embedding import LowRankEmbedding

TOKENS, WIDTH, RANK, SCALE = 11, 6, 3, 7 / 3
SHAPES = [(), (4,), (2, 5), (2, 1, 3), (0,), (2, 0)]

gated_or_not = pytest.mark.parametrize("gated", [False, True], ids=["ungated", "gated"])


def trained(gated: bool = False, dtype: torch.dtype = torch.float64, **options) -> LowRankEmbedding:
    """An adapter as training would leave it; the column of padding is what it was at the start."""
    adapter = LowRankEmbedding(nn.Embedding(TOKENS, WIDTH, dtype=dtype, **options), RANK, SCALE, gated)
    with torch.no_grad():
        adapter.lora_B_t.normal_()
        if gated:
            adapter.gate.normal_()
    return adapter


def slow_output(adapter: LowRankEmbedding, ids: Tensor) -> Tensor:
    """W0[id] + scale · Σᵢ gᵢ Aᵢ[id] · column i of B, id by id."""
    gate = [1.0] * RANK if adapter.gate is None else adapter.gate.tolist()
    rows = []
    for i in ids.flatten().tolist():
        row = adapter.base.weight[i].detach().clone()
        for r in range(RANK):
            row += SCALE * gate[r] * float(adapter.lora_A.detach()[r, i]) * adapter.lora_B[:, r].detach()
        rows.append(row)
    return torch.stack(rows).view(*ids.shape, WIDTH) if rows else torch.zeros(*ids.shape, WIDTH, dtype=torch.float64)


@gated_or_not
@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_output_is_that_of_the_changed_embedding(gated, options, shape):
    adapter = trained(gated, **options)
    ids = torch.randint(0, TOKENS, shape)
    y = adapter(ids)
    assert y.shape == (*shape, WIDTH)
    torch.testing.assert_close(y, slow_output(adapter, ids), rtol=0, atol=1e-13)
    changed = copy.deepcopy(adapter.base)
    changed.weight += adapter.delta_weight()
    torch.testing.assert_close(changed(ids), y, rtol=0, atol=1e-13)


@gated_or_not
def test_gradients_pass_gradcheck(gated):
    adapter = trained(gated)
    parameters = {n: p.detach().clone().requires_grad_() for n, p in adapter.named_parameters() if "base" not in n}
    ids = torch.tensor([[1, 2, 2], [5, 1, 10]])  # some tokens twice, most never

    def call(*values):
        return functional_call(adapter, dict(zip(parameters, values, strict=True)), (ids,))

    assert torch.autograd.gradcheck(call, tuple(parameters.values()))


def test_padding_keeps_its_embedding_while_the_rest_is_trained():
    """As nn.Embedding promises of its own row."""
    adapter = LowRankEmbedding(nn.Embedding(TOKENS, WIDTH, padding_idx=4), RANK, SCALE)
    before = adapter.base.weight.clone()
    optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (adapter(torch.arange(TOKENS)) - 1).square().sum().backward()
        optimizer.step()
    delta = adapter.delta_weight()
    assert (delta != 0).all(1).tolist() == [i != 4 for i in range(TOKENS)]
    model = ls.merge(nn.Sequential(adapter))
    assert torch.equal(model[0].weight[4], before[4])


def test_the_weight_is_the_transpose_of_the_matrix():
    adapter = LowRankEmbedding(nn.Embedding(TOKENS, WIDTH), RANK, SCALE, gated=True)
    assert adapter.lora_A.shape == (RANK, TOKENS)
    assert adapter.lora_B.shape == (WIDTH, RANK)
    assert adapter.delta_weight().shape == (TOKENS, WIDTH)
    assert adapter.bias is None
    assert adapter.weight is adapter.base.weight
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {"lora_A", "lora_B_t", "gate"}


def test_training_starts_exactly_at_the_frozen_output():
    base = nn.Embedding(TOKENS, WIDTH)
    assert torch.equal(LowRankEmbedding(base, RANK, SCALE, gated=True)(torch.arange(TOKENS)), base.weight)


@gated_or_not
def test_a_bfloat16_embedding_rounds_the_sum_of_the_adapter_once(gated):
    adapter = trained(gated, torch.bfloat16)
    assert adapter.lora_A.dtype == adapter.lora_B_t.dtype == torch.float32
    ids = torch.arange(TOKENS)
    expected = adapter.base.weight + adapter.delta_weight().to(torch.bfloat16)
    assert torch.equal(adapter(ids), expected)
    with torch.autocast("cpu", torch.bfloat16):
        y = trained(gated, torch.float32)(ids)
    assert y.dtype == torch.float32  # autocast leaves embeddings alone


@pytest.mark.parametrize("method", [ls.LoRA(["wte"], rank=2), ls.GatedRoseLoRA(["wte"], rank=2, threshold=0.1)])
def test_a_named_embedding_is_adapted_and_merged(method):
    model = nn.ModuleDict({"wte": nn.Embedding(TOKENS, WIDTH), "out": nn.Linear(WIDTH, 2)}).double()
    (adapter,) = ls.inject(model, method).values()
    with torch.no_grad():
        adapter.lora_B_t.normal_()
    ids = torch.randint(0, TOKENS, (3, 4))
    expected = model["wte"](ids)
    ls.merge(model)
    assert type(model["wte"]) is nn.Embedding
    torch.testing.assert_close(model["wte"](ids), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("architecture", "target", "kind"),
    [
        ("Gemma 3", "embed_tokens", "Gemma3TextScaledWordEmbedding"),
        ("OPT", "embed_positions", "OPTLearnedPositionalEmbedding"),
    ],
)
def test_an_embedding_of_transformers_that_computes_otherwise_is_refused(architecture, target, kind):
    model = next(a for a in ARCHITECTURES if a.name == architecture).build()
    if architecture == "Gemma 3":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.clone())  # else it is refused as shared
    with pytest.raises(ls.UsageError, match=rf"computes something else than Embedding \({kind}\)"):
        ls.inject(model, ls.LoRA([target]))


def test_an_embedding_that_changes_its_weight_when_it_is_called_is_refused():
    model = nn.Sequential(nn.Embedding(TOKENS, WIDTH, max_norm=1.0))
    with pytest.raises(ls.UsageError, match="'0' of Sequential, which computes something else than Embedding"):
        ls.inject(model, ls.LoRA(["0"]))
