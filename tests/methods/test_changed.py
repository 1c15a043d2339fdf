"""A share of weights that may change: hit in every run, by the entries that one threshold keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, text
from backbones import build_tiny
from nets import TARGETS, Net, SaveAfter, fit, of_net, train
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity

METHODS = {
    "RoseLoRA": lambda *targets, **o: ls.RoseLoRA(*targets, train_head=False, **o),
    "GatedRoseLoRA": lambda *targets, **o: ls.GatedRoseLoRA(*targets, train_head=False, **{"budget": 0.8, **o}),
}
by_method = pytest.mark.parametrize("kind", METHODS)


def support(model: nn.Module) -> list[Tensor]:
    """Which weights BA changes, layer by layer, from dense products."""
    found = []
    for _, adapter in ls.adapters_in(model):
        gate = torch.ones(len(adapter.lora_A)) if adapter.gate is None else adapter.gate.detach()
        B = adapter.lora_B_t.detach().ne(0).float() * gate.ne(0).unsqueeze(1)
        A = adapter.lora_A.detach().ne(0).float()
        copies = adapter.copies
        found.append((B.unflatten(0, (copies, -1)).mT @ A.unflatten(0, (copies, -1))) > 0)
    return found


def assert_on_target(changed: float, model: nn.Module, rank: int) -> None:
    """At most the target, and less by no more than one per cent, or what the entry of a row or column costs."""
    layers = support(model)
    limit, count = changed * sum(s.numel() for s in layers), sum(int(s.sum()) for s in layers)
    widest = max(max(s.shape[-2:]) for s in layers)
    assert count <= limit + 1e-6
    assert count > limit - max(0.01 * limit, widest)
    assert count >= rank


# The end is on the target.


@by_method
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize(("changed", "overrides"), [(0.2, None), (0.5, {"up": {"rank": 9}, "down": {"rank": 1}})])
def test_the_end_is_on_the_target(kind: str, lr: float, changed: float, overrides: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        method, model = METHODS[kind](TARGETS, rank=4, changed=changed, overrides=overrides), Net()
        train(method, model, of_net, 20, lr)
        assert_on_target(changed, model, 4)


@by_method
@pytest.mark.parametrize("options", [{"update_every": 3}, {"begin": 0, "end": 0}, {"begin": 2, "end": 9}, {"end": 1.0}])
def test_the_target_is_hit_on_every_schedule(kind: str, options: Any) -> None:
    method, model = METHODS[kind](TARGETS, rank=4, changed=0.2, **options), Net()
    train(method, model, of_net, 20)
    assert_on_target(0.2, model, 4)


@by_method
def test_every_expert_competes(kind: str) -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    method = METHODS[kind](["gate_up_proj", "down_proj", "q_proj"], rank=2, changed=0.1)
    train(method, model, lambda m: m(**text()).loss, 8)
    assert_on_target(0.1, model, 2)


def test_adapters_of_double_precision_are_on_the_target() -> None:
    method, model = METHODS["RoseLoRA"](TARGETS, rank=4, changed=0.2), Net().double()
    train(method, model, of_net, 20)
    assert next(iter(ls.adapters_in(model)))[1].lora_A.dtype == torch.float64
    assert_on_target(0.2, model, 4)


@pytest.mark.parametrize("update_every", [1, 5, 20])
def test_the_overlap_is_measured_however_rarely_entries_are_chosen(update_every: int) -> None:
    method, model = METHODS["RoseLoRA"](TARGETS, rank=8, changed=0.2, update_every=update_every, end=1.0), Net()
    train(method, model, of_net, 50)
    overlaps = [float(adapter.get_buffer("overlap")) for _, adapter in ls.adapters_in(model)]
    assert max(overlaps) > 1.0


def test_bert_is_on_the_target_within_one_per_cent() -> None:
    model, method = build_tiny(BertForSequenceClassification), ls.RoseLoRA(rank=8, changed=0.05)
    ids = torch.randint(5, 60, (8, 6))
    train(method, model, lambda m: m(ids, labels=ids[:, 0] % 2).loss, 40)
    layers = layer_sparsity(model)
    limit = 0.05 * sum(layer.adapted_parameters for layer in layers)
    assert 0.99 * limit < sum(layer.density_BA * layer.adapted_parameters for layer in layers) <= limit


# The entries are those of a threshold.


def test_every_step_keeps_the_entries_above_one_threshold() -> None:
    steps, begin, end = 16, 3, 12
    method, model = METHODS["RoseLoRA"](TARGETS, rank=3, changed=0.2, begin=begin, end=end), Net()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-2)
    sparse = ls.SparseSteps(method, model, optimizer, steps)
    total = sum(a.in_features * a.out_features for a in adapters)
    last: list[Tensor] = []
    for step in range(1, steps + 1):
        of_net(model).backward()
        sparse.observe()
        optimizer.step()
        optimizer.zero_grad()
        matrices = [(w.detach(), a.get_buffer(f"sensitivity_{n}")) for a in adapters for n, w in
                    (("A", a.lora_A), ("B_t", a.lora_B_t))]  # fmt: skip
        kept = [weight != 0 for weight, _ in matrices]
        if step <= begin:
            assert all(mask.all() for mask in kept)
        elif step <= end:
            outside = [s * ~mask for mask, (_, s) in zip(kept, matrices, strict=True)]
            highest = max(float(s.max()) for s in outside)
            for mask, (_, scores) in zip(kept, matrices, strict=True):
                for row, row_mask in zip(scores, mask, strict=True):  # below the threshold only the row's largest
                    own = row[row_mask]
                    assert (own > highest).all() or (own.numel() == 1 and own == row.max()), step
            left = 1 - (step - begin) / (end - begin)
            allowed = total * (0.2 + 0.8 * left**3)
            paid = sum(int((A.sum(1) * B.sum(1)).sum()) for A, B in zip(kept[::2], kept[1::2], strict=True))
            assert paid <= allowed or step == end
            last = kept
        else:
            assert all(torch.equal(mask & before, mask) for mask, before in zip(kept, last, strict=True))
    assert_on_target(0.2, model, 3)


@by_method
def test_from_the_end_on_the_choice_stays_and_the_rest_trains_on(kind: str) -> None:
    seen: list[list[Tensor]] = []

    def look(_: int) -> None:
        seen.append([w.detach().clone() for _, a in ls.adapters_in(model) for w in (a.lora_A, a.lora_B_t)])

    method, model = METHODS[kind](TARGETS, rank=4, changed=0.2, end=0.5), Net()
    train(method, model, of_net, 30, 3e-2, after=look)
    assert method.settled_after(30) == 15
    for now in seen[15:]:
        assert all(torch.equal(a != 0, b != 0) for a, b in zip(now, seen[14], strict=True))
    assert not torch.equal(seen[15][0], seen[29][0])


def test_a_layer_that_the_loss_never_reached_keeps_nothing() -> None:
    method, model = METHODS["RoseLoRA"](TARGETS, rank=4, changed=0.2), Net()
    down = ls.inject(model, method)["down"]
    nn.init.zeros_(model.down.base.weight)  # type: ignore[union-attr]
    train(method, model, lambda m: m.up(torch.randn(4, 30)).square().sum(), 20)
    assert not down.lora_A.any()
    assert not down.lora_B_t.any()
    assert_on_target(0.2, model, 4)


# What a run and its files have.


@by_method
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_in_the_middle_of_the_schedule_ends_bit_for_bit_alike(kind: str, accumulate: int) -> None:
    def method() -> Any:
        return METHODS[kind](TARGETS, rank=4, changed=0.2, end=0.8)

    straight = fit(method(), SaveAfter(2), accumulate_grad_batches=accumulate)
    middle = torch.load("middle.ckpt", weights_only=True)["state_dict"]
    masks = torch.cat([value.flatten() for name, value in middle.items() if "mask_" in name])
    assert 0 < int((~masks).sum()) < masks.numel()
    resumed = fit(method(), resume="middle.ckpt", accumulate_grad_batches=accumulate)
    assert_on_target(0.2, straight.net, 4)
    expected = straight.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.filterwarnings("ignore")
def test_compaction_on_the_way_keeps_the_target() -> None:
    module = fit(METHODS["GatedRoseLoRA"](TARGETS, rank=4, budget=0.3, changed=0.2), ls.CompactRanks(2))
    assert sum(adapter.rank for _, adapter in ls.adapters_in(module)) < 8
    assert_on_target(0.2, module.net, 2)


def test_the_delta_holds_as_many_weights_as_the_target(tmp_path: Path) -> None:
    model, method = build_tiny(BertForSequenceClassification), ls.RoseLoRA(rank=4, changed=0.1, train_head=False)
    ids = torch.randint(5, 60, (8, 6))
    train(method, model, lambda m: m(ids, labels=ids[:, 0] % 2).loss, 12)
    before = {name: a.base.weight.detach().clone() for name, a in ls.adapters_in(model)}
    count = sum(int(s.sum()) for s in support(model))
    ls.merge(model)
    moved = sum(int((model.get_submodule(n).weight != w).sum()) for n, w in before.items())  # type: ignore[operator]
    assert 0.9 * count < moved <= count <= 0.1 * sum(w.numel() for w in before.values())


# Arguments and checks.


def test_the_goal_and_a_run_that_ends_above_it() -> None:
    method, model = METHODS["RoseLoRA"](TARGETS, rank=4, changed=0.2, end=30), Net()
    adapters = list(ls.inject(model, method).values())
    assert method.goal(adapters) == "At most 180 of 903 adapted weights change from end=30 on."
    with pytest.warns(UserWarning, match="weights change, more than the 180 of changed=0.2"):
        train(method, model, of_net, 20)


def test_both_goals_are_told() -> None:
    method, model = METHODS["GatedRoseLoRA"](TARGETS, rank=4, changed=0.2, budget=0.5), Net()
    goal = method.goal(list(ls.inject(model, method).values()))
    assert "The budget leaves at most 224 of 448 parameters" in goal
    assert "At most 180 of 903 adapted weights change" in goal


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"changed": 0.1, "density": 0.1}, r"Give changed \(.*\) or density \(.*\); got changed=0.1 and density=0.1"),
        ({"changed": 0.0}, "changed must be"),
        ({"changed": 1.5}, "changed must be"),
        ({"changed": 0.1, "overrides": {"up": {"density": 0.1}}}, r"set \['density'\]"),
    ],
)
def test_arguments(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ls.UsageError, match=said):
        ls.RoseLoRA(**arguments)


def test_density_is_the_papers_unless_changed_is_given() -> None:
    assert ls.RoseLoRA().density == 0.05
    assert ls.RoseLoRA(changed=0.1).density is None
    assert ls.RoseLoRA(density=0.3, overrides={"up": {"density": 0.1}}).changed is None


def test_a_share_that_leaves_a_rank_nothing_is_refused() -> None:
    with pytest.raises(ls.UsageError, match=r"lets 9 of 903 adapted weights change, fewer than the 16 ranks"):
        train(METHODS["RoseLoRA"](TARGETS, rank=4, changed=0.01), Net(), of_net, 20)
