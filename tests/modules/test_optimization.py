"""lit_sparse.modules.optimization: parameter groups, and schedules against their formulas."""

import functools
import math

import pytest
import torch
from architectures import ARCHITECTURES
from lightning.pytorch import Callback
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Adafactor, AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.modules.optimization import lr_scheduler, make_optimizer, parameter_groups, relative_groups

PEAK = 1e-2


def classifier(backbone, method=None, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=PEAK, weight_decay=0.1)
    return ls.SequenceClassification(
        backbone, method or ls.LoRA(rank=2), num_labels=2, **{"optimizer": optimizer, **options}
    )


# Parameter groups.


@pytest.mark.parametrize(
    "method",
    [
        ls.LoRA(rank=2),
        ls.RoseLoRA(rank=2),
        ls.SoRA(rank=2, sparsity_weight=1.0),
        ls.SoRA(rank=2, sparsity_weight=1.0, train_head=["bert.embeddings.LayerNorm", "classifier"]),
        ls.GatedRoseLoRA(rank=2, threshold=0.1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_trained_parameter_is_in_exactly_one_group(method, tiny_bert):
    module = classifier(tiny_bert, method)
    module.configure_model()
    grouped = [id(p) for group in parameter_groups(module, method) for p in group["params"]]
    assert len(set(grouped)) == len(grouped)
    assert set(grouped) == {id(p) for p in module.parameters() if p.requires_grad}


def test_no_group_is_empty(tiny_bert):
    module = classifier(tiny_bert, ls.LoRA(rank=2, train_head=False))
    module.configure_model()
    (group,) = parameter_groups(module, module.method)
    assert len(group["params"]) == 2 * 13


def test_gates_biases_and_norms_do_not_decay_and_gates_have_their_own_lr(tiny_bert, trainer, loader):
    method = ls.SoRA(rank=2, sparsity_weight=1.0, gate_lr=0.5, train_head=["bert.embeddings.LayerNorm", "classifier"])
    module = classifier(tiny_bert, method, lr_schedule="constant", warmup=0.0)
    run = trainer(max_epochs=1)
    run.fit(module, loader())
    names = {parameter: name for name, parameter in module.named_parameters()}
    options = {
        names[p]: (group["weight_decay"], group["lr"])
        for g in [run.optimizers[0].param_groups]
        for group in g
        for p in group["params"]
    }
    for name, found in options.items():
        if name.endswith(".gate"):
            assert found == (0.0, 0.5), name
        elif name.endswith((".bias", "LayerNorm.weight")):
            assert found == (0.0, PEAK), name
        else:
            assert name.endswith((".lora_A", ".lora_B_t", "classifier.weight"))
            assert found == (0.1, PEAK), name
    assert sum(name.endswith(".gate") for name in options) == 13
    assert sum(name.endswith((".bias", "LayerNorm.weight")) for name in options) == 3


def test_gates_have_the_lr_of_the_rest_unless_told(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    module = classifier(tiny_bert, ls.SoRA(rank=2, sparsity_weight=1.0), lr_schedule="constant", warmup=0.0)
    run.fit(module, loader())
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {PEAK}


def test_the_optimizer_is_what_the_callable_makes(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    run.fit(classifier(tiny_bert, optimizer=functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)), loader())
    assert type(run.optimizers[0]) is torch.optim.SGD
    assert all(group["momentum"] == 0.9 for group in run.optimizers[0].param_groups)


# LoRA+.


def rates(optimizer, model):
    """Name of each trained parameter to its learning rate."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def test_the_rates_of_a_and_b_are_those_of_pefts_loraplus(tiny_bert):
    method = ls.LoRA(["query", "dense"], rank=2, loraplus_lr_ratio=16.0)
    module = classifier(tiny_bert, method)
    module.configure_model()
    other = get_peft_model(
        AutoModelForSequenceClassification.from_pretrained(tiny_bert),
        LoraConfig(target_modules=["query", "dense"], r=2, task_type="SEQ_CLS"),
    )
    found = rates(make_optimizer(module.optimizer, relative_groups(module, method)), module)
    theirs = rates(create_loraplus_optimizer(other, torch.optim.AdamW, lr=PEAK, loraplus_lr_ratio=16.0), other)
    expected = {
        name.replace("base_model.model.", "model.")
        .replace("lora_B.default.weight", "lora_B_t")
        .replace("lora_A.default.weight", "lora_A"): rate
        for name, rate in theirs.items()
        if "lora_" in name
    }
    assert {name: rate for name, rate in found.items() if "lora_" in name} == expected
    assert set(expected.values()) == {PEAK, 16 * PEAK}
    assert {rate for name, rate in found.items() if "lora_" not in name} == {PEAK}  # the head, which PEFT splits


@pytest.mark.parametrize("own_loop", [True, False])
def test_a_step_of_loraplus_equals_that_of_two_rates(own_loop, tiny_bert, trainer, loader):
    method = ls.SoRA(rank=2, threshold=1e-9, gate_lr=0.7, loraplus_lr_ratio=3.0)
    module = classifier(
        tiny_bert, method, optimizer=functools.partial(torch.optim.SGD, lr=0.5), lr_schedule="constant", warmup=0.0
    )
    module.configure_model()
    with torch.no_grad():
        for _, adapter in ls.adapters_in(module):
            nn.init.normal_(adapter.lora_B_t, std=0.1)
    batch = next(iter(loader()))
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    slopes = dict(zip(trained, torch.autograd.grad(module(**batch).loss, list(trained.values())), strict=True))
    if own_loop:
        optimizer = torch.optim.SGD(ls.parameter_groups(module, method, lr=0.5), lr=0.5)
        steps = ls.SparseSteps(method, module, optimizer, total_steps=2)
        module(**batch).loss.backward()
        steps.observe()
        optimizer.step()
    else:
        trainer(max_steps=1).fit(module, loader(count=8))
    for name, parameter in trained.items():
        rate = {"lora_B_t": 1.5, "gate": 0.7}.get(name.rpartition(".")[2], 0.5)
        torch.testing.assert_close(parameter.detach(), before[name] - rate * slopes[name], rtol=1e-4, atol=1e-6)


def test_the_ratio_holds_on_embeddings_convolutions_and_experts():
    net = nn.Sequential(nn.Embedding(9, 4), nn.Conv2d(3, 3, 2))
    moe = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    for model, targets in ((net, ["0", "1"]), (moe, ["gate_up_proj", "down_proj"])):
        method = ls.LoRA(targets, rank=2, train_head=False, loraplus_lr_ratio=4.0)
        adapters = ls.inject(model, method)
        found = rates(torch.optim.AdamW(ls.parameter_groups(model, method, lr=PEAK), lr=PEAK), model)
        assert found == {
            f"{name}.{matrix}": rate for name in adapters for matrix, rate in (("lora_A", PEAK), ("lora_B_t", 4 * PEAK))
        }


def test_a_ratio_of_one_leaves_the_groups_as_they_are(tiny_bert):
    module = classifier(tiny_bert, ls.LoRA(rank=2))
    module.configure_model()
    groups = parameter_groups(module, module.method)
    assert [sorted(group) for group in groups] == [["params"], ["params", "weight_decay"]]


def test_the_schedule_keeps_the_ratio(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    run.fit(classifier(tiny_bert, ls.LoRA(rank=2, loraplus_lr_ratio=8.0)), loader())
    assert run.lr_scheduler_configs[0].scheduler.base_lrs == [PEAK, 8 * PEAK, PEAK]


def test_rates_that_are_tensors_are_multiplied_once():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    method = ls.LoRA(["0"], rank=2, train_head=["1"], loraplus_lr_ratio=2.0)
    ls.inject(net, method)
    make = functools.partial(torch.optim.SGD, lr=torch.tensor(PEAK), foreach=False)
    optimizer = make_optimizer(make, relative_groups(net, method))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([PEAK, 2 * PEAK, PEAK])


def test_a_ratio_that_cannot_reach_the_optimizer_is_an_error():
    net = nn.Sequential(nn.Linear(4, 4))
    method = ls.LoRA(["0"], rank=2, train_head=False, loraplus_lr_ratio=2.0)
    ls.inject(net, method)
    with pytest.raises(ls.UsageError, match="multiplies the optimizer's learning rate: give that rate to parameter_gr"):
        ls.parameter_groups(net, method)
    with pytest.raises(ls.UsageError, match="learning rate, and Adafactor has none"):
        make_optimizer(Adafactor, relative_groups(net, method))
    plain = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=PEAK)
    message = r"loraplus_lr_ratio is 2, but the optimizer holds A with lr 0\.01 and B with lr 0\.01"
    with pytest.raises(ls.UsageError, match=message):
        ls.SparseSteps(method, net, plain, total_steps=5)
    ls.SparseSteps(method, net, plain, total_steps=5, steps_taken=1)  # a resumed run has the rates of its checkpoint


# Schedules.


def linear(step, warm, total):
    return step / warm if step < warm else (total - step) / (total - warm)


def cosine(step, warm, total):
    return step / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def constant(step, warm, total):
    return min(1.0, step / warm) if warm else 1.0


class Rates(Callback):
    """The learning rate of every optimizer step, as the optimizer used it."""

    def __init__(self):
        self.rates = []

    def on_train_start(self, trainer, pl_module):
        note = lambda optimizer, *_: self.rates.append(optimizer.param_groups[0]["lr"])  # noqa: E731
        trainer.optimizers[0].register_step_post_hook(note)


@pytest.mark.parametrize("formula", [linear, cosine, constant], ids=lambda formula: formula.__name__)
@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_schedules_follow_their_formula_over_the_whole_run(formula, warmup, accumulate, tiny_bert, trainer, loader):
    rates = Rates()
    run = trainer(max_epochs=2, accumulate_grad_batches=accumulate, callbacks=[rates])
    run.fit(classifier(tiny_bert, lr_schedule=formula.__name__, warmup=warmup), loader(count=24, batch_size=4))
    total = 12 // accumulate  # 6 batches an epoch
    assert run.estimated_stepping_batches == total
    warm = round(warmup * total)
    expected = [PEAK * formula(step, warm, total) for step in range(total)]
    assert rates.rates == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_a_group_with_its_own_lr_keeps_its_ratio(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    run.fit(classifier(tiny_bert, ls.SoRA(rank=2, threshold=1e-3, gate_lr=3 * PEAK)), loader(count=64))
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    assert rates == pytest.approx([0.0, 0.0, 0.0])  # linear: the whole run is over
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.base_lrs == [PEAK, PEAK, 3 * PEAK]


@pytest.mark.parametrize(("schedule", "warmup"), [("linear", 0.0), ("cosine", 0.1), ("constant", 0.1)])
def test_a_schedule_over_a_run_without_end_is_an_error(schedule, warmup, tiny_bert, trainer, loader):
    module = classifier(tiny_bert, lr_schedule=schedule, warmup=warmup)
    with pytest.raises(ls.UsageError, match="needs the length of the run: set the Trainer's max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(module, loader())


def test_a_constant_rate_needs_no_end():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = lr_scheduler(optimizer, "constant", 0.0, float("inf"))
    for _ in range(5):
        assert scheduler.get_last_lr() == [PEAK]
        optimizer.step()
        scheduler.step()
