"""lit_sparse.SparseSteps: loops in Fabric and in plain PyTorch take the steps of the Trainer, bit for bit."""

import contextlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_sparse as ls
from lit_sparse.methods.stepping import adapter_optimizer

BATCHES, WIDTH, RANK, LR = 24, 12, 4, 3e-2
METHODS = {
    "sora": lambda: ls.SoRA(rank=RANK, threshold=0.04),
    "sora_metric": lambda: ls.SoRA(rank=RANK, sparsity_weight=0.05, metric="optimizer", l1_weight=0.5),
    "roselora": lambda: ls.RoseLoRA(rank=RANK, density=0.3, begin=0.1, end=0.7),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:density"),
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:.*pulls"),
]


def batches() -> DataLoader:
    x = torch.randn(BATCHES * 8, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DataLoader(TensorDataset(x, (x[:, :1] * x[:, 1:2]).expand(-1, 3) + x[:, 2:5]), batch_size=8)


def network(method: ls.SparseMethod) -> nn.Sequential:
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    ls.inject(net, method)
    return net


def optimizer_of(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=LR, **options)


def decay(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * BATCHES))


class Module(pl.LightningModule):
    def __init__(self, method: ls.SparseMethod) -> None:
        super().__init__()
        self.net = network(method)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.net)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": decay(optimizer), "interval": "step"}}


def by_the_trainer(method: ls.SparseMethod, accumulate: int) -> dict[str, Tensor]:
    module = Module(method)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", precision="64-true", enable_model_summary=False, gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate, callbacks=[ls.Sparsify(method)], **quiet,
    )  # fmt: skip
    trainer.fit(module, batches())
    return module.net.state_dict()


def by_fabric(method: ls.SparseMethod, accumulate: int) -> dict[str, Tensor]:
    fabric = Fabric(accelerator="cpu", devices=1)  # its "64-true" would round outputs to float32
    net = network(method)
    model, optimizer = fabric.setup(net, optimizer_of(net))
    scheduler = decay(optimizer)
    steps = ls.SparseSteps(method, model, optimizer, BATCHES // accumulate, scheduler)
    for number, (x, y) in enumerate(batches(), start=1):
        fabric.backward(nn.functional.mse_loss(model(x), y) / accumulate)
        if number % accumulate == 0:
            steps.observe()
            fabric.clip_gradients(model, optimizer, max_norm=0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    steps.finish()
    assert steps.steps_taken == BATCHES // accumulate
    return net.state_dict()


def by_hand(method: ls.SparseMethod, accumulate: int) -> dict[str, Tensor]:
    net = network(method)
    optimizer = optimizer_of(net)
    scheduler = decay(optimizer)
    steps = ls.SparseSteps(method, net, optimizer, BATCHES // accumulate, scheduler)
    for number, (x, y) in enumerate(batches(), start=1):
        (nn.functional.mse_loss(net(x), y) / accumulate).backward()
        if number % accumulate == 0:
            steps.observe()
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    steps.finish()
    return net.state_dict()


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loop", [by_fabric, by_hand])
@pytest.mark.parametrize("kind", METHODS)
def test_a_loop_of_ones_own_takes_the_steps_of_the_trainer(kind: str, loop: Any, accumulate: int) -> None:
    expected, own = by_the_trainer(METHODS[kind](), accumulate), loop(METHODS[kind](), accumulate)
    assert expected.keys() == own.keys()
    for name, value in expected.items():
        assert torch.equal(own[name], value), name
    pruned = "lora_A" if kind == "roselora" else "gate"
    entries = torch.cat([value.flatten() for name, value in own.items() if name.endswith(pruned)])
    if accumulate == 1:  # a third of the steps zeroes no gate
        assert 0 < int((entries == 0).sum()) < entries.numel()


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    def run(scale: float, overflow_at: int | None) -> tuple[nn.Module, list[int]]:
        method = METHODS["roselora"]()
        net = network(method).float()
        optimizer = optimizer_of(net, fused=fused)
        steps = ls.SparseSteps(method, net, optimizer, BATCHES)
        scaler, counts = torch.amp.GradScaler("cpu", init_scale=scale), []
        for number, (x, y) in enumerate(batches()):
            scaler.scale(nn.functional.mse_loss(net(x.float()), y.float())).backward()
            if number == overflow_at:
                net[0].lora_A.grad.fill_(float("inf"))
            scaler.unscale_(optimizer)
            steps.observe()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            counts.append(steps.steps_taken)
        return net, counts

    scaled, counts = run(4.0, None)
    assert counts == list(range(1, BATCHES + 1))
    plain, _ = run(1.0, None)
    for name, value in plain.state_dict().items():
        assert torch.equal(scaled.state_dict()[name], value), name
    skipped, counts = run(4.0, 5)
    assert counts == [*range(1, 6), *range(5, BATCHES)]
    assert all(torch.isfinite(value).all() for value in skipped.state_dict().values())


def test_observing_scaled_gradients_of_a_fused_optimizer_is_an_error() -> None:
    method = METHODS["roselora"]()
    net = network(method).float()
    optimizer = optimizer_of(net, fused=True)
    steps = ls.SparseSteps(method, net, optimizer, BATCHES)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = next(iter(batches()))
    scaler.scale(nn.functional.mse_loss(net(x.float()), y.float())).backward()
    steps.observe()
    with pytest.raises(ls.UsageError, match=r"observe\(\) saw them scaled. Call scaler\.unscale_\(optimizer\)"):
        scaler.step(optimizer)


def test_a_loop_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    def run(begin: int, end: int) -> dict[str, Tensor]:
        fabric = Fabric(accelerator="cpu", devices=1)
        method = METHODS["roselora"]()
        net = network(method)
        model, optimizer = fabric.setup(net, optimizer_of(net))
        state = {"model": model, "optimizer": optimizer}
        state["steps"] = steps = ls.SparseSteps(method, model, optimizer, BATCHES)
        if begin:
            fabric.load(tmp_path / "half.ckpt", state)
            assert steps.steps_taken == begin
        for x, y in list(batches())[begin:end]:
            fabric.backward(nn.functional.mse_loss(model(x), y))
            steps.observe()
            optimizer.step()
            optimizer.zero_grad()
        fabric.save(tmp_path / "half.ckpt", state)
        return net.state_dict()

    straight = run(0, BATCHES)
    run(0, 10)
    resumed = run(10, BATCHES)
    for name, value in straight.items():
        assert torch.equal(resumed[name], value), name


def test_a_step_without_observing_is_an_error() -> None:
    method = METHODS["sora"]()
    fabric = Fabric(accelerator="cpu", devices=1)
    net = network(method)
    model, optimizer = fabric.setup(net, optimizer_of(net))
    steps = ls.SparseSteps(method, model, optimizer, BATCHES)
    model(next(iter(batches()))[0]).sum().backward()
    steps.observe()
    optimizer.step()
    with pytest.raises(ls.UsageError, match=r"Adam was stepped, but .* call observe\(\) before every step"):
        optimizer.step()
    steps.release()
    optimizer.step()
    assert steps.steps_taken == 1


def test_wrong_arguments_are_errors() -> None:
    method = METHODS["roselora"]()
    fabric = Fabric(accelerator="cpu", devices=1)
    net = network(method)
    plain = nn.Linear(2, 2)
    for total in (0, -1):
        with pytest.raises(ls.UsageError, match=f"total_steps must be at least 1; got {total}"):
            ls.SparseSteps(method, net, optimizer_of(net), total)
    with pytest.raises(ls.UsageError, match="this run has no end"):
        ls.SparseSteps(method, net, optimizer_of(net), None)
    with pytest.raises(ls.UsageError, match=r"found no adapter in Linear\. Call lit_sparse\.inject"):
        ls.SparseSteps(method, fabric.setup(plain), torch.optim.Adam(plain.parameters()), 5)
    with pytest.raises(ls.UsageError, match="adapter at '0' has no gate"):  # not '_forward_module.0'
        ls.SparseSteps(METHODS["sora"](), fabric.setup(net), optimizer_of(net), 5)
    with pytest.raises(ls.UsageError, match=r"No optimizer holds 3 of 4 adapter parameters, .*'0\.lora_B_t'"):
        ls.SparseSteps(method, net, torch.optim.Adam([net[0].lora_A]), 5)


def test_frozen_adapters_are_an_error() -> None:
    method = METHODS["sora"]()
    net = network(method)
    head = nn.Linear(3, 1)
    for _, adapter in ls.adapters_in(net):
        adapter.requires_grad_(False)
    with pytest.raises(ls.UsageError, match="All 2 adapters are frozen: no parameter of theirs has requires_grad"):
        ls.SparseSteps(method, net, torch.optim.Adam(head.parameters()), BATCHES)


def test_an_adapter_may_be_frozen_beside_others_that_are_trained() -> None:
    method = METHODS["sora"]()
    net = network(method)
    (_, frozen), (_, trained) = ls.adapters_in(net)
    frozen.requires_grad_(False)
    before = [p.detach().clone() for p in frozen.parameters(recurse=False)]
    optimizer = optimizer_of(net)
    steps = ls.SparseSteps(method, net, optimizer, BATCHES)
    for x, y in batches():
        nn.functional.mse_loss(net(x), y).backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    assert (trained.gate == 0).any()  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters(recurse=False), strict=True))


class ScheduleFree(torch.optim.SGD):
    """Trains y and evaluates x, an average of it that ``eval`` swaps in: the contract of schedule-free optimizers."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, lr)
        self.averages: dict[nn.Parameter, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in (p for group in self.param_groups for p in group["params"]):
            self.averages.setdefault(p, p.detach().clone()).lerp_(p.detach(), 0.5)
        return loss

    def swap(self) -> None:
        for p, average in self.averages.items():
            p.data, self.averages[p] = average, p.data

    train = eval = swap


@pytest.mark.parametrize("kind", METHODS)
def test_an_optimizer_that_evaluates_other_weights_than_it_trains_is_refused(kind: str) -> None:
    method = METHODS[kind]()
    net = network(method)
    optimizer = ScheduleFree([p for p in net.parameters() if p.requires_grad], lr=LR)
    with pytest.raises(ls.UsageError, match="ScheduleFree evaluates an average of the weights it trains"):
        ls.SparseSteps(method, net, optimizer, BATCHES)
    dense = ls.LoRA(rank=RANK)
    net = network(dense)
    ls.SparseSteps(dense, net, ScheduleFree([p for p in net.parameters() if p.requires_grad], lr=LR), BATCHES)


def test_what_else_a_user_trains_may_have_an_optimizer_of_its_own() -> None:
    net = network(METHODS["roselora"]())
    adapters = dict(ls.adapters_in(net))
    own = optimizer_of(net)
    net[0].base.bias.requires_grad_(True)  # type: ignore[union-attr]
    assert adapter_optimizer([own, torch.optim.SGD([net[0].base.bias])], adapters) is own  # type: ignore[union-attr]


@pytest.mark.parametrize("scheduled", [False, True])
@pytest.mark.parametrize("taken", [0, 3])
def test_warnings_follow_the_learning_rates(scheduled: bool, taken: int, recwarn: pytest.WarningsRecorder) -> None:
    method = ls.SoRA(rank=RANK, sparsity_weight=1.6)  # pulls by 0.03 · 1.6 · 24 = 1.15, or 0.886 under decay
    net = network(method)
    optimizer = optimizer_of(net)
    ls.SparseSteps(method, net, optimizer, BATCHES, decay(optimizer) if scheduled else None, taken)
    found = [str(w.message) for w in recwarn if "towards zero by 0.88 in the whole run of 24" in str(w.message)]
    assert len(found) == (scheduled and not taken)


@pytest.mark.parametrize("threshold", [1e-6, 10.0])
def test_the_end_says_that_nothing_was_pruned(threshold: float) -> None:
    method = ls.SoRA(rank=RANK, threshold=threshold)
    net = network(method)
    optimizer = optimizer_of(net)
    steps = ls.SparseSteps(method, net, optimizer, BATCHES)
    net(next(iter(batches()))[0]).sum().backward()
    steps.observe()
    optimizer.step()
    warned = pytest.warns(UserWarning, match="No gate became zero") if threshold < 1 else contextlib.nullcontext()
    with warned:
        steps.finish()
    assert (next(ls.adapters_in(net))[1].gate == 0).all() == (threshold > 1)
    optimizer.step()  # released
    assert steps.steps_taken == 1


@pytest.mark.parametrize(("zero_for", "held"), [(1, False), (2, False), (3, True), (4, True)])
@pytest.mark.parametrize("interrupted", [False, True])
def test_a_gate_is_held_after_so_many_steps_at_zero_and_no_fewer(zero_for: int, held: bool, interrupted: bool) -> None:
    """Consecutive ones: one step elsewhere begins the count anew. Optimizer and threshold move nothing here."""
    method = ls.SoRA(rank=RANK, threshold=0.0, freeze_zero_after=3)
    net = network(method)
    gates = [adapter.gate for _, adapter in ls.adapters_in(net)]
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.0)
    steps = ls.SparseSteps(method, net, optimizer, None)

    def step(value: float) -> None:
        with torch.no_grad():
            gates[1][2] = value  # type: ignore[index]
        net(torch.zeros(1, WIDTH, dtype=torch.float64)).sum().backward()
        steps.observe()
        optimizer.step()

    if interrupted:
        step(0.0)
        step(0.0)
        step(0.5)
    for _ in range(zero_for):
        step(0.0)
    step(0.7)
    assert gates[1][2] == (0.0 if held else 0.7)  # type: ignore[index]
    assert all(bool((gate != 0).any()) for gate in gates)
