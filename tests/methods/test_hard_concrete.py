"""Hard-concrete gates: Eqs. (10) to (13) of the paper, the Lagrangian of a budget, and what training leaves."""

import copy
import math
import re
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from nets import TARGETS, Net, fit, of_net, train
from projects import write_config
from torch import Tensor, nn
from transformers import BertForSequenceClassification, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.functional import cubic_density
from lit_sparse.methods.account import Account
from lit_sparse.methods.step import Run

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def stretched(s: float) -> float:
    return min(1.0, max(0.0, s * (ZETA - GAMMA) + GAMMA))


def sampled(log_alpha: float, u: float) -> float:
    """Eqs. (10) and (11)."""
    return stretched(sigmoid((math.log(u) - math.log(1 - u) + log_alpha) / BETA))


def open_probability(log_alpha: float) -> float:
    """One term of Eq. (12)."""
    return sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def expected_share(model: nn.Module) -> float:
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    costs = [a.in_features + a.out_features for a in adapters]
    left = sum(c * open_probability(v) for c, a in zip(costs, adapters, strict=True) for v in a.gate.tolist())  # type: ignore[union-attr]
    return left / sum(c * a.copies * a.max_rank for c, a in zip(costs, adapters, strict=True))


def method_of(**options: Any) -> ls.HardConcreteLoRA:
    return ls.HardConcreteLoRA(TARGETS, **{"rank": 4, "train_head": False, **options})


def log_alphas(model: nn.Module) -> Tensor:
    return torch.cat([adapter.gate.detach() for _, adapter in ls.adapters_in(model)])  # type: ignore[union-attr]


def assert_on_budget(method: Any, model: nn.Module) -> None:
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    found = Account.of(method.budget, adapters)
    spent = sum(
        cost * int((adapter.gate > 0).sum())  # type: ignore[operator]
        for cost, adapter in zip(found.costs, adapters, strict=True)
    )
    assert found.limit - max(0.01 * found.limit, *found.costs) < spent <= found.limit
    drawn = torch.cat([adapter.effective_gate(training=True) for adapter in adapters])  # type: ignore[arg-type]
    assert ((drawn == 0) | (drawn == 1)).all()  # whatever the noise


def greedy(method: Any, model: nn.Module) -> list[bool]:
    """The ranks with the largest log α, as long as the budget lasts."""
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    costs = [a.in_features + a.out_features for a in adapters for _ in range(len(a.lora_A))]
    left, kept = Account.of(method.budget, adapters).limit, [False] * len(costs)
    for place in log_alphas(model).argsort(descending=True).tolist():
        if costs[place] <= left:
            left, kept[place] = left - costs[place], True
    return kept


def moved(model: nn.Module) -> nn.Module:
    """With B and log α anywhere."""
    with torch.no_grad():
        for _, adapter in ls.adapters_in(model):
            adapter.lora_B_t.normal_()
            adapter.gate.normal_(std=3)  # type: ignore[union-attr]
    return model


# The equations.


def test_gates_in_training_are_drawn_as_in_the_paper() -> None:
    log_alpha = torch.linspace(-6, 6, 101, dtype=torch.float64)
    torch.manual_seed(3)
    found = ls.HardConcreteLoRA().effective_gate(log_alpha, training=True)
    torch.manual_seed(3)
    uniform = torch.rand(101, dtype=torch.float64)
    expected = [sampled(a, u) for a, u in zip(log_alpha.tolist(), uniform.tolist(), strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    assert 0 < int((found == 0).sum()) < 60
    assert 0 < int((found == 1).sum()) < 60


def test_gates_in_evaluation_are_the_papers_estimate() -> None:
    log_alpha = torch.linspace(-6, 6, 101, dtype=torch.float64)
    found = ls.HardConcreteLoRA().effective_gate(log_alpha, training=False)
    expected = [stretched(sigmoid(a)) for a in log_alpha.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 2.0])
def test_the_expected_norm_is_that_of_many_draws(log_alpha: float) -> None:
    torch.manual_seed(0)
    drawn = ls.HardConcreteLoRA().effective_gate(torch.full((200_000,), log_alpha), training=True)
    assert float(drawn.count_nonzero()) / 200_000 == pytest.approx(open_probability(log_alpha), abs=4e-3)


@pytest.mark.parametrize("compacted", [False, True])
def test_the_penalty_is_the_expected_share_of_the_parameters(compacted: bool) -> None:
    method, model = method_of(penalty_weight=0.7, overrides={"up": {"rank": 9}}), Net()
    ls.inject(model, method)
    moved(model)
    if compacted:  # closed ranks are gone, and those that are left have the same price
        ls.compact(model)
    adapters = [adapter for _, adapter in ls.adapters_in(model)]
    found = method.penalty(adapters)
    assert float(found.detach()) == pytest.approx(0.7 * expected_share(model), rel=1e-5)
    found.backward()
    gate = adapters[2].gate
    assert gate is not None
    with torch.no_grad():
        gate[1] += 1e-2
        above = expected_share(model)
        gate[1] -= 2e-2
        below = expected_share(model)
    assert float(gate.grad[1]) == pytest.approx(0.7 * (above - below) / 2e-2, rel=1e-2)  # type: ignore[index]


def test_the_multipliers_ascend_by_the_derivatives_of_the_lagrangian() -> None:
    torch.manual_seed(0)
    method, model = method_of(budget=0.3, begin=3, end=15), Net()
    linear = of_square = 0.0
    seen: list[tuple[float, float, float]] = []

    def after(number: int) -> None:
        nonlocal linear, of_square
        dense = Account.of(0.3, [adapter for _, adapter in ls.adapters_in(model)]).dense
        target = math.floor(cubic_density(number, 20, math.floor(0.3 * dense) / dense, 3, 15) * dense) / dense
        excess = expected_share(model) - target
        if 3 < number < 15:
            linear, of_square = linear + 0.1 * excess, of_square + 10 * excess**2
        elif number >= 15:
            linear = of_square = 0.0
        adapters = [adapter for _, adapter in ls.adapters_in(model)]
        for adapter in adapters:
            found = [float(adapter.get_buffer(n)) for n in ("multiplier", "multiplier_of_square", "target")]
            assert found == pytest.approx([linear, of_square, target], rel=1e-4, abs=1e-6)
        penalty = linear * excess + of_square * excess**2
        assert float(method.penalty(adapters).detach()) == pytest.approx(penalty, rel=1e-3, abs=1e-6)
        seen.append((linear, of_square, excess))

    train(method, model, of_net, 20, after=after)
    assert max(of_square for _, of_square, _ in seen) > 0.1


# A budget.


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
@pytest.mark.parametrize("end", [0.6, 1.0, 4])
@pytest.mark.parametrize(
    ("budget", "overrides"),
    [(0.25, None), (0.5, {"up": {"rank": 9}, "down": {"rank": 1}}), (300, None), (1.0, None)],
)
def test_the_end_is_on_the_budget(lr: float, end: float, budget: Any, overrides: Any) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        begin = 0.1 if isinstance(end, float) else 0
        method = method_of(budget=budget, overrides=overrides, begin=begin, end=end)
        model = Net()
        train(method, model, of_net, 20, lr)
        assert_on_budget(method, model)


def test_the_choice_changes_nothing_but_the_closed_ranks_and_lasts() -> None:
    torch.manual_seed(0)
    method, model = method_of(budget=0.5, begin=2, end=6), Net()
    ls.inject(model, method)
    moved(model)
    ids = torch.randint(11, (8, 7))
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-2)
    steps = ls.SparseSteps(method, model, optimizer, 12)
    after_choice: Tensor | None = None
    for number in range(1, 13):
        of_net(model).backward()
        steps.observe()
        if number == 6:
            before = copy.deepcopy(model.eval())
            model.train()
            for group in optimizer.param_groups:
                group["lr"] = 0.0
        optimizer.step()
        optimizer.zero_grad()
        if number == 6:
            kept = log_alphas(model) > 0
            sizes = [len(a.gate) for _, a in ls.adapters_in(model)]  # type: ignore[arg-type]
            with torch.no_grad():
                for (_, adapter), own in zip(ls.adapters_in(before), kept.split(sizes), strict=True):
                    adapter.lora_B_t.mul_(own.unsqueeze(1))
                torch.testing.assert_close(model.eval()(ids), before(ids))
            assert kept.tolist() == greedy(method, before)
            model.train()
            after_choice = log_alphas(model)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2
    assert after_choice is not None
    assert torch.equal(log_alphas(model), after_choice)
    with torch.no_grad():  # nothing is random any more
        in_training = model(ids)
        torch.testing.assert_close(in_training, model.eval()(ids))


def test_the_optimizers_memory_of_b_follows_its_gate() -> None:
    method, model = method_of(budget=1.0, begin=0, end=4), Net()
    ls.inject(model, method)
    moved(model)
    adapter = dict(ls.adapters_in(model))["up"]
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.0)
    steps = ls.SparseSteps(method, model, optimizer, 6)
    for number in range(1, 5):
        of_net(model).backward()
        steps.observe()
        if number == 4:
            for group in optimizer.param_groups:
                group["lr"] = 0.0  # that of gates, too
            factor = adapter.effective_gate().detach()  # type: ignore[union-attr]
            beta, square = 0.9, 0.999
            state = optimizer.state[adapter.lora_B_t]
            average = beta * state["exp_avg"] + (1 - beta) * adapter.lora_B_t.grad  # type: ignore[operator]
            of_squares = square * state["exp_avg_sq"] + (1 - square) * adapter.lora_B_t.grad.square()  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    opened = factor > 0
    assert opened.any()
    state = optimizer.state[adapter.lora_B_t]
    torch.testing.assert_close(state["exp_avg"][opened], (average / factor.unsqueeze(1))[opened])
    torch.testing.assert_close(state["exp_avg_sq"][opened], (of_squares / factor.square().unsqueeze(1))[opened])
    assert not state["exp_avg"][~opened].any()
    assert not optimizer.state[adapter.gate]["exp_avg"].any()


def test_frozen_gates_stay_open_and_are_paid_for_first() -> None:
    method, model = method_of(budget=0.5), Net()
    frozen = ls.inject(model, method)["down"]
    frozen.gate.requires_grad_(False)  # type: ignore[union-attr]
    with torch.no_grad():
        frozen.gate.fill_(-1.0)  # type: ignore[union-attr]
    train(method, model, of_net, 12)
    assert (frozen.effective_gate() == 1).all()  # type: ignore[union-attr]


def test_expert_ranks_compete() -> None:
    from architectures import ARCHITECTURES, text

    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    method = ls.HardConcreteLoRA(["gate_up_proj", "down_proj", "q_proj"], rank=2, budget=0.3)
    train(method, model, lambda m: m(**text()).loss, 8)
    assert_on_budget(method, model)


@pytest.mark.filterwarnings("ignore")
def test_compaction_at_the_end_of_the_schedule_leaves_the_budget() -> None:
    module = fit(method_of(budget=0.4), ls.CompactRanks(1000))
    adapters = [adapter for _, adapter in ls.adapters_in(module)]
    assert (log_alphas(module) > 0).all()
    assert_on_budget(module.method, module.net)
    assert sum(a.rank for a in adapters) < sum(a.max_rank for a in adapters)


def test_a_run_that_closes_no_gate_says_what_to_raise() -> None:
    method, model = method_of(penalty_weight=0.0), Net()
    with pytest.warns(UserWarning, match=r"No gate became zero: all 16 ranks remain, the .* Raise penalty_weight, or"):
        train(method, model, of_net, 3)


# Random gates where a forward pass is repeated, compiled or exported.


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_activations_have_the_gates_of_the_first_pass(reentrant: bool) -> None:
    gradients = []
    for recompute in (False, True):
        model = build_tiny(LlamaForCausalLM).train()
        torch.manual_seed(0)
        ls.inject(model, ls.HardConcreteLoRA(rank=4, penalty_weight=1.0))
        moved(model)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        ids = torch.randint(5, 60, (2, 6), generator=torch.Generator().manual_seed(0))
        torch.manual_seed(1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, repeated = gradients
    assert any("gate" in name for name in plain)
    assert plain.keys() == repeated.keys()
    assert all(torch.equal(gradient, repeated[name]) for name, gradient in plain.items())


def test_evaluation_draws_nothing() -> None:
    method, model = method_of(budget=0.5), Net()
    ls.inject(model, method)
    moved(model).eval()
    ids = torch.randint(11, (8, 7))
    state = torch.get_rng_state()
    with torch.no_grad():
        assert torch.equal(model(ids), model(ids))
    assert torch.equal(torch.get_rng_state(), state)
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_peft_predicts_as_the_model_does(tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    model = build_tiny(BertForSequenceClassification)
    method = ls.HardConcreteLoRA(rank=4, penalty_weight=0.1)
    ls.inject(model, method)
    moved(model)
    ids = torch.randint(5, 60, (4, 6))
    ls.export_peft(model.eval(), tmp_path / "lora")
    loaded = peft.PeftModel.from_pretrained(build_tiny(BertForSequenceClassification), tmp_path / "lora").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_command_line_trains_inspects_and_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(Path("bert"))
    rows = [f"{('good', 'bad')[i % 2]} film {i},{('yes', 'no')[i % 2]}" for i in range(40)]
    for split in ("train", "validation"):
        Path(f"{split}.csv").write_text("\n".join(["text,label", *rows]))
    method = {"class_path": "HardConcreteLoRA", "init_args": {"rank": 4, "budget": 0.3}}
    model = {"class_path": "SequenceClassification", "init_args": {"backbone": "bert", "method": method}}
    data = {"class_path": "TextClassificationData", "init_args": {"path": "."}}
    config = write_config(Path("run.yaml"), model, data, 1e-2, max_epochs=2)
    done = programs.run(["-m", "lit_sparse", "fit", "--config", config])
    assert done.returncode == 0, done.stderr
    assert "sparsity final" in done.stdout
    words = ["-m", "lit_sparse", "inspect", "kept/last.ckpt", "--report", "report.html"]
    done = programs.run(words)
    assert done.returncode == 0, done.stderr
    stored = torch.load("kept/last.ckpt", weights_only=True)["state_dict"]
    ranks = sum(int((value > 0).sum()) for name, value in stored.items() if name.endswith(".gate"))
    for text in (done.stdout, Path("report.html").read_text()):
        assert re.search(rf"\b{ranks} of 52 ranks", text)


# Arguments.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            {"budget": 0.5, "penalty_weight": 0.1},
            "exactly one of budget .*; got budget and penalty_weight",
        ),
        ({"penalty_weight": -1.0}, r"penalty_weight must be at least 0; got -1\.0"),
        ({"gate_lr": 0.0}, "gate_lr must be above 0; got 0"),
        ({"budget": "a lot"}, "budget must be a share"),
        ({"begin": 0.9, "end": 0.5}, "begin must not be after end"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ls.UsageError, match=said):
        ls.HardConcreteLoRA(**arguments)


def test_the_default_is_a_budget() -> None:
    assert ls.HardConcreteLoRA().budget == 0.25
    assert ls.HardConcreteLoRA(penalty_weight=0.1).budget is None


def test_adapters_without_multipliers_and_gates_in_another_group_are_refused() -> None:
    model, method = Net(), method_of(budget=0.5)
    adapters = list(ls.inject(model, method_of(penalty_weight=0.1)).values())
    assert method.mismatch(adapters[0]) == "no multipliers, which a budget needs"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with pytest.raises(ls.UsageError, match=r"gate_lr is 0\.1, but the optimizer holds gates with lr \[0\.001\]"):
        method_of(penalty_weight=0.1).check(adapters, Run(0, 10, optimizer, lambda _: []))
