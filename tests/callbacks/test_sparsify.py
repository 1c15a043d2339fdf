"""lit_sparse.Sparsify in a real Trainer against training loops in plain PyTorch."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_sparse as ls
from lit_sparse.methods.base import SparseMethod

STEPS, BATCH, WIDTH, RANK = 24, 8, 12, 4
LR = 3e-2


def rows(count: int = STEPS * BATCH) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
    return TensorDataset(x, (x[:, :1] * x[:, 1:2]).expand(-1, 3) + x[:, 2:5])


def network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(2)
    net = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 3)).double()
    for parameter in net.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
    return net


class Regression(pl.LightningModule):
    """A user's own module: its own step, optimizer and schedule."""

    def __init__(self, method: SparseMethod, optimizer: type = torch.optim.Adam, decay: bool = True, **options: Any):
        super().__init__()
        self.net = network()
        ls.inject(self.net, method)
        self.optimizer, self.decay, self.options = optimizer, decay, options

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = (part.to(self.net[0].weight.dtype) for part in batch)
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer([p for p in self.parameters() if p.requires_grad], lr=LR, **self.options)
        if not self.decay:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * STEPS))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def fit(module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, **trainer: Any) -> pl.Trainer:
    options = {"max_epochs": 1, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False, "precision": "64-true"}
    run = pl.Trainer(callbacks=list(callbacks), **(options | trainer))
    run.fit(module, DataLoader(rows() if data is None else data, batch_size=BATCH))
    return run


class PlainLoop:
    """The same training, written out: naive adapters on the same start, Adam, clipping, accumulation."""

    def __init__(self, start: Regression, accumulate: int = 1, clip: float | None = None, clip_after: bool = True):
        self.frozen = network()
        self.A, self.B, self.gates = [], [], []
        for _, adapter in ls.adapters_in(start):
            self.A.append(adapter.lora_A.detach().clone().requires_grad_())
            self.B.append(adapter.lora_B.detach().clone().contiguous().requires_grad_())
            gate = adapter.gate if adapter.gate is not None else torch.ones(RANK, dtype=torch.float64)
            self.gates.append(gate.detach().clone().requires_grad_(adapter.gate is not None))
        self.scale = next(ls.adapters_in(start))[1].scale
        self.accumulate, self.clip = accumulate, clip
        self.trained = [p for p in [*self.A, *self.B, *self.gates] if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.trained, lr=LR)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        for layer, position in ((0, 0), (1, 2)):
            linear = self.frozen[position]
            low_rank = (x @ self.A[layer].T * self.gates[layer]) @ self.B[layer].T
            x = x @ linear.weight.detach().T + linear.bias.detach() + self.scale * low_rank
            x = torch.tanh(x) if position == 0 else x
        return ((x - y) ** 2).mean()

    def steps(self) -> Iterator[tuple[int, float]]:
        """Yield (number of the step, its lr) twice a step: before clipping and after the optimizer."""
        batches = list(DataLoader(rows(), batch_size=BATCH))
        for total, start in enumerate(range(0, len(batches), self.accumulate), start=1):
            self.optimizer.zero_grad()
            chunk = batches[start : start + self.accumulate]
            for x, y in chunk:
                (self.loss(x, y) / self.accumulate).backward()
            lr = LR * (1 - (total - 1) / (2 * STEPS))
            self.optimizer.param_groups[0]["lr"] = lr
            yield total, lr
            if self.clip is not None:
                torch.nn.utils.clip_grad_norm_(self.trained, self.clip)
            self.optimizer.step()
            yield total, lr


def assert_same(module: Regression, loop: PlainLoop) -> None:
    for (_, adapter), A, B, gate in zip(ls.adapters_in(module), loop.A, loop.B, loop.gates, strict=True):
        torch.testing.assert_close(adapter.lora_A.detach(), A.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(adapter.lora_B.detach(), B.detach(), rtol=1e-9, atol=1e-12)
        assert torch.equal(adapter.lora_A == 0, A == 0)
        assert torch.equal(adapter.lora_B == 0, B == 0)
        if adapter.gate is not None:
            torch.testing.assert_close(adapter.gate.detach(), gate.detach(), rtol=1e-9, atol=1e-12)
            assert torch.equal(adapter.gate == 0, gate == 0)


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize(
    "rule",
    [
        {"threshold": 0.04},
        {"sparsity_weight": 1.5},
        {"sparsity_weight": 0.02, "metric": "optimizer"},
        {"threshold": 0.04, "operator": "released", "l1_weight": 0.5},
    ],
    ids=["constant", "lr", "metric", "released"],
)
def test_sora_follows_the_written_out_loop(rule: dict[str, Any], accumulate: int) -> None:
    rule = {**rule}
    if accumulate == 4 and "metric" not in rule:  # a quarter of the steps
        rule |= {key: 4 * rule[key] for key in ("threshold", "sparsity_weight") if key in rule}
    method = ls.SoRA(rank=RANK, **rule)
    module = Regression(method)
    loop = PlainLoop(module, accumulate, clip=0.5)
    entries = sum(gate.numel() for gate in loop.gates)
    for moment, (step, lr) in enumerate(loop.steps()):
        with torch.no_grad():
            if moment % 2 == 0:
                for gate in loop.gates:
                    gate.grad += rule.get("l1_weight", 0.0) / entries * torch.sign(gate)
                continue
            for gate in loop.gates:
                for i in range(RANK):
                    threshold = rule.get("threshold") or lr * rule["sparsity_weight"]
                    if rule.get("metric") == "optimizer":
                        v = float(loop.optimizer.state[gate]["exp_avg_sq"][i]) / (1 - 0.999**step)
                        # Adam has not moved a gate whose gradients were all zero, as those of the first step.
                        threshold = lr * rule["sparsity_weight"] / (math.sqrt(v) + 1e-8) if v else 0.0
                    value = float(gate[i])
                    shrunk = math.copysign(max(abs(value) - threshold, 0.0), value)
                    if rule.get("operator") == "released" and abs(shrunk) < threshold:
                        shrunk = 0.0
                    gate[i] = shrunk
    fit(module, ls.Sparsify(method), accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    assert_same(module, loop)
    zeros = sum(int((gate == 0).sum()) for gate in loop.gates)
    assert 0 < zeros < entries, "the setting must zero some gates and keep some, or nothing is compared"


@pytest.mark.parametrize(("accumulate", "every"), [(1, 1), (4, 1), (1, 5), (4, 4)])
@pytest.mark.parametrize("gated", [False, True])
def test_roselora_follows_the_written_out_loop(gated: bool, accumulate: int, every: int) -> None:
    density, beta, begin, end = 0.3, 0.8, 0.1, 0.7
    arguments: dict[str, Any] = {"rank": RANK, "density": density, "begin": begin, "end": end, "clamp": 0.25}
    arguments["update_every"] = every
    method = ls.GatedRoseLoRA(threshold=0.03, **arguments) if gated else ls.RoseLoRA(**arguments)
    module = Regression(method)
    loop = PlainLoop(module, accumulate, clip=0.5)
    total = STEPS // accumulate
    average: dict[Tensor, Tensor] = {}
    scores: dict[Tensor, Tensor] = {}  # by which the masks in force were chosen
    for moment, (step, _) in enumerate(loop.steps()):
        with torch.no_grad():
            if moment % 2 == 0:  # weights that made the gradients, gradients not clipped
                for w in [*loop.A, *loop.B]:
                    now = (w * w.grad).abs()
                    average[w] = now if step == 1 else beta * average[w] + (1 - beta) * now
                continue
            if gated:
                for gate in loop.gates:
                    gate.copy_(torch.sign(gate) * (gate.abs() - 0.03).clamp(min=0))
            start, stop = begin * total, end * total
            share = 1 - min(max((step - start) / (stop - start), 0.0), 1.0)
            tau = density + (1 - density) * share**3
            if step % every == 0 or step == total:
                scores, kept_share = {w: average[w].clone() for w in [*loop.A, *loop.B]}, tau
            for A in loop.A if scores else ():
                for row, score in zip(A, scores[A], strict=True):
                    zero_all_but_top(row, score, kept_share)
            for B in loop.B if scores else ():
                for column, score in zip(B.T, scores[B].T, strict=True):
                    zero_all_but_top(column, score, kept_share)
            for w in [*loop.A, *loop.B]:
                w.clamp_(-0.25, 0.25)
    fit(module, ls.Sparsify(method), accumulate_grad_batches=accumulate, gradient_clip_val=0.5)
    assert_same(module, loop)
    kept = max(1, math.floor(density * WIDTH))
    first = next(ls.adapters_in(module))[1]
    assert (first.lora_A != 0).sum(1).tolist() == [kept] * RANK


def zero_all_but_top(values: Tensor, scores: Tensor, share: float) -> None:
    if not scores.any():
        return  # as at the first step, when B is zero: nothing is known of the entries
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
    for i in order[max(1, math.floor(share * len(scores) + 1e-9)) :]:
        values[i] = 0.0


class CountCalls(ls.LoRA):
    """A method that only counts how it is called."""

    def __init__(self, rank: int = RANK) -> None:
        super().__init__(rank=rank)
        self.calls: list[tuple[str, int]] = []

    def before_step(self, adapters: Any, step: ls.Step) -> None:
        self.calls.append(("before", step.index))

    def after_step(self, adapters: Any, step: ls.Step, observed: Any) -> None:
        self.calls.append(("after", step.index))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_the_method_is_called_once_per_real_step(precision: str, accumulate: int) -> None:
    method = CountCalls()
    callback = ls.Sparsify(method)
    module = Regression(method).float()
    trainer = fit(module, callback, precision=precision, accumulate_grad_batches=accumulate)
    assert trainer.global_step == STEPS // accumulate == callback.steps_taken
    assert method.calls == [(kind, step) for step in range(1, trainer.global_step + 1) for kind in ("before", "after")]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(fused: bool) -> None:
    method = ls.RoseLoRA(rank=RANK, density=0.5, begin=0, end=1)
    callback = ls.Sparsify(method)

    class Overflow(Regression):
        def on_after_backward(self) -> None:
            if self.trainer.fit_loop.epoch_loop.batch_idx == 5:  # the gradients of one batch overflow
                next(ls.adapters_in(self))[1].lora_A.grad.fill_(float("inf"))

    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.counts: list[int] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.counts.append(callback.steps_taken)

    module = Overflow(method, torch.optim.AdamW, decay=False, fused=fused).float()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=scaler)
    watch = Watch()
    fit(module, callback, watch, precision=None, plugins=[plugin])
    assert watch.counts == [*range(1, 6), *range(5, STEPS)]
    for _, adapter in ls.adapters_in(module):
        assert torch.isfinite(adapter.get_buffer("sensitivity_A")).all()
        assert (adapter.lora_A != 0).sum(1).tolist() == [adapter.in_features // 2] * RANK


@pytest.mark.filterwarnings("ignore:The optimizer's weight decay")
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["l1_weight", "sensitivity"])
def test_under_a_gradient_scaler_the_method_sees_unscaled_gradients(kind: str, fused: bool) -> None:
    def run(*plugins: Any) -> Tensor:
        torch.manual_seed(3)
        if kind == "sensitivity":
            method: SparseMethod = ls.RoseLoRA(rank=RANK, density=0.5, begin=0, end=1)
        else:
            method = ls.SoRA(rank=RANK, threshold=0.01, l1_weight=5.0)
        module = Regression(method, torch.optim.AdamW, decay=False, fused=fused).float()
        fit(module, ls.Sparsify(method), precision=None if plugins else "32-true", plugins=list(plugins))
        adapters = [adapter for _, adapter in ls.adapters_in(module)]
        parts = ("sensitivity_A", "sensitivity_B_t", "lora_A") if kind == "sensitivity" else ("gate", "lora_A")
        return torch.cat([getattr(adapter, part).detach().flatten() for adapter in adapters for part in parts])

    class Float32(MixedPrecision):  # a scaler's arithmetic without half precision
        def autocast_context_manager(self) -> Any:
            return torch.autocast("cpu", enabled=False)

    scaled = run(Float32("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**16)))
    torch.testing.assert_close(scaled, run(), rtol=0, atol=0)  # powers of two scale without rounding


@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_without_a_loss_does_not_upset_the_gradient_scaler(fused: bool) -> None:
    class Skips(Regression):
        def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
            return None if batch_idx in (3, 4, 8) else super().training_step(batch, batch_idx)

    method = CountCalls()
    callback = ls.Sparsify(method)
    plugin = MixedPrecision("16-mixed", device="cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    module = Skips(method, torch.optim.AdamW, decay=False, fused=fused).float()
    fit(module, callback, precision=None, plugins=[plugin], accumulate_grad_batches=2)
    assert callback.steps_taken == STEPS // 2 - 1  # batch 3 ended a window of two, 4 and 8 only began one


def test_state_survives_a_checkpoint(tmp_path: Any) -> None:
    def run(max_epochs: int, **options: Any) -> tuple[Regression, ls.Sparsify, pl.Trainer]:
        method = ls.RoseLoRA(rank=RANK, density=0.3, begin=4, end=40)
        torch.manual_seed(3)
        module, callback = Regression(method), ls.Sparsify(method)
        trainer = pl.Trainer(
            callbacks=[callback],
            max_epochs=max_epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accelerator="cpu",
            precision="64-true",
        )
        trainer.fit(module, DataLoader(rows(), batch_size=BATCH), **options)
        return module, callback, trainer

    straight, _, _ = run(2)
    _, half, trainer = run(1)
    assert half.state_dict() == {"steps_taken": STEPS}
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, callback, _ = run(2, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert callback.steps_taken == 2 * STEPS
    for (name, a), (_, b) in zip(straight.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_a_second_run_with_the_same_callback_counts_anew() -> None:
    method = CountCalls()
    callback = ls.Sparsify(method)
    fit(Regression(method), callback)
    fit(Regression(method), callback)
    assert callback.steps_taken == STEPS


def test_the_optimizer_is_released_after_training_and_after_a_failure() -> None:
    class Broken(Regression):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("broken on purpose")

    for kind in (Regression, Broken):
        method = CountCalls()
        module, callback = kind(method), ls.Sparsify(method)
        trainer = pl.Trainer(
            callbacks=[callback], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu", precision="64-true",
        )  # fmt: skip
        with pytest.raises(RuntimeError, match="on purpose") if kind is Broken else contextlib.nullcontext():
            trainer.fit(module, DataLoader(rows(), batch_size=BATCH))
        before = len(method.calls)
        assert before > 0
        trainer.optimizers[0].step()
        assert len(method.calls) == before


def test_manual_optimization_is_followed_and_a_raw_step_is_refused() -> None:
    class Manual(Regression):
        raw = False

        def __init__(self, method: SparseMethod) -> None:
            super().__init__(method, decay=False)
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            (optimizer.optimizer if self.raw else optimizer).step()

    method = CountCalls()
    fit(Manual(method), ls.Sparsify(method))
    assert method.calls[-1] == ("after", STEPS)
    raw = Manual(method)
    raw.raw = True
    with pytest.raises(ls.UsageError, match=r"was stepped, .* step the optimizer that self\.optimizers\(\) returns"):
        fit(raw, ls.Sparsify(method))


def test_without_adapters_it_is_an_error() -> None:
    class Plain(Regression):
        def __init__(self) -> None:
            pl.LightningModule.__init__(self)
            self.net, self.optimizer, self.decay, self.options = network(), torch.optim.Adam, False, {}

    with pytest.raises(ls.UsageError, match=r"found no adapter in Plain\. Call lit_sparse\.inject"):
        fit(Plain(), ls.Sparsify(ls.LoRA()))


@pytest.mark.parametrize(
    ("injected", "given", "found"),
    [
        (ls.LoRA(rank=4), ls.SoRA(rank=4, threshold=0.1), "no gate"),
        (ls.SoRA(rank=4, threshold=0.1), ls.LoRA(rank=4), "a gate"),
        (ls.LoRA(rank=4), ls.RoseLoRA(rank=4, alpha=16), "no sensitivities"),
        (ls.SoRA(rank=4, threshold=0.1), ls.SoRA(rank=2, alpha=8, threshold=0.1), "rank 4 and scale 4, not 2 and 4"),
        (ls.SoRA(rank=4, threshold=0.1), ls.SoRA(rank=4, alpha=8, threshold=0.1), "scale 4, not 4 and 2"),
        (
            ls.SoRA(rank=4, threshold=0.1),
            ls.SoRA(rank=4, threshold=0.1, freeze_zero_after=3),
            "no count of steps at zero",
        ),
        (
            ls.SoRA(rank=4, alpha=4, threshold=0.1),
            ls.GatedRoseLoRA(rank=4, threshold=0.1),
            "no sensitivities",
        ),
    ],
)
def test_a_method_that_does_not_fit_the_adapters_is_an_error(injected: Any, given: Any, found: str) -> None:
    with pytest.raises(ls.UsageError, match=f"adapter at 'net.0' has .*{found}"):
        fit(Regression(injected), ls.Sparsify(given))


def test_two_in_one_trainer_are_an_error() -> None:
    class Other(ls.Sparsify):
        """Another state key, so that Lightning itself does not object."""

    method = ls.LoRA(rank=4)
    with pytest.raises(ls.UsageError, match="2 Sparsify callbacks"):
        fit(Regression(method), ls.Sparsify(method), Other(method))
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Sparsify`"):
        pl.Trainer(callbacks=[ls.Sparsify(method), ls.Sparsify(method)])


def test_every_adapter_parameter_must_be_in_one_optimizer() -> None:
    method = ls.LoRA(rank=4)

    class Forgets(Regression):
        def configure_optimizers(self) -> Any:
            first, *_ = [adapter for _, adapter in ls.adapters_in(self)]
            return torch.optim.Adam([first.lora_A], lr=LR)

    class Splits(Regression):
        def __init__(self, method: SparseMethod) -> None:
            super().__init__(method)
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            parts = [list(adapter.parameters(recurse=False)) for _, adapter in ls.adapters_in(self)]
            return [torch.optim.Adam(part, lr=LR) for part in parts]

    with pytest.raises(ls.UsageError, match=r"No optimizer holds 3 of 4 adapter parameters, .*'net\.0\.lora_B_t'"):
        fit(Forgets(method), ls.Sparsify(method))
    with pytest.raises(ls.UsageError, match="2 optimizers hold adapter parameters"):
        fit(Splits(method), ls.Sparsify(method))


def test_the_optimizer_metric_needs_adam() -> None:
    method = ls.SoRA(rank=4, sparsity_weight=0.1, metric="optimizer")
    with pytest.raises(ls.UsageError, match="metric of Adam and AdamW; the optimizer is SGD"):
        fit(Regression(method, torch.optim.SGD), ls.Sparsify(method))


def test_gate_lr_must_reach_the_optimizer() -> None:
    method = ls.SoRA(rank=4, threshold=0.1, gate_lr=0.5)
    with pytest.raises(ls.UsageError, match=r"gate_lr is 0\.5, but the optimizer holds gates with lr \[0\.03\]"):
        fit(Regression(method), ls.Sparsify(method))

    class Grouped(Regression):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(ls.parameter_groups(self.net, method), lr=LR)

    module = Grouped(method)
    trainer = fit(module, ls.Sparsify(method))
    gates = [adapter.gate for _, adapter in ls.adapters_in(module)]
    (group,) = [g for g in trainer.optimizers[0].param_groups if any(p is gates[0] for p in g["params"])]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)


def test_weight_decay_on_gates_warns() -> None:
    method = ls.SoRA(rank=4, threshold=0.04)
    with pytest.warns(UserWarning, match=r"weight decay \[0\.2\] pulls at the gates"):
        fit(Regression(method, torch.optim.AdamW, weight_decay=0.2), ls.Sparsify(method))


@pytest.mark.parametrize(
    ("method", "warning"),
    [
        (ls.SoRA(rank=4, threshold=1e-4), r"by 0\.0024 in the whole run of 24 steps.*Raise threshold"),
        # The largest of the gates is far below the 9.6 that 24 steps take away, and an outward push gives 0.5.
        (ls.SoRA(rank=4, threshold=0.4), "pulls every gate to zero within the run of 24 steps.*Lower threshold"),
        (ls.SoRA(rank=4, sparsity_weight=0.1), r"by 0\.05\d in the whole run.*Raise sparsity_weight"),
        (ls.SoRA(rank=4, sparsity_weight=50), "pulls every gate to zero.*Lower sparsity_weight"),
        (ls.RoseLoRA(rank=4, density=0.5), r"change about 68 % of the entries.*no local"),
    ],
)
def test_settings_that_cannot_do_what_they_should_warn(method: Any, warning: str) -> None:
    with pytest.warns(UserWarning, match=warning):
        fit(Regression(method), ls.Sparsify(method))


def test_the_end_of_a_run_says_that_nothing_was_pruned() -> None:
    method = ls.SoRA(rank=4, threshold=1e-6)
    with pytest.warns(UserWarning, match=r"No gate became zero: all 8 ranks remain, .* Raise threshold"):
        fit(Regression(method), ls.Sparsify(method))
    rose = ls.RoseLoRA(rank=4, density=0.01, begin=1000, end=2000)
    with pytest.warns(UserWarning, match="the run ended before the schedule began"):
        fit(Regression(rose), ls.Sparsify(rose))


def test_a_run_without_end() -> None:
    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step >= 6

    steps = ls.RoseLoRA(rank=4, density=0.1, begin=1, end=4)
    fit(Regression(steps), ls.Sparsify(steps), Stop(), max_epochs=-1)
    shares = ls.RoseLoRA(rank=4, density=0.1)
    with pytest.raises(ls.UsageError, match=r"begin=0\.1 and end=0\.8 are shares of the run, but this run has no end"):
        fit(Regression(shares), ls.Sparsify(shares), Stop(), max_epochs=-1)


def test_a_gate_held_at_zero_does_not_come_back() -> None:
    class Watch(pl.Callback):
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            self.seen.append(torch.cat([a.gate.detach().clone() for _, a in ls.adapters_in(module)]))

    def came_back(freeze: int | None) -> int:
        torch.manual_seed(0)
        # A threshold below the lr: a gate that the loss pushes away from zero returns, unless it is held.
        method = ls.SoRA(rank=8, threshold=0.02, freeze_zero_after=freeze)
        watch, module = Watch(), Regression(method)
        for _, adapter in ls.adapters_in(module):
            adapter.gate.data.mul_(0.1)
            nn.init.normal_(adapter.lora_B_t)
        fit(module, ls.Sparsify(method), watch)
        zero = torch.stack(watch.seen) == 0
        return int((zero[:-1] & ~zero[1:]).sum())

    assert came_back(None) > 0
    assert came_back(1) == 0
