"""Arguments of the methods: each is checked when the method is made, and kept."""

import functools
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import lit_sparse as ls
from lit_sparse.methods.base import SparseMethod
from lit_sparse.methods.step import Run

METHODS = [
    ls.LoRA(),
    ls.SoRA(threshold=1e-3),
    ls.SoRA(sparsity_weight=0.1, metric="optimizer", gate_lr=1e-2, freeze_zero_after=5, layers=[0]),
    ls.RoseLoRA(density=0.2, begin=3, end=30, clamp=3e-3),
    ls.HardConcreteLoRA(penalty_weight=0.1, gate_lr=0.03, begin=4, end=9),
    ls.GatedRoseLoRA(threshold=1e-3, target_modules=["query"], exclude_modules="x", train_head=["classifier"]),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_every_argument_is_kept_under_its_name_and_makes_the_method_again(method: SparseMethod) -> None:
    arguments = method.init_args()
    assert set(arguments) == set(inspect.signature(type(method)).parameters)
    assert type(method)(**arguments).init_args() == arguments
    assert repr(method) == repr(type(method)(**arguments))


EVERY = {
    "target_modules": "all-linear", "rank": 8, "dropout": 0.0, "layers": None, "exclude_modules": None,
    "train_head": True, "use_rslora": False, "loraplus_lr_ratio": 1.0, "overrides": None,
}  # fmt: skip
GATES = {
    "threshold": None, "sparsity_weight": None, "l1_weight": 0.0, "operator": "soft", "metric": "euclidean",
    "gate_lr": None, "freeze_zero_after": None, "refit": 0, "gate_init": None, "budget": None, "score": "singular",
    "begin": 0.5, "end": 0.5,
}  # fmt: skip
HARD_CONCRETE = {"penalty_weight": None, "gate_lr": 0.1, "budget": None, "begin": 0.1, "end": 0.6}
START = {"init_weights": "lora", "start_batches": 64, "gora_gamma": 0.05, "lora_ga_gamma": 16.0, "eva_rho": 2.0}
MASKS = {"changed": None, "density": None, "begin": 0.1, "end": 0.8, "beta": 0.8, "clamp": None, "update_every": 1}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (ls.LoRA, {**EVERY, **START, "alpha": 16}),
        (ls.SoRA, {**EVERY, **GATES, **START, "alpha": 16}),
        (ls.RoseLoRA, {**EVERY, **MASKS, "alpha": None}),
        (ls.HardConcreteLoRA, {**EVERY, **HARD_CONCRETE, "alpha": 16}),
        (ls.GatedRoseLoRA, {**EVERY, **GATES, **MASKS, "alpha": None, "score": "norm"}),
    ],
)
def test_defaults_are_part_of_the_contract(kind: Any, expected: dict[str, Any]) -> None:
    """A default that changes makes another run of a configuration that does not name it."""
    assert {name: p.default for name, p in inspect.signature(kind).parameters.items()} == expected


def test_a_method_of_ones_own_has_the_defaults_of_the_others() -> None:
    class Own(SparseMethod):
        def __init__(self) -> None:
            super().__init__("all-linear", rank=8, alpha=16)

    own = Own()
    for name, default in {**EVERY, "init_weights": "lora", "gate_init": "gaussian"}.items():
        assert getattr(own, name) == default, name


@pytest.mark.parametrize("kind", [ls.SoRA, ls.GatedRoseLoRA])
def test_a_threshold_may_change_within_a_run(kind: Any) -> None:
    method = kind(threshold=0.1)
    method.set_threshold(0.5)
    assert method.init_args()["threshold"] == 0.5
    with pytest.raises(ls.UsageError, match="threshold must be at least 0; got nan"):
        method.set_threshold(float("nan"))
    with pytest.raises(ls.UsageError, match=r"got -1\.0"):
        method.set_threshold(-1.0)
    assert method.threshold == 0.5


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(("gate", "pruned"), [([0.0, 1.0], True), ([1.0, 1.0], False), ([0.5, -2.0], False)])
def test_a_run_without_a_zero_gate_says_what_to_raise(gate: list[float], pruned: bool, compacted: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    method = ls.SoRA(["0", "1"], rank=2, threshold=0.1, gate_init="ones")
    ls.inject(model, method)
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    with torch.no_grad():
        adapters[1].gate.copy_(torch.tensor(gate))  # type: ignore[union-attr]
        for adapter in adapters:
            adapter.lora_B_t.fill_(1.0)
    if compacted:  # the zeros are gone, and the other layer has lost none
        ls.compact(model)
    sentence = method.shortfall(adapters)
    if pruned:
        assert sentence is None
    else:
        smallest = min(1.0, *map(abs, gate))
        assert sentence == (
            f"No gate became zero: all 4 ranks remain, the smallest |gate| is {smallest:.2g}. Raise threshold, or "
            "train longer."
        )


@pytest.mark.parametrize("kind", [ls.LoRA, ls.SoRA, ls.RoseLoRA, ls.GatedRoseLoRA, ls.HardConcreteLoRA])
@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"target_modules": []}, r"target_modules is \[\]: name at least one layer"),
        ({"target_modules": ""}, "target_modules is '': name at least one layer"),
        ({"rank": 0}, "rank must be at least 1; got 0"),
        ({"alpha": 0.0}, "alpha must be above 0; got "),
        ({"alpha": float("nan")}, "alpha must be above 0; got "),
        ({"dropout": 1.0}, r"dropout must be at least 0 and below 1; got 1\.0"),
        ({"dropout": -0.1}, "dropout must be at least 0 and below 1; got -0.1"),
        ({"loraplus_lr_ratio": 0.0}, "loraplus_lr_ratio must be above 0; got 0"),
    ],
)
def test_arguments_of_all_methods(kind: Any, argument: dict[str, Any], message: str) -> None:
    needed = {"threshold": 1e-3} if "threshold" in inspect.signature(kind).parameters else {}
    with pytest.raises(ls.UsageError, match=message):
        kind(**needed, **argument)


@pytest.mark.parametrize("kind", [ls.SoRA, ls.GatedRoseLoRA])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0.1, "sparsity_weight": 0.1}, "exactly one of .*; got threshold and sparsity_weight"),
        ({"threshold": -1.0}, "threshold must be at least 0; got -1"),
        ({"threshold": float("inf")}, "threshold must be finite and at least 0; got inf"),
        ({"sparsity_weight": float("nan")}, "sparsity_weight must be at least 0; got nan"),
        ({"threshold": 0.1, "l1_weight": -1.0}, "l1_weight must be at least 0; got -1"),
        ({"threshold": 0.1, "operator": "hard"}, "operator must be 'soft' or 'released'; got 'hard'"),
        ({"threshold": 0.1, "metric": "l2"}, "metric must be 'euclidean' or 'optimizer'; got 'l2'"),
        ({"threshold": 0.1, "metric": "optimizer"}, "give sparsity_weight, not threshold"),
        ({"threshold": 0.1, "gate_lr": 0.0}, "gate_lr must be above 0; got 0"),
        ({"threshold": 0.1, "freeze_zero_after": 0}, "freeze_zero_after must be at least 1; got 0"),
    ],
)
def test_arguments_of_gates(kind: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ls.UsageError, match=message):
        kind(**arguments)


def test_without_an_amount_sora_has_a_budget_and_the_gated_mask_asks_for_one() -> None:
    assert (ls.SoRA().budget, ls.SoRA().target_modules) == (0.25, "all-linear")
    assert ls.SoRA().init_args()["budget"] == 0.25  # as checkpoints and cards record it
    assert (ls.SoRA(threshold=0.1).budget, ls.SoRA(sparsity_weight=0.1).budget) == (None, None)
    with pytest.raises(ls.UsageError, match=r"exactly one of budget .*, threshold .* and sparsity_weight .*; got none"):
        ls.GatedRoseLoRA()


@pytest.mark.parametrize("kind", [ls.RoseLoRA, ls.GatedRoseLoRA])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": 0.0}, "density must be above 0 and at most 1; got 0"),
        ({"density": 1.1}, r"density must be above 0 and at most 1; got 1\.1"),
        ({"beta": 1.0}, "beta must be at least 0 and below 1; got 1"),
        ({"clamp": 0.0}, "clamp must be above 0; got 0"),
        ({"update_every": 0}, "update_every must be at least 1; got 0"),
        ({"begin": 0.9, "end": 0.5}, "begin must not be after end; got begin=0.9 and end=0.5"),
        ({"begin": 9, "end": 5}, "begin must not be after end; got begin=9 and end=5"),
        ({"begin": -1, "end": 5}, "-1"),
        ({"begin": 0.1, "end": 1.5}, "1.5"),
    ],
)
def test_arguments_of_masks(kind: Any, arguments: dict[str, Any], message: str) -> None:
    needed = {"threshold": 1e-3} if kind is ls.GatedRoseLoRA else {}
    with pytest.raises(ls.UsageError, match=message):
        kind(**needed, **arguments)


@pytest.mark.parametrize(
    ("kind", "own", "message"),
    [
        (ls.LoRA, {"rank": 0}, "rank must be at least 1; got 0"),
        (ls.LoRA, {"alpha": 0.0}, "alpha must be above 0; got "),
        (ls.SoRA, {"threshold": -1.0}, "threshold must be at least 0; got -1"),
        (ls.GatedRoseLoRA, {"threshold": -1.0}, "threshold must be at least 0; got -1"),
        (ls.GatedRoseLoRA, {"density": 2.0}, "density must be above 0 and at most 1"),
        (ls.RoseLoRA, {"density": 0.0}, "density must be above 0 and at most 1"),
    ],
)
def test_what_is_set_for_some_layers_is_checked_alike(kind: Any, own: dict[str, float], message: str) -> None:
    needed = {"threshold": 1e-3} if "threshold" in inspect.signature(kind).parameters else {}
    with pytest.raises(ls.UsageError, match=message):
        kind(**needed, overrides={"query": own})


def test_begin_after_end_in_different_units_is_found_when_the_run_is_known() -> None:
    method = ls.RoseLoRA(begin=50, end=0.5)
    adapter = method.adapt(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    method.check([adapter], Run(0, 200, optimizer, lambda p: []))
    with pytest.raises(ls.UsageError, match="begin"):
        method.check([adapter], Run(0, 80, optimizer, lambda p: []))


def test_an_adapter_without_masks_does_not_fit_a_method_that_keeps_them() -> None:
    adapter = ls.RoseLoRA(rank=2).adapt(nn.Linear(8, 8))
    assert ls.RoseLoRA(rank=2, density=0.1).mismatch(adapter) is None
    assert ls.RoseLoRA(rank=2, update_every=5).mismatch(adapter) == "no masks, which changed and update_every > 1 need"


def test_roselora_has_no_scale_unless_alpha_is_given() -> None:
    assert ls.RoseLoRA(rank=32).scale == 1
    assert ls.RoseLoRA(rank=8, alpha=32).scale == 4
    assert ls.SoRA(rank=8, threshold=0.1).scale == 2


def test_gates_are_an_optimizer_group_of_their_own() -> None:
    method = ls.SoRA(threshold=0.1, gate_lr=0.5, rank=4)
    adapters = [method.adapt(nn.Linear(8, 8)) for _ in range(2)]
    (group,) = method.parameter_groups(adapters)
    assert group["lr"] == 0.5
    assert group["weight_decay"] == 0
    assert [id(p) for p in group["params"]] == [id(a.gate) for a in adapters]
    assert ls.LoRA().parameter_groups(adapters) == []


@pytest.mark.parametrize(
    ("begin", "end", "every", "total", "after"),
    [
        (1, 4, 1, 10, 4),
        (0, 0, 1, 10, 3),  # the first scores, after a warm-up from a learning rate of zero
        (0, 0, 2, 10, 4),
        (3, 3, 1, 10, 4),
        (0.1, 0.45, 1, 10, 5),
        (1, 4, 3, 10, 6),
        (1, 9, 4, 10, 10),
        (1, 11, 1, 10, 10),
    ],
)
def test_when_masks_are_final(begin: Any, end: Any, every: int, total: int, after: int) -> None:
    method = ls.RoseLoRA(density=0.1, begin=begin, end=end, update_every=every)
    assert method.settled_after(total) == after
    assert ls.LoRA().settled_after(total) == 0


@pytest.mark.parametrize(
    ("gates", "lr", "threshold", "steps", "said"),
    [
        ([1.0, 1.0], 0.1, 0.25, 3, "pulls a gate towards zero by 0.75 in the whole run of 3 steps"),
        ([1.0, 1.0], 0.5, 0.25, 4, None),  # pulled by exactly 1
        ([1.0, 1.0], 0.1, 0.25, 7, "pulls every gate to zero within the run of 7 steps"),  # 1 - 7 · 0.15 < 0
        ([1.0, 1.0], 0.1, 0.25, 6, None),  # 1 - 6 · 0.15 > 0
        ([0.5, 2.0], 0.1, 0.25, 8, None),  # the largest counts, of whatever sign
        ([0.5, -2.0], 0.1, 0.25, 8, None),
        ([1.0, 1.0], 0.2, 0.25, 10, None),  # 1 + 10 · (0.2 - 0.25) > 0
    ],
)
def test_a_threshold_that_zeroes_nothing_or_all_is_foretold(
    gates: list[float], lr: float, threshold: float, steps: int, said: str | None
) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    method = ls.SoRA(["0"], rank=2, threshold=threshold, gate_init="ones")
    ls.inject(model, method)
    ((_, adapter),) = ls.adapters_in(model)
    with torch.no_grad():
        adapter.gate.copy_(torch.tensor(gates))  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=lr)
    warnings = method.check([adapter], Run(0, steps, optimizer, lambda _: [lr] * steps))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


@pytest.mark.parametrize(
    ("density", "zeroed", "said"), [(0.5, False, True), (0.5, True, False), (1.0, False, False), (1.0, True, False)]
)
def test_a_run_that_masked_nothing_says_so(density: float, zeroed: bool, said: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    method = ls.RoseLoRA(["0"], rank=2, density=density, begin=3, end=5)
    ls.inject(model, method)
    ((_, adapter),) = ls.adapters_in(model)
    with torch.no_grad():
        adapter.lora_A.fill_(1)
        adapter.lora_B_t.fill_(1)
        if zeroed:
            adapter.lora_A[0, 0] = 0
    sentence = method.shortfall([adapter])
    assert (sentence is not None) == said
    if sentence is not None:
        assert sentence.startswith("No entry of A or B was zeroed: the run ended before the schedule began (begin=3")


@pytest.mark.parametrize("method", [ls.RoseLoRA, functools.partial(ls.GatedRoseLoRA, threshold=1e-6)])
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_masks_wait_for_scores_that_tell_entries_apart(method: Any, warmup: bool) -> None:
    """B is zero at first, and with it every score: then nothing is zeroed, least of all by the order of the entries."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 20))
    sparse = method(["0", "1"], rank=2, density=0.2, begin=0, end=0, train_head=False)
    first, unreached = ls.inject(model, sparse).values()
    optimizer = torch.optim.Adam(ls.parameter_groups(model, sparse), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0 or not warmup))
    steps = ls.SparseSteps(sparse, model, optimizer, total_steps=4)
    for number in range(1, 5):
        optimizer.zero_grad()
        first(torch.randn(6, 20)).square().sum().backward()
        scores = (first.lora_A * first.lora_A.grad).abs()  # type: ignore[operator]
        steps.observe()
        optimizer.step()
        schedule.step()
        kept = first.lora_A != 0
        if number < 2 + warmup:
            assert not scores.any()
            assert kept.all()
        if number == 2 + warmup:
            expected = torch.zeros_like(kept).scatter_(1, scores.topk(4).indices, True)
            assert torch.equal(kept, expected)
            assert not torch.equal(kept, torch.arange(20).expand(2, 20) < 4)
        if number > 2 + warmup:
            assert kept.sum(1).tolist() == [4, 4]
    assert (unreached.lora_A != 0).all()
    assert not unreached.lora_B_t.any()


def test_a_rank_is_whole() -> None:
    with pytest.raises(ls.UsageError, match=r"rank must be a whole number; got 2\.5"):
        ls.LoRA(rank=2.5)  # type: ignore[arg-type]
    assert ls.LoRA(rank=1).rank == 1


def test_overrides_name_layers_by_trailing_parts_or_by_a_pattern() -> None:
    model = nn.ModuleDict({"up": nn.Linear(4, 4), "down": nn.Linear(4, 4), "other": nn.Linear(4, 4)})
    ls.inject(model, ls.LoRA("all-linear", rank=1, overrides={"up": {"rank": 2}, "d.*": {"rank": 3}}))
    assert {name: adapter.rank for name, adapter in ls.adapters_in(model)} == {"up": 2, "down": 3, "other": 1}
    fresh = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ls.UsageError, match=r"overrides \['nothing'\] match none of the 1 adapted layers"):
        ls.inject(fresh, ls.LoRA("all-linear", overrides={"nothing": {"rank": 2}}))
    with pytest.raises(ls.UsageError, match=r"overrides '\(' is not a valid regular expression"):
        ls.inject(fresh, ls.LoRA("all-linear", overrides={"(": {"rank": 2}}))


@pytest.mark.parametrize(
    ("densities", "rank", "percent"),
    [((0.5, 0.5), 8, 90), ((0.5, 0.05), 8, 90), ((0.05, 0.05), 8, None), ((1.0, 1.0), 8, None), ((1.0, 0.5), 4, 68)],
)
def test_masks_that_let_much_of_a_weight_change_are_named(
    densities: tuple[float, float], rank: int, percent: int | None
) -> None:
    """1 - (1 - density²)^rank of the entries, where it is most; density 1 keeps everything, and means to."""
    model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
    method = ls.RoseLoRA(rank=rank, density=densities[0], begin=0, end=1, overrides={"b": {"density": densities[1]}})
    ls.inject(model, method)
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method))
    warnings = method.check(adapters, Run(0, 10, optimizer, lambda _: [0.1] * 10))
    if percent is None:
        assert warnings == []
    else:
        assert f"with rank {rank} lets BA change about {percent} % of the entries" in warnings[0]


@pytest.mark.parametrize("kind", [ls.RoseLoRA, ls.GatedRoseLoRA])
@pytest.mark.parametrize(
    "arguments",
    [{"beta": 0.0}, {"density": 1.0}, {"clamp": 1e-9}, {"update_every": 1}, {"begin": 3, "end": 3}, {"rank": 1}],
)
def test_the_ends_of_the_ranges_belong_to_them(kind: Any, arguments: dict[str, Any]) -> None:
    needed = {"threshold": 0.0} if kind is ls.GatedRoseLoRA else {}
    assert kind(**needed, **arguments).init_args().items() >= arguments.items()


@pytest.mark.parametrize(
    ("kind", "arguments", "own", "said"),
    [
        (ls.LoRA, {}, {"density": 0.1}, r"overrides of 'query' set \['density'\]; LoRA can set"),
        (ls.LoRA, {}, {"rank": 4, "dropout": 0.1}, r"set \['dropout'\]"),
        (ls.LoRA, {}, {}, "set nothing"),
        # The other strength is not in use.
        (ls.SoRA, {"threshold": 0.1}, {"sparsity_weight": 0.1}, r"set \['sparsity_weight'\]"),
        (ls.SoRA, {"sparsity_weight": 0.1}, {"threshold": 0.1}, r"set \['threshold'\]"),
        (ls.RoseLoRA, {}, {"threshold": 0.1}, r"set \['threshold'\]"),
    ],
)
def test_only_what_is_in_use_is_set_for_some_layers(kind: Any, arguments: Any, own: Any, said: str) -> None:
    with pytest.raises(ls.UsageError, match=said):
        kind(**arguments, overrides={"query": own})


def test_a_layer_may_have_an_alpha_where_the_others_have_their_rank() -> None:
    model = nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8)})
    ls.inject(model, ls.RoseLoRA(rank=2, overrides={"query": {"alpha": 6}}))
    assert {name: adapter.scale for name, adapter in ls.adapters_in(model)} == {"query": 3, "key": 1}


@pytest.mark.parametrize(("begin", "end"), [(0.1, 0.5), (3, 0.5), (0.1, 50)])
def test_shares_of_a_run_without_an_end_are_refused(begin: Any, end: Any) -> None:
    method = ls.RoseLoRA(begin=begin, end=end)
    adapter = method.adapt(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=1.0)
    with pytest.raises(ls.UsageError, match="are shares of the run, but this run has no end"):
        method.check([adapter], Run(0, None, optimizer, lambda p: []))
    ls.RoseLoRA(begin=3, end=50).check([adapter], Run(0, None, optimizer, lambda p: []))
