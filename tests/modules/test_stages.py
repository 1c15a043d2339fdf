"""lit_sparse.ThresholdStages: thresholds, learning rates and the best model, stage by stage of one run."""

import csv
import functools
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.callbacks.measuring import measured
from lit_sparse.modules.optimization import lr_scheduler


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        ids = torch.randint(5, 60, (8, 6), generator=generator)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": (ids[:, 2] > 30).long()})
    return made


def loader(count=4, seed=0):
    return DataLoader(batches(count, seed), batch_size=None)


def classifier(backbone, method=None, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    method = method or ls.SoRA(rank=4, threshold=1e-3, gate_init="ones")
    return ls.SequenceClassification(backbone, method, num_labels=2, optimizer=optimizer, **options)


class Watch(Callback):
    """Threshold, learning rate and live ranks at every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        gates = torch.cat([adapter.gate for _, adapter in ls.adapters_in(pl_module)])
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((pl_module.method.threshold, lr, int((gates != 0).sum())))


STAGES = {"first": 0.0, "last": 0.2, "count": 3, "monitor": "val_accuracy", "first_epochs": 2, "epochs": 1}


def read(folder):
    with (Path(folder) / "stages.csv").open() as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


@pytest.mark.slow
def test_stages_raise_the_threshold_and_restart_the_learning_rate(tiny_bert, tmp_path, trainer):
    watch, module = Watch(), classifier(tiny_bert, warmup=0.25)
    stages = ls.ThresholdStages(**STAGES, folder=str(tmp_path / "stages"))
    trainer(max_epochs=4, callbacks=[stages, watch]).fit(module, loader(), loader(2, seed=1))
    assert [threshold for threshold, _, _ in watch.seen] == [0.0] * 8 + [0.1] * 4 + [0.2] * 4
    # Lightning moves the schedule before it calls the callbacks: the rate is that of the next step.
    parameter = torch.nn.Parameter(torch.zeros(1))
    rates = []
    for length in (8, 4, 4):
        scheduler = lr_scheduler(torch.optim.SGD([parameter], lr=1e-2), "linear", 0.25, length)
        for _ in range(length):
            rates.append(scheduler.get_last_lr()[0])
            scheduler.optimizer.step()
            scheduler.step()
    assert [rate for _, rate, _ in watch.seen] == pytest.approx([*rates[1:], 0.0])
    ranks = [left for _, _, left in watch.seen]
    assert ranks[7] > ranks[-1]
    rows = read(tmp_path / "stages")
    assert [row["stage"] for row in rows] == [1, 2, 3]
    assert [row["threshold"] for row in rows] == pytest.approx([0.0, 0.1, 0.2])
    assert rows[0]["remaining_parameters"] >= rows[1]["remaining_parameters"] > rows[2]["remaining_parameters"]
    assert rows[-1]["train_loss"] == pytest.approx(measured(module, batches(4))["loss"], rel=1e-5)
    assert 0 <= rows[-1]["train_accuracy"] <= 1
    assert (tmp_path / "stages" / "stages.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_checkpoint_of_a_stage_is_that_of_its_best_validation(tiny_bert, tmp_path, trainer):
    class Record(Callback):
        def __init__(self):
            self.values = []

        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                left = sum(layer.remaining_parameters for layer in layer_sparsity(pl_module))
                self.values.append((float(trainer.callback_metrics["val_loss"]), left))

    from lit_sparse.adapters.statistics import layer_sparsity

    record = Record()
    options = {**STAGES, "first_epochs": 3, "epochs": 2, "monitor": "val_loss", "mode": "min", "spacing": "linear"}
    stages = ls.ThresholdStages(**options, folder=str(tmp_path / "stages"))
    trainer(max_epochs=7, callbacks=[stages, record]).fit(classifier(tiny_bert), loader(), loader(2, seed=1))
    for stage, epochs in enumerate(([0, 1, 2], [3, 4], [5, 6]), 1):
        best = min(epochs, key=lambda epoch: record.values[epoch][0])
        row = read(tmp_path / "stages")[stage - 1]
        assert row["epoch"] == best
        assert (row["val_loss"], row["remaining_parameters"]) == pytest.approx(record.values[best])
        saved = classifier(tiny_bert)
        (found,) = trainer().validate(
            saved, loader(2, seed=1), ckpt_path=str(tmp_path / "stages" / f"stage-{stage}.ckpt"), verbose=False
        )
        assert found["val_loss"] == pytest.approx(row["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_stage(tiny_bert, tmp_path, trainer):
    straight = ls.ThresholdStages(**STAGES, folder=str(tmp_path / "straight"))
    trainer(max_epochs=4, callbacks=[straight]).fit(classifier(tiny_bert), loader(), loader(2, seed=1))

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 2:
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise KeyboardInterrupt

    cut = ls.ThresholdStages(**STAGES, folder=str(tmp_path / "cut"))
    torch.manual_seed(0)
    with pytest.raises(SystemExit):
        trainer(max_epochs=4, callbacks=[cut, Stop()]).fit(classifier(tiny_bert), loader(), loader(2, seed=1))
    resumed = ls.ThresholdStages(**STAGES, folder=str(tmp_path / "cut"))
    run = trainer(max_epochs=4, callbacks=[resumed])
    run.fit(classifier(tiny_bert), loader(), loader(2, seed=1), ckpt_path=str(tmp_path / "cut.ckpt"))
    assert [row["stage"] for row in resumed.rows] == [1, 2, 3]
    assert resumed.rows[:2] == cut.rows[:2]
    assert [row["threshold"] for row in read(tmp_path / "cut")] == pytest.approx([0.0, 0.1, 0.2])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 1, "last": 0.0}, "count must be at least 2; got 1"),
        ({"epochs": 0}, "^epochs must be at least 1; got 0"),
        ({"mode": "best"}, "mode must be 'max' or 'min'; got 'best'"),
        ({"last": 0.0}, "last must be above 0; got 0"),
    ],
)
def test_arguments(changes, message):
    with pytest.raises(ls.UsageError, match=message):
        ls.ThresholdStages(**{**STAGES, **changes})


def test_what_cannot_work_is_refused_before_training(tiny_bert, trainer, tmp_path):
    def fit(module, max_epochs=4, **changes):
        stages = ls.ThresholdStages(**{**STAGES, "folder": str(tmp_path), **changes})
        trainer(max_epochs=max_epochs, callbacks=[stages]).fit(module, loader(), loader(2))

    with pytest.raises(ls.UsageError, match=r"stages take \[2, 1, 1\] epochs: .*max_epochs to 4; got 5"):
        fit(classifier(tiny_bert), max_epochs=5)
    with pytest.raises(ls.UsageError, match="the method has sparsity_weight: give it threshold"):
        fit(classifier(tiny_bert, ls.SoRA(rank=2, sparsity_weight=0.1)))
    with pytest.raises(ls.UsageError, match="sets the threshold of a method, and LoRA has none"):
        fit(classifier(tiny_bert, ls.LoRA(rank=2)))
    with pytest.raises(ls.UsageError, match="sets the threshold of a method, and SoRA has none"):
        fit(classifier(tiny_bert, ls.SoRA(rank=2, budget=0.5)))
    with pytest.raises(ls.UsageError, match="one threshold for all layers: remove threshold from overrides"):
        fit(classifier(tiny_bert, ls.SoRA(rank=2, threshold=0.1, overrides={"query": {"threshold": 0.2}})))
    with pytest.raises(ls.UsageError, match="monitors 'val_f1', which is not logged"):
        fit(classifier(tiny_bert), monitor="val_f1")
    with pytest.raises(ls.UsageError, match="needs a folder to write to"):
        fit(classifier(tiny_bert), folder=None)


def test_gated_roselora_takes_stages_too():
    method = ls.GatedRoseLoRA(rank=4, threshold=0.1, density=0.5)
    adapter = method.adapt(torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.0)
    steps = ls.SparseSteps(method, torch.nn.Sequential(adapter), optimizer, total_steps=10)
    for threshold in (0.1, 0.3):
        method.set_threshold(threshold)
        before = adapter.gate.detach().clone()
        adapter(torch.randn(2, 8)).sum().backward()
        steps.observe()
        optimizer.step()
        expected = torch.sign(before) * (before.abs() - threshold).clamp(min=0)
        torch.testing.assert_close(adapter.gate.detach(), expected)
    with pytest.raises(ls.UsageError, match="threshold must be at least 0; got nan"):
        method.set_threshold(math.nan)
