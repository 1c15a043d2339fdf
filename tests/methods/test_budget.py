"""A budget for gates: hit in every run, by the ranks that a loop would choose, and final from its end on."""

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, text
from backbones import build_tiny
from nets import TARGETS, Net, SaveAfter, fit, of_net, train
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.statistics import sparsity_of
from lit_sparse.methods.account import Account, parse_budget
from lit_sparse.methods.step import Run

METHODS = {
    "SoRA": lambda *targets, **o: ls.SoRA(*targets, train_head=False, **o),
    "GatedRoseLoRA": lambda *targets, **o: ls.GatedRoseLoRA(*targets, train_head=False, **{"density": 0.5, **o}),
}
SCORES = ("norm", "sensitivity")
pytestmark = pytest.mark.filterwarnings("ignore:density")
by_method = pytest.mark.parametrize("kind", METHODS)
by_score = pytest.mark.parametrize("score", SCORES)
CASES = [("SoRA", "singular"), *((kind, score) for kind in METHODS for score in SCORES)]
by_case = pytest.mark.parametrize(("kind", "score"), CASES)


def account(method: Any, model: nn.Module) -> Account:
    return Account.of(method.budget, [adapter for _, adapter in ls.adapters_in(model)])


def held(method: Any, model: nn.Module) -> int:
    """What the ranks with open gates cost."""
    costs = account(method, model).costs
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    return sum(c * int((a.gate != 0).sum()) for c, a in zip(costs, adapters, strict=True))  # type: ignore[arg-type]


def gates(model: nn.Module) -> Tensor:
    return torch.cat([adapter.gate.detach() for _, adapter in ls.adapters_in(model)])  # type: ignore[union-attr]


def assert_on_budget(method: Any, model: nn.Module) -> None:
    found, spent = account(method, model), held(method, model)
    assert spent <= found.limit
    assert spent > found.limit - max(0.01 * found.limit, max(found.costs))


# The end is on the budget.


@by_case
@pytest.mark.parametrize("lr", [1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize(("budget", "overrides"), [(0.25, None), (0.5, {"up": {"rank": 9}, "down": {"rank": 1}})])
def test_the_end_is_on_the_budget(kind: str, score: str, lr: float, budget: float, overrides: Any) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        method, model = METHODS[kind](TARGETS, rank=4, budget=budget, score=score, overrides=overrides), Net()
        train(method, model, of_net, 20, lr)
        assert_on_budget(method, model)
        assert int(account(method, model).limit) == math.floor(budget * account(method, model).dense)


@by_case
def test_every_expert_competes(kind: str, score: str) -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    method = METHODS[kind](["gate_up_proj", "down_proj", "q_proj"], rank=2, budget=0.3, score=score)
    train(method, model, lambda m: m(**text()).loss, 8)
    assert_on_budget(method, model)
    experts = [a for _, a in ls.adapters_in(model) if a.copies > 1]
    counts = torch.cat([(a.gate != 0).view(a.copies, -1).sum(1) for a in experts])  # type: ignore[union-attr]
    assert counts.unique().numel() > 1


@by_method
@pytest.mark.parametrize(
    ("budget", "limit", "unit"),
    [
        (0.25, 0.25, "share"), ("0.25", 0.25, "share"), (1, 1.0, "share"), ("1.0", 1.0, "share"), (1e-5, 1e-5, "share"),
        (20000, 20000, "parameters"), ("20000", 20000, "parameters"), (20000.0, 20000, "parameters"),
        ("500k", 500_000, "parameters"), ("1.2M", 1_200_000, "parameters"), ("0.5 k", 500, "parameters"),
        ("2MB", 2_000_000, "bytes"), ("500kB", 500_000, "bytes"), ("1.1 gb", 1_100_000_000, "bytes"),
        ("300B", 300, "bytes"),
    ],
)  # fmt: skip
def test_a_budget_is_a_share_parameters_or_bytes(kind: str, budget: Any, limit: float, unit: str) -> None:
    assert parse_budget(METHODS[kind](budget=budget).budget) == (limit, unit)


@by_method
@pytest.mark.parametrize(
    "budget", [0, 0.0, -0.5, 1.5, math.nan, math.inf, "", "a lot", "2MiB", "2 TB", "k", "-1k", "0k", "1e20"]
)
def test_what_is_no_budget_is_refused(kind: str, budget: Any) -> None:
    with pytest.raises(ls.UsageError, match=r"budget must be a share in \(0, 1\] such as 0\.25, .*; got "):
        METHODS[kind](budget=budget)


@by_method
def test_bytes_are_those_of_the_adapters_dtype(kind: str) -> None:
    for dtype, size in ((torch.float32, 4), (torch.float64, 8), (torch.bfloat16, 4)):
        method, model = METHODS[kind](["up", "down"], rank=3, budget="0.9kB"), Net().to(dtype)
        ls.inject(model, method)
        assert account(method, model)[:3] == ([54 * size, 27 * size], 3 * 81 * size, 900)


# The ranks are those of a loop.


@by_score
def test_every_step_keeps_the_ranks_that_a_loop_keeps(score: str) -> None:
    """A loop over ranks by scale·|g|·‖A‖·‖B‖, or by the average of |g ∂L/∂g|, on the cubic schedule."""
    steps, begin, end = 20, 4, 14
    scales = {"overrides": {"up": {"alpha": 0.5}, "embedding": {"alpha": 2}}}
    method, model = METHODS["SoRA"](TARGETS, rank=3, budget=0.3, score=score, begin=begin, end=end, **scales), Net()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=3e-2)
    before: list[Tensor] = []
    optimizer.register_step_post_hook(lambda *_: before.append(gates(model).clone()))  # ahead of the method's hook
    sparse = ls.SparseSteps(method, model, optimizer, steps)
    costs = [c for a in adapters for c in [a.in_features + a.out_features] * 3]
    limit = int(0.3 * sum(costs))
    average = torch.zeros(len(costs))
    opened = torch.ones(len(costs), dtype=torch.bool)
    for step in range(1, steps + 1):
        of_net(model).backward()
        seen = torch.cat([(a.gate * a.gate.grad).abs().detach() for a in adapters])  # type: ignore[operator,union-attr]
        average = 0.8 * average + 0.2 * seen
        sparse.observe()
        optimizer.step()
        optimizer.zero_grad()
        moved = before[-1]
        rows = [(a.scale * a.lora_A.detach()[k], a.lora_B_t.detach()[k]) for a in adapters for k in range(3)]
        norms = [torch.outer(b, a).norm() for a, b in rows]
        scores = (moved.abs() * torch.stack(norms) if score == "norm" else average).tolist()
        left = min(1.0, max(0.0, 1 - (step - begin) / (end - begin)))
        allowed = limit + (sum(costs) - limit) * left**3
        expected = torch.zeros(len(costs), dtype=torch.bool)
        for k in sorted(range(len(costs)), key=lambda k: (-scores[k], k)):
            is_candidate = step <= end or bool(opened[k])
            if is_candidate and costs[k] <= allowed + 1e-6:
                expected[k], allowed = True, allowed - costs[k]
        assert torch.equal(gates(model), moved * expected), step  # survivors do not shrink
        opened = gates(model) != 0
    assert 0 < int(opened.sum()) < len(costs)


@by_case
def test_from_the_end_on_the_choice_stays_and_the_rest_trains_on(kind: str, score: str) -> None:
    seen: list[Tensor] = []
    method, model = METHODS[kind](TARGETS, rank=4, budget=0.3, score=score, begin=0.1, end=0.5), Net()
    train(method, model, of_net, 30, 3e-2, after=lambda _: seen.append(gates(model).clone()))
    chosen = seen[14] != 0
    for values in seen[15:]:
        assert torch.equal(values != 0, chosen)
    # Gates are 1 or 0 where singular values are cut.
    assert torch.equal(seen[15], seen[29]) == (score == "singular")


def test_until_the_cut_it_is_a_lora_bit_for_bit() -> None:
    weights = {}
    for name, method in {
        "LoRA": ls.LoRA(TARGETS, rank=4, alpha=8),
        "SoRA": ls.SoRA(TARGETS, rank=4, alpha=8, budget=0.3),
    }.items():
        torch.manual_seed(0)
        model = Net()
        ls.inject(model, method)
        seen: list[list[Tensor]] = []
        torch.manual_seed(1)
        train(method, model, of_net, 12, 3e-2, after=lambda _, model=model, seen=seen: seen.append(matrices(model)))
        weights[name] = seen
    for number, (dense, sparse) in enumerate(zip(weights["LoRA"], weights["SoRA"], strict=True), 1):
        assert all(map(torch.equal, dense, sparse)) == (number < 6)


def matrices(model: nn.Module) -> list[Tensor]:
    return [w.detach().clone() for _, a in ls.adapters_in(model) for w in (a.lora_A, a.lora_B_t)]


@by_case
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("end", [0, 3])
def test_nothing_is_decided_before_b_has_moved(kind: str, score: str, warmup: bool, end: int) -> None:
    torch.manual_seed(0)
    method, model = METHODS[kind](TARGETS, rank=4, budget=0.3, score=score, begin=0, end=end), Net()
    ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0 or not warmup))
    sparse = ls.SparseSteps(method, model, optimizer, 6)
    for number in range(1, 7):
        of_net(model).backward()
        sparse.observe()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if number < 3:
            assert (gates(model) != 0).all()
    assert_on_budget(method, model)
    counts = [int((a.gate != 0).sum()) for _, a in ls.adapters_in(model)]  # type: ignore[union-attr]
    assert counts[0] < 4 or counts[1] < 4  # not the first layers by their place


def test_a_run_in_which_no_score_differs_from_zero_keeps_all_ranks() -> None:
    method, model = ls.SoRA(TARGETS, rank=2, budget=0.5, begin=0, end=0, train_head=False), Net()
    with pytest.warns(UserWarning, match="more than the budget of"):
        train(method, model, of_net, 5, lr=0.0)
    assert (gates(model) == 1).all()


# What a run and its files have.


@by_case
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_resumed_in_the_middle_of_the_schedule_ends_bit_for_bit_alike(
    kind: str, score: str, accumulate: int
) -> None:
    def method() -> Any:
        return METHODS[kind](TARGETS, rank=4, budget=0.3, score=score, begin=0.1, end=0.8)

    straight = fit(method(), SaveAfter(1), accumulate_grad_batches=accumulate)
    middle = torch.load("middle.ckpt", weights_only=True)
    dead = torch.cat([v for name, v in middle["state_dict"].items() if name.endswith(".gate")]) == 0
    assert 0 < int(dead.sum()) < int((gates(straight.net) == 0).sum())
    resumed = fit(method(), resume="middle.ckpt", accumulate_grad_batches=accumulate)
    assert_on_budget(straight.method, straight.net)
    expected = straight.state_dict()
    assert expected.keys() == resumed.state_dict().keys()
    for name, value in resumed.state_dict().items():
        assert torch.equal(value, expected[name]), name


@by_case
@pytest.mark.filterwarnings("ignore")
def test_compaction_on_the_way_keeps_the_budget_of_the_start(kind: str, score: str) -> None:
    module = fit(METHODS[kind](TARGETS, rank=4, budget=0.3, score=score), ls.CompactRanks(2))
    adapters = [adapter for _, adapter in ls.adapters_in(module)]
    assert sum(a.rank for a in adapters) < 8
    assert_on_budget(module.method, module.net)
    assert sum(a.rank * c for a, c in zip(adapters, account(module.method, module.net).costs, strict=True)) == held(
        module.method, module.net
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "budget"), [("SoRA", 0.25), ("SoRA", "2.4k"), ("SoRA", "9kB"), ("GatedRoseLoRA", 0.25)]
)
def test_exports_and_compaction_have_the_parameters_of_the_budget(kind: str, budget: Any, tmp_path: Path) -> None:
    model = build_tiny(BertForSequenceClassification)
    method = METHODS[kind]("all-linear", rank=4, budget=budget)
    ids = torch.randint(5, 60, (8, 6))
    train(method, model, lambda m: m(ids, labels=ids[:, 0] % 2).loss, 8)
    assert_on_budget(method, model)
    ls.export_peft(model, tmp_path / "lora", layout="ragged", with_head=False)
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors").values()
    size = sum(t.nbytes if account(method, model).unit == "bytes" else t.numel() for t in tensors)
    assert size == held(method, model)
    if kind == "SoRA":
        parameters = int(sparsity_of([a for _, a in ls.adapters_in(model)])["remaining_parameters"])
        assert parameters == sum(t.numel() for t in tensors)
    ls.compact(model)
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    assert sum(a.lora_A.numel() + a.lora_B_t.numel() for a in adapters) == sum(t.numel() for t in tensors)


def test_a_frozen_gate_stays_and_is_paid_for_first() -> None:
    method, model = ls.SoRA(TARGETS, rank=4, budget=0.4, train_head=False), Net()
    frozen = ls.inject(model, method)["up"]
    frozen.gate.requires_grad_(False)  # type: ignore[union-attr]
    with pytest.raises(ls.UsageError, match="layers with frozen gates alone have 216"):
        train(ls.SoRA(TARGETS, rank=4, budget=200, train_head=False), model, of_net, 20)
    train(ls.SoRA(TARGETS, rank=4, budget=240, train_head=False), model, of_net, 20)
    assert (frozen.gate == 1).all()  # type: ignore[union-attr]
    assert held(ls.SoRA(budget=240), model) <= 240


@pytest.mark.parametrize("argument", [{"budget": 0.3}, {"threshold": 0.02}, {"sparsity_weight": 2.0}])
def test_a_frozen_gate_that_would_not_win_stays(argument: dict[str, float]) -> None:
    method, model = ls.SoRA(TARGETS, rank=4, gate_init="ones", train_head=False, **argument), Net()
    frozen = ls.inject(model, method)["down"]
    frozen.gate.requires_grad_(False)  # type: ignore[union-attr]
    train(method, model, of_net, 12)
    assert (frozen.gate == 1).all()  # type: ignore[union-attr]
    if "budget" in argument:
        assert_on_budget(method, model)


def test_frozen_gates_at_zero_cost_nothing_and_no_choice_is_made_before_b_has_moved() -> None:
    method, model = ls.SoRA(TARGETS, rank=4, budget=0.6, begin=0, end=4, train_head=False), Net()
    frozen = ls.inject(model, method)["down"]
    frozen.gate.requires_grad_(False).zero_()  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="more than the budget of"):
        train(method, model, of_net, 6, lr=0.0)
    assert (gates(model) != 0).sum() == 3 * 4
    train(method, model, of_net, 12)
    assert not frozen.gate.any()  # type: ignore[union-attr]
    assert_on_budget(method, model)


def test_gates_that_stay_closed_have_no_part_in_clipping() -> None:
    norms: list[tuple[float, float]] = []
    method, model = ls.SoRA(TARGETS, rank=4, budget=0.3, begin=0, end=4, gate_lr=1e-2, train_head=False), Net()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-2)
    sparse = ls.SparseSteps(method, model, optimizer, 8)
    for _ in range(8):
        of_net(model).backward()
        sparse.observe()
        own = [a.gate.grad[mask].norm() for a in adapters for mask in (a.gate == 0, a.gate != 0)]  # type: ignore[union-attr,index]
        norms.append((float(sum(own[::2])), float(sum(own[1::2]))))
        optimizer.step()
        optimizer.zero_grad()
    assert all(closed == 0 for closed, _ in norms[4:])
    assert all(opened > 0 for _, opened in norms[4:])


# Arguments and checks.


@by_method
def test_gates_start_at_one_unless_they_are_told_otherwise(kind: str) -> None:
    layer = nn.Linear(4, 4)
    assert (METHODS[kind](budget=0.5).adapt(layer).gate == 1).all()
    assert not (METHODS[kind](budget=0.5, gate_init="gaussian").adapt(layer).gate == 1).any()
    assert not (METHODS[kind](threshold=0.1).adapt(layer).gate == 1).any()
    assert (METHODS[kind](threshold=0.1, gate_init="ones").adapt(layer).gate == 1).all()
    ls.SoRA(budget=0.5, init_weights="pissa")


@by_method
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"threshold": 0.1}, "got budget and threshold"),
        ({"sparsity_weight": 0.1}, "got budget and sparsity_weight"),
        ({"score": "size"}, "score must be 'singular', 'norm' or 'sensitivity'; got 'size'"),
        ({"begin": 0.9, "end": 0.5}, "begin must not be after end; got begin=0.9 and end=0.5"),
        ({"end": 1.5}, "1.5"),
        ({"end": None}, "A point in the run must be a number of steps or a share of the run; got None"),
        ({"begin": "0.1"}, "A point in the run must be a number of steps"),
        ({"operator": "released"}, "A budget has no threshold to shape: remove operator"),
        ({"freeze_zero_after": 3, "l1_weight": 0.1}, "to shape: remove l1_weight and freeze_zero_after"),
        ({"overrides": {"up": {"threshold": 0.1}}}, r"set \['threshold'\]"),
        ({"overrides": {"up": {"budget": 0.1}}}, r"set \['budget'\]"),
    ],
)
def test_arguments(kind: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ls.UsageError, match=said):
        METHODS[kind](budget=0.5, **arguments)


@by_method
@pytest.mark.parametrize(
    ("arguments", "total", "said"),
    [
        ({"budget": 0.5}, None, r"begin=.* and end=.* are shares of the run, but this run has no end"),
        ({"budget": 0.5, "begin": 60, "end": 0.5}, 100, "begin = 60 comes after end = 0.5"),
        ({"budget": "1k"}, 100, "budget is 1,000 parameters, and the adapters have 243 at the start. Lower budget"),
        ({"budget": "1kB"}, 100, "budget is 1,000 bytes, and the adapters have 972 at the start"),
        ({"budget": 20}, 100, "budget is 20 of 243 parameters, less than the 27 of the smallest rank. Raise budget"),
        ({"budget": 0.1}, 100, "budget is 24 of 243 parameters, less than the 27"),
    ],
)
def test_what_cannot_work_in_a_run_is_refused(kind: str, arguments: Any, total: int | None, said: str) -> None:
    method, model = METHODS[kind](["up", "down"], rank=3, **arguments), Net()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method))
    with pytest.raises(ls.UsageError, match=said):
        method.check(adapters, Run(0, total, optimizer, lambda _: []))


@by_method
def test_a_run_without_an_end_takes_steps(kind: str) -> None:
    method, model = METHODS[kind](["up", "down"], rank=3, budget=0.5, begin=3, end=8), Net()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method))
    method.check(adapters, Run(0, None, optimizer, lambda _: []))
    steps = ls.SparseSteps(method, model, optimizer, None)
    for number in range(1, 11):
        of_net(model).backward()
        steps.observe()
        optimizer.step()
        assert method.is_final(number, None, False) == (number >= 8)
    assert_on_budget(method, model)


@pytest.mark.parametrize(
    ("kind", "end", "total", "after"),
    [
        ("SoRA", 0.7, 10, 7), ("SoRA", 0.65, 10, 7), ("SoRA", 0, 10, 3),
        ("GatedRoseLoRA", 0.7, 10, 7),
    ],
)  # fmt: skip
def test_when_a_budget_is_final(kind: str, end: Any, total: int, after: int) -> None:
    method = METHODS[kind](budget=0.5, begin=0 if isinstance(end, int) else 0.0, end=end)
    assert method.settled_after(total) == after
    assert [method.is_final(step, total, False) for step in range(total)] == [step >= after for step in range(total)]
    assert not METHODS[kind](threshold=0.1, end=end, begin=0 if isinstance(end, int) else 0.0).is_final(9, 10, False)


@by_method
def test_a_run_that_is_shorter_than_its_schedule_is_never_final(kind: str) -> None:
    method = METHODS[kind](budget=0.5, begin=0, end=12)
    assert method.settled_after(10) == 10
    assert not any(method.is_final(step, 10, step == 10) for step in range(11))


@by_method
@pytest.mark.parametrize("point", [3, 5, 0.5, 1.0, 10])
def test_a_budget_at_one_point_holds_from_there_on(kind: str, point: float) -> None:
    method, model, spent = METHODS[kind](TARGETS, rank=4, budget=0.3, begin=point, end=point), Net(), []
    train(method, model, of_net, 10, after=lambda _: spent.append(held(method, model)))
    assert_on_budget(method, model)
    final = [number for number in range(1, 11) if method.is_final(number, 10, False)]
    paid = [number for number, cost in enumerate(spent, 1) if cost <= account(method, model).limit]
    assert paid == final if kind == "SoRA" else paid[-len(final) :] == final  # masks are cut a step later


def test_masks_that_settle_later_settle_later() -> None:
    method = ls.GatedRoseLoRA(budget=0.5, begin=0, end=5, update_every=4)
    assert method.settled_after(20) == 8


@by_method
def test_a_run_that_ends_before_its_budget_holds_says_so(kind: str) -> None:
    method, model = METHODS[kind](TARGETS, rank=4, budget=0.3, begin=3, end=50), Net()
    with pytest.warns(UserWarning, match=r"parameters, more than the budget of [\d,]+: the run ended before .*end=50"):
        train(method, model, of_net, 10)


@by_method
@pytest.mark.parametrize(("budget", "said"), [(0.6, True), (1.0, True), (0.31, False), (0.3, False), (0.2, False)])
def test_a_larger_budget_after_the_end_brings_no_rank_back_and_says_so(kind: str, budget: float, said: bool) -> None:
    torch.manual_seed(0)
    method, model = METHODS[kind](TARGETS, rank=4, budget=0.3, score="norm", begin=0, end=4), Net()
    train(method, model, of_net, 6)
    chosen, spent = gates(model) != 0, held(method, model)
    other = METHODS[kind](TARGETS, rank=4, budget=budget, score="norm", begin=0, end=4)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, other), lr=1e-2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sparse = ls.SparseSteps(other, model, optimizer, 12, steps_taken=6)
    expected = f"but the ranks that are left hold {spent:,}, and the others do not come back after end=4. Resume"
    assert any(expected in str(w.message) for w in caught) == said
    for _ in range(4):
        of_net(model).backward()
        sparse.observe()
        optimizer.step()
        optimizer.zero_grad()
        assert not (gates(model) != 0)[~chosen].any()
    assert held(other, model) <= account(other, model).limit


@by_method
def test_stages_of_thresholds_are_refused(kind: str) -> None:
    with pytest.raises(ls.UsageError, match=f"ThresholdStages sets the threshold of a method, and {kind} has none"):
        METHODS[kind](budget=0.5).set_threshold(0.1)


def test_an_adapter_without_sensitivities_does_not_fit_a_score_by_them() -> None:
    adapter = ls.SoRA(budget=0.5).adapt(nn.Linear(4, 4))
    said = "no sensitivities of gates, which score 'sensitivity' needs"
    assert ls.SoRA(budget=0.5, score="sensitivity").mismatch(adapter) == said
    assert ls.SoRA(budget=0.5).mismatch(adapter) is None


def test_the_budget_is_told_in_parameters_before_training(caplog: pytest.LogCaptureFixture) -> None:
    method = ls.SoRA(TARGETS, rank=4, budget="1kB", train_head=False)
    with caplog.at_level(logging.INFO):
        module = fit(method, max_epochs=1)
    said = f"The budget leaves at most 1,000 of {4 * account(method, module).dense // 4:,} bytes of A and B"
    assert said in caplog.text
    assert ls.SoRA(threshold=0.1).goal([]) is None


def test_scores_differ() -> None:
    """Otherwise the tests above would compare one choice with itself."""
    found = []
    for score in SCORES:
        torch.manual_seed(0)
        method, model = ls.SoRA(TARGETS, rank=8, budget=0.5, score=score, train_head=False), Net()
        train(method, model, of_net, 20, 3e-2)
        found.append(gates(model) != 0)
    assert not torch.equal(*found)
