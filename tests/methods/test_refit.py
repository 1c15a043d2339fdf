"""The last part of a run, ``refit``: gates at zero stay there, and nothing pulls at the others."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_sparse as ls
from lit_sparse.methods.step import Run

METHODS = {
    "SoRA": lambda **o: ls.SoRA(["0", "2"], **{"rank": 6, "train_head": False, **o}),
    "GatedRoseLoRA": lambda **o: ls.GatedRoseLoRA(
        ["0", "2"], **{"rank": 6, "train_head": False, "density": 0.5, "end": 0.4, **o}
    ),
}
PULLS: list[dict[str, Any]] = [
    {"threshold": 0.02},
    {"sparsity_weight": 0.8},
    {"sparsity_weight": 0.5, "l1_weight": 0.3, "freeze_zero_after": 2},
    {"threshold": 0.015, "operator": "released"},
    {"sparsity_weight": 0.02, "metric": "optimizer", "gate_lr": 0.02},
]
STEPS, REFIT = 40, 15
pytestmark = pytest.mark.filterwarnings("ignore:density", "ignore:.*pulls (every|a) gate")
by_method = pytest.mark.parametrize("kind", METHODS)
by_pull = pytest.mark.parametrize("pull", PULLS, ids=lambda pull: "-".join(pull))


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(7, 12), nn.Tanh(), nn.Linear(12, 3))


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(x), (3 * x[:, 0].sigmoid()).long())


def gates_of(model: nn.Module) -> Tensor:
    return torch.cat([adapter.gate.detach() for _, adapter in ls.adapters_in(model)])  # type: ignore[union-attr]


class Trained:
    """Gates of a run, after the optimizer's step and after the method's; their gradients, also after observing."""

    def __init__(self, method: Any, steps: int = STEPS) -> None:
        torch.manual_seed(0)
        model = network()
        ls.inject(model, method)
        with torch.no_grad():
            for _, adapter in ls.adapters_in(model):
                adapter.gate.mul_(0.4)  # type: ignore[union-attr]
        optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.03)
        self.moved: list[Tensor] = []
        self.gates, self.gradients = [gates_of(model)], []
        optimizer.register_step_post_hook(lambda *_: self.moved.append(gates_of(model)))  # ahead of the method's hook
        sparse = ls.SparseSteps(method, model, optimizer, steps)
        for _ in range(steps):
            loss_of(model, torch.randn(8, 7)).backward()
            before = self._gradients(model)
            sparse.observe()
            self.gradients.append((before, self._gradients(model)))
            optimizer.step()
            optimizer.zero_grad()
            self.gates.append(gates_of(model))
        self.finish = sparse.finish

    @staticmethod
    def _gradients(model: nn.Module) -> Tensor:
        return torch.cat([adapter.gate.grad.clone() for _, adapter in ls.adapters_in(model)])  # type: ignore[union-attr]


@by_method
@by_pull
@pytest.mark.parametrize("refit", [REFIT, REFIT / STEPS])
def test_gates_are_pulled_as_without_refit_until_it_begins_and_only_the_loss_moves_them_after(
    kind: str, pull: dict[str, Any], refit: float
) -> None:
    pulled, found = Trained(METHODS[kind](**pull)), Trained(METHODS[kind](**pull, refit=refit))
    begins = STEPS - REFIT
    for step in range(begins + 1):
        assert torch.equal(found.gates[step], pulled.gates[step]), step
    opened = found.gates[begins] != 0
    assert 0 < int(opened.sum()) < len(opened)
    for step in range(begins + 1, STEPS + 1):
        assert torch.equal(found.gates[step], found.moved[step - 1] * opened), step
        before, after = found.gradients[step - 1]
        assert torch.equal(after, before * opened), step  # no subgradient, and no part of closed gates in clipping
    assert (found.moved[begins][~opened] != 0).any()  # the optimizer moves them still
    assert not torch.equal(pulled.gates[STEPS], found.gates[STEPS])


@by_method
def test_a_budget_has_end_for_it(kind: str) -> None:
    with pytest.raises(ls.UsageError, match=r"ranks stay from end on: give end instead of refit; got refit=0\.2"):
        METHODS[kind](budget=0.5, refit=0.2)


@by_method
@pytest.mark.parametrize(
    ("refit", "said"),
    [
        (1.5, "A float is a share of the run, from 0.0 to 1.0; got 1.5"),
        (-3, "A number of steps must be at least 0; got -3"),
        (None, "must be a number of steps or a share of the run; got None"),
        (True, "must be a number of steps or a share of the run; got True"),
    ],
)
def test_what_is_no_part_of_a_run_is_refused(kind: str, refit: Any, said: str) -> None:
    with pytest.raises(ls.UsageError, match=said):
        METHODS[kind](threshold=0.1, refit=refit)


@by_method
@pytest.mark.parametrize("refit", [0.2, 20])
def test_a_run_without_an_end_has_no_last_part(kind: str, refit: float) -> None:
    method, model = METHODS[kind](threshold=0.1, refit=refit, begin=0, end=5), network()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method))
    said = rf"refit={refit} is the last part of the run, but this run has no end: set the Trainer's max_epochs"
    with pytest.raises(ls.UsageError, match=said):
        method.check(adapters, Run(0, None, optimizer, lambda _: []))


@pytest.mark.parametrize(
    ("kind", "refit", "total", "after"),
    [
        ("SoRA", 0.3, 10, 7), ("SoRA", 0.35, 10, 7), ("SoRA", 3, 10, 7), ("SoRA", 1.0, 10, 0), ("SoRA", 12, 10, 0),
        ("GatedRoseLoRA", 0.3, 10, 7), ("GatedRoseLoRA", 0.8, 10, 4),
    ],
)  # fmt: skip
def test_sparsity_is_final_when_refit_begins_and_masks_have_settled(
    kind: str, refit: Any, total: int, after: int
) -> None:
    method = METHODS[kind](threshold=0.1, refit=refit)
    assert method.settled_after(total) == after
    assert [method.is_final(step, total, False) for step in range(total)] == [step >= after for step in range(total)]
    without = METHODS[kind](threshold=0.1)
    assert without.ranks_stay_after(total) is None
    assert not any(without.is_final(step, total, False) for step in range(total))


@pytest.mark.parametrize(
    ("threshold", "refit", "said"),
    [
        (0.2, 0, None),
        (0.2, 5, None),
        (0.2, 6, "by 0.8 in the whole phase of 4 steps before refit, so that by itself it cannot zero a gate of size"),
        (0.4, 6, "pulls every gate to zero within the phase of 4 steps before refit, even one"),
        (0.2, 1.0, "by 0 in the whole phase of 0 steps before refit"),
    ],
)
def test_thresholds_are_foretold_by_the_steps_that_pull(threshold: float, refit: float, said: str | None) -> None:
    method, model = METHODS["SoRA"](threshold=threshold, refit=refit, gate_init="ones"), network()
    adapters = list(ls.inject(model, method).values())
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.12)
    warnings = method.check(adapters, Run(0, 10, optimizer, lambda _: [0.12] * 10))
    assert len(warnings) == (said is not None)
    assert said is None or said in warnings[0]


class Module(pl.LightningModule):
    def __init__(self, method: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.method = network(), method
        ls.inject(self.net, method)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [ls.Sparsify(self.method)]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return loss_of(self.net, batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(ls.parameter_groups(self, self.method), lr=0.03)


class Watch(pl.Callback):
    """Saves after some steps; notes gates and ranks after every step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.ranks: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.ranks.append(sum(adapter.rank for _, adapter in ls.adapters_in(module)))
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(f"{trainer.global_step}.ckpt")


def fit(method: Any, *callbacks: pl.Callback, resume: str | None = None, **options: Any) -> Module:
    module = Module(method)
    x = torch.randn(48, 7, generator=torch.Generator().manual_seed(3))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 8, **options}, **quiet)
    trainer.fit(module, DataLoader(TensorDataset(x), batch_size=8), ckpt_path=resume)
    return module


CHOICES = {"refit": {"threshold": 0.05, "refit": 0.5}, "budget": {"budget": 0.4, "end": 0.5, "begin": 0.1}}
by_choice = pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)


@by_method
@by_pull
def test_a_run_resumed_before_or_in_refit_ends_bit_for_bit_alike(kind: str, pull: dict[str, Any]) -> None:
    def method() -> Any:
        return METHODS[kind](**pull, refit=0.5)

    straight = fit(method(), Watch(18, 24, 30))
    assert 0 < int((gates_of(straight) == 0).sum()) < 12
    for step in (18, 24, 30):
        resumed = fit(method(), resume=f"{step}.ckpt").state_dict()
        assert all(torch.equal(value, resumed[name]) for name, value in straight.state_dict().items()), step


# Ranks that stay at zero are removed at once.


@by_method
@by_choice
@pytest.mark.parametrize("every", [24, 1000])
def test_ranks_go_when_the_choice_stays_and_training_goes_on_as_before(
    kind: str, choice: dict[str, Any], every: int
) -> None:
    sizes = Watch()
    compacted = fit(METHODS[kind](**choice), ls.CompactRanks(every), sizes, gradient_clip_val=0.1)
    whole = fit(METHODS[kind](**choice), gradient_clip_val=0.1)
    opened = int((gates_of(whole) != 0).sum())
    assert 0 < opened < 12
    assert sizes.ranks[23:] == [opened] * 25  # the choice stays after step 24 of 48
    assert sizes.ranks[22] > opened
    x = torch.randn(32, 7)
    torch.testing.assert_close(compacted.net(x), whole.net(x), rtol=0, atol=1e-5)
