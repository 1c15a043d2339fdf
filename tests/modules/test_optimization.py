"""lit_sparse.modules.optimization: parameter groups, and schedules against their formulas."""

import functools
import math

import pytest
import torch
from lightning.pytorch import Callback

import lit_sparse as ls
from lit_sparse.modules.optimization import lr_scheduler, parameter_groups

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
