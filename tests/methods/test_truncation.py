"""lit_sparse.truncate: the singular values that a slow reference keeps, within any budget."""

import itertools
import math

import pytest
import torch
from backbones import build_tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from trained import METHODS, as_trained, logits
from transformers import BertForSequenceClassification, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.statistics import live_ranks
from lit_sparse.methods.account import Account

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
METHODS = {
    **METHODS,
    "LoRA": ls.LoRA(rank=4),
    "RoseLoRA, rarely": ls.RoseLoRA(rank=3, density=0.3, update_every=2),
}
by_method = pytest.mark.parametrize("kind", METHODS)
pytestmark = pytest.mark.filterwarnings("ignore:A and B were sparse")


class Layers(nn.Module):
    """One of each kind of layer, of five different costs."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8, padding_idx=1)
        self.linear, self.narrow = nn.Linear(8, 12), nn.Linear(2, 3)
        self.convolution = nn.Conv2d(1, 3, 3)
        self.grouped = nn.Conv2d(3, 6, 2, groups=3)

    def forward(self, ids):
        rows = self.linear(self.embedding(ids))
        rows = rows + self.narrow(rows[..., :2]).sum(-1, keepdim=True)
        return self.grouped(self.convolution(rows.unsqueeze(1)))


def layers(kind="SoRA"):
    """In float64; for a method whose targets are all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Layers().double()
        arguments = {**METHODS[kind].init_args(), "target_modules": [name for name, _ in model.named_children()]}
        as_trained(model, type(METHODS[kind])(**arguments))
    return model


def adapters_of(model):
    return [adapter for _, adapter in ls.adapters_in(model)]


def products(model):
    """``scale · B diag(gate) A`` of every copy, spelt out, with the cost of a rank."""
    found = []
    for a in adapters_of(model):
        gate = a.effective_gate()
        gates = torch.ones(len(a.lora_A)).to(a.lora_A) if gate is None else gate
        for copy in range(a.copies):
            own = slice(copy * a.rank, (copy + 1) * a.rank)
            product = a.scale * a.lora_B_t[own].T @ torch.diag(gates[own]) @ a.lora_A[own]
            found.append((product.detach(), a.in_features + a.out_features))
    return found


def reference(model, budget):
    """What must be left of the products: singular values of all, by size, while the budget lasts."""
    found = products(model)
    decomposed = [torch.linalg.svd(product, full_matrices=False) for product, _ in found]
    pool = sorted(
        ((float(v), -place, -k) for place, (_, S, _) in enumerate(decomposed) for k, v in enumerate(S)), reverse=True
    )
    ranks = [0] * len(found)
    for value, place, _ in pool:
        cost = found[-place][1]
        if value > 1e-9 and cost <= budget:
            budget -= cost
            ranks[-place] += 1
    return [U[:, :r] * S[:r] @ V[:r] for (U, S, V), r in zip(decomposed, ranks, strict=True)], ranks


def held(model):
    """What the live ranks cost."""
    return sum((a.in_features + a.out_features) * int(live_ranks(a).sum()) for a in adapters_of(model))


@by_method
@pytest.mark.parametrize("share", [0.05, 0.3, 0.7, 1.0])
def test_the_largest_singular_values_of_all_layers_are_left(kind, share):
    model = layers(kind)
    scales = [adapter.scale for adapter in adapters_of(model)]
    limit = Account.of(share, adapters_of(model)).limit
    expected, ranks = reference(model, limit)
    assert list(ls.truncate(model, share).values()) == ranks
    for (product, _), wanted in zip(products(model), expected, strict=True):
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-12)
    assert held(model) <= limit
    assert [adapter.scale for adapter in adapters_of(model)] == scales
    assert all(bool(live_ranks(adapter).all()) for adapter in adapters_of(model))


@given(st.integers(min_value=15, max_value=400), st.sampled_from(sorted(METHODS)))
@settings(deadline=None, max_examples=60)
def test_the_budget_holds_and_nothing_that_is_cut_would_fit(parameters, kind):
    model = layers(kind)
    account = Account.of(parameters, adapters_of(model))
    before = {name: int(torch.linalg.matrix_rank(a.delta_weight().flatten(1))) for name, a in ls.adapters_in(model)}
    if account.limit > account.dense:
        with pytest.raises(ls.UsageError, match="Lower budget"):
            ls.truncate(model, parameters)
        return
    ranks = ls.truncate(model, parameters)
    left = parameters - held(model)
    assert left >= 0
    cut = [c for c, name in zip(account.costs, ranks, strict=True) if ranks[name] < before[name]]
    assert left < min(cut, default=math.inf)


def test_no_other_choice_of_as_many_ranks_is_nearer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(3, 6)).double()
    ls.inject(model, ls.LoRA(["0", "1", "2"], rank=3, train_head=False))
    for scale, adapter in zip((0.3, 1.0, 2.0), adapters_of(model), strict=True):
        adapter.lora_B_t.data.normal_(std=scale)
    before = [product for product, _ in products(model)]
    squares = [torch.linalg.svdvals(product)[:3].square().tolist() for product in before]
    for kept in range(1, 9):
        tried = [ranks for ranks in itertools.product(range(4), repeat=3) if sum(ranks) == kept]
        best = min(sum(sum(own[r:]) for own, r in zip(squares, ranks, strict=True)) for ranks in tried)
        copied = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 5), nn.Linear(3, 6)).double()
        ls.inject(copied, ls.LoRA(["0", "1", "2"], rank=3, train_head=False))
        copied.load_state_dict(model.state_dict())
        ls.truncate(copied, 9 * kept)
        after = [a.delta_weight() for a in adapters_of(copied)]
        error = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
        assert error == pytest.approx(best, rel=1e-9)


@by_method
def test_the_whole_budget_changes_the_function_by_rounding_only(kind):
    model = layers(kind)
    ids = torch.arange(24).view(2, 12) % 11
    before, padding = model(ids), model.embedding(torch.tensor(1))
    ranks = ls.truncate(model, 1.0)
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-12)
    assert ls.truncate(model, 1.0) == ranks
    torch.testing.assert_close(model(ids), before, rtol=0, atol=1e-12)
    assert ranks["narrow"] <= 2  # the product has no more ranks than its smaller side
    torch.testing.assert_close(model.embedding(torch.tensor(1)), padding, rtol=0, atol=1e-12)


def test_a_share_is_of_what_training_started_with_however_often_it_is_asked_for():
    model, other = layers(), layers()
    ls.truncate(model, 0.5)
    assert ls.truncate(model, 0.2) == ls.truncate(other, 0.2)
    with pytest.raises(ls.UsageError, match=r"0 of [\d,]+ parameters, less than the 5 of the smallest rank"):
        ls.truncate(model, 0.001)


@by_method
def test_factors_are_balanced_and_gates_alike(kind):
    model = layers(kind)
    ls.truncate(model, 0.4)
    for adapter in adapters_of(model):
        gate = adapter.effective_gate()
        gates = torch.ones(adapter.rank).to(adapter.lora_A) if gate is None else gate
        assert adapter.gate_function is not None or torch.equal(gates, torch.ones_like(gates))
        values = torch.linalg.svdvals(adapter.delta_weight().flatten(1))[: adapter.rank]
        torch.testing.assert_close(adapter.lora_A.norm(dim=1), (values / adapter.scale).sqrt())
        torch.testing.assert_close((adapter.lora_B_t.norm(dim=1) * gates), (values / adapter.scale).sqrt())


def test_inputs_and_outputs_that_no_rank_touches_stay_untouched():
    model = layers("LoRA")
    with torch.no_grad():
        model.embedding.lora_A[:, 1] = 0
        for _, adapter in ls.adapters_in(model):
            adapter.lora_B_t[:, 1:3] = 0
    ranks = ls.truncate(model, 0.9)
    assert not model.embedding.lora_A[:, 1].any()
    for name, adapter in ls.adapters_in(model):
        assert ranks[name]
        assert not adapter.lora_B_t[:, 1:3].any()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["SoRA", "HardConcreteLoRA"])
def test_experts_compete_one_by_one(kind, share):
    model = build_tiny(MixtralForCausalLM, num_local_experts=3, num_key_value_heads=4).double()
    as_trained(model, METHODS[kind])
    before = logits(model, IDS)
    limit = Account.of(share, adapters_of(model)).limit
    expected, _ = reference(model, limit)
    ls.truncate(model, share)
    assert held(model) <= limit
    for (product, _), wanted in zip(products(model), expected, strict=True):
        torch.testing.assert_close(product, wanted, rtol=0, atol=1e-12)
    if share == 1:
        torch.testing.assert_close(logits(model, IDS), before, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["SoRA", "RoseLoRA, rarely", "GatedRoseLoRA"])
def test_a_truncated_model_trains_on_with_its_method(kind):
    method = METHODS[kind]
    model = as_trained(build_tiny(BertForSequenceClassification), method)
    parameters = {name: id(p) for name, p in model.named_parameters()}
    for adapter in adapters_of(model):
        for buffer in adapter.buffers(recurse=False):
            buffer.fill_(0 if buffer.dtype == torch.bool else 7)
    ls.truncate(model, 0.3)
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    for adapter in adapters_of(model):
        for buffer in adapter.buffers(recurse=False):
            assert len(buffer) == adapter.rank
            assert torch.equal(buffer, torch.full_like(buffer, buffer.dtype == torch.bool))
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-3)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=4)
    for _ in range(4):
        model(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.isfinite(logits(model, IDS)).all()


def test_a_sparse_adapter_is_truncated_with_a_warning(recwarn):
    model = as_trained(build_tiny(BertForSequenceClassification), ls.RoseLoRA(rank=3, density=0.4))
    nonzero = sum(int(p.count_nonzero()) for a in adapters_of(model) for p in (a.lora_A, a.lora_B_t))
    with pytest.warns(UserWarning, match=rf"A and B were sparse at .*: {nonzero:,} non-zero parameters became [\d,]+"):
        ls.truncate(model, 1.0)
    ls.truncate(model, 0.5)
    ls.truncate(layers("SoRA"), 0.5)
    assert not [w for w in recwarn if "A and B were sparse" in str(w.message)]


def test_a_lora_of_peft_is_truncated_and_read_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    plain = build_tiny(BertForSequenceClassification)
    tuned = peft.get_peft_model(plain, peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "dense"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tuned.save_pretrained(tmp_path / "dense")
    model = build_tiny(BertForSequenceClassification)
    ls.load_peft(model, tmp_path / "dense")
    torch.testing.assert_close(logits(model, IDS), logits(tuned, IDS), rtol=0, atol=1e-6)
    ls.truncate(model, "2k")
    assert held(model) <= 2000 < held(model) + 64
    ls.export_peft(model, tmp_path / "small", layout="ragged")
    loaded = peft.PeftModel.from_pretrained(build_tiny(BertForSequenceClassification), tmp_path / "small")
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-6)
    entries = sum(p.numel() for name, p in loaded.named_parameters() if "lora_" in name)
    assert entries == held(model)


@torch.no_grad()
def spoilt():
    model = layers()
    model.linear.lora_A[0, 0] = math.nan
    return model


def switched_off():
    model = layers()
    model.linear.enabled = False
    return model


def from_principal():
    model = nn.Sequential(nn.Linear(6, 5))
    ls.inject(model, ls.LoRA(["0"], rank=2, init_weights="pissa", train_head=False))
    return model


def on_meta():
    model = nn.Sequential(nn.Linear(6, 5, device="meta"))
    with torch.device("meta"):
        ls.inject(model, ls.LoRA(["0"], rank=2, train_head=False))
    return model


def untrained():
    model = nn.Sequential(nn.Linear(6, 5))
    ls.inject(model, ls.LoRA(["0"], rank=2, train_head=False))
    return model


@torch.no_grad()
def of_zeros_where_it_is_cheap():
    model = layers("LoRA")
    model.narrow.lora_B_t.zero_()
    return model


REFUSED = {
    "no adapter": (Layers, 0.5, "Layers holds no adapter to truncate. Inject a method, or call load_peft"),
    "merged": (lambda: ls.merge(layers()), 0.5, "holds no adapter to truncate"),
    "switched off": (switched_off, 0.5, r"switched off at \['linear'\]. Call truncate outside"),
    "meta": (on_meta, 0.5, "parameters on the meta device"),
    "pissa": (from_principal, 0.5, r"\['0'\] started as a part of the frozen weights"),
    "nan": (spoilt, 0.5, r"not finite at \['linear'\]"),
    "untrained": (untrained, 0.5, "Nothing would be left: all of BA is zero, as before training"),
    "zeros": (of_zeros_where_it_is_cheap, 5, "pays for no rank of the layers where it is not"),
    "no budget": (layers, "a lot", "budget must be a share"),
    "too small": (layers, 4, "less than the 5 of the smallest rank"),
    "too large": (layers, "1M", "Lower budget"),
}


@pytest.mark.parametrize(("make", "budget", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_truncated_is_left_as_it_is(make, budget, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ls.UsageError, match=message):
        ls.truncate(model, budget)
    after = model.state_dict()
    assert all(value.is_meta or after[name].equal(value) or value.isnan().any() for name, value in before.items())


def test_a_model_of_peft_is_refused_with_what_to_do():
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(build_tiny(BertForSequenceClassification), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ls.UsageError, match=r"PEFT adapted PeftModel already.*load_peft"):
        ls.truncate(tuned, 0.5)


def test_frozen_gates_are_no_reason_to_refuse():
    model = layers()
    for adapter in adapters_of(model):
        adapter.gate.requires_grad_(False)
    ls.truncate(model, 0.2)
    assert not any(adapter.gate.requires_grad for adapter in adapters_of(model))
