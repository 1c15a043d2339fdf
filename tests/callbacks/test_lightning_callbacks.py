"""Lightning's own callbacks beside Sparsify: none may lose zeros, steps or schedules without a word."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.functional import cubic_density

ROWS, BATCH, EPOCHS = 64, 8, 3
METHODS = {
    "sora": lambda: ls.SoRA(["query", "value"], rank=4, threshold=0.03, freeze_zero_after=4),
    "roselora": lambda: ls.RoseLoRA(["query", "value"], rank=4, density=0.1, begin=0.1, end=0.8),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pulls"),
    pytest.mark.filterwarnings("ignore:No gate became zero"),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]
State = dict[str, Tensor]


class Data(pl.LightningDataModule):
    """Rows in a fixed order; the first token tells the label."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = BATCH

    def train_dataloader(self) -> DataLoader:
        tokens = torch.randint(2, 60, (ROWS, 6), generator=torch.Generator().manual_seed(1))
        return DataLoader([{"input_ids": t, "labels": (t[0] > 30).long()} for t in tokens], self.batch_size)

    def val_dataloader(self) -> DataLoader:
        return self.train_dataloader()


def bert() -> nn.Module:
    return build_tiny(BertForSequenceClassification, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def module_of(method: ls.SparseMethod) -> ls.SequenceClassification:
    torch.manual_seed(0)
    module = ls.SequenceClassification(bert(), method, num_labels=2)
    module.configure_model()  # now: a callback that draws random numbers must not change the start
    return module


class Own(pl.LightningModule):
    """A user's own module, with a learning rate that tuners can set."""

    def __init__(self, method: ls.SparseMethod, lr: float = 1e-3, grouped: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lr, self.method, self.grouped = lr, method, grouped
        self.model = bert()
        ls.inject(self.model, method)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.Adam(ls.parameter_groups(self, self.method) if self.grouped else trained, lr=self.lr)


def fit(module: pl.LightningModule, *callbacks: pl.Callback, data: Any = None, **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    where = {"ckpt_path": options.pop("ckpt_path")} if "ckpt_path" in options else {}
    trainer = pl.Trainer(
        **{"max_epochs": EPOCHS, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options},
        callbacks=list(callbacks),
    )
    source = {"train_dataloaders": data} if isinstance(data, DataLoader) else {"datamodule": data or Data()}
    trainer.fit(module, **source, **where)
    return trainer


def state_of(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def adapter_state_of(state: State) -> State:
    return {name: value for name, value in state.items() if name.endswith(("lora_A", "lora_B_t", "gate"))}


def adapter_state(module: nn.Module) -> State:
    return adapter_state_of(state_of(module))


def zeros(state: State) -> int:
    return sum(int((value == 0).sum()) for value in state.values())


def differing(a: State, b: State) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def steps_taken(trainer: pl.Trainer) -> int:
    return next(callback for callback in trainer.callbacks if isinstance(callback, ls.Sparsify)).steps_taken


class Record(pl.Callback):
    """The weights after every batch, and those that each validation sees."""

    def __init__(self) -> None:
        self.trained: list[State] = []
        self.validated: list[State] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.trained.append(state_of(pl_module))

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *args: Any) -> None:
        if batch_idx == 0 and not trainer.sanity_checking:
            self.validated.append(state_of(pl_module))


AVERAGES = {
    "mean": lambda: WeightAveraging(),
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "ema_at_once": lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.8)),
    "ema_sometimes": lambda: EMAWeightAveraging(decay=0.8, update_every_n_steps=5),
}


def written_out_average(kind: str, snapshots: list[State]) -> State:
    """The average of floating-point entries that are not zero now; everything else as it is now.

    Entries of adapters that are zero now are zero in the average, whether this step updates it or not.
    """
    count, average = 0, dict(snapshots[0])
    for step, state in enumerate(snapshots):
        for name, now in adapter_state_of(state).items():
            average[name] = torch.where(now == 0, 0.0, average[name])
        if kind == "ema_sometimes" and step % 5:
            continue
        share = 1 / (count + 1) if kind == "mean" or count == 0 else 0.2
        for name, now in state.items():
            if not now.is_floating_point():
                average[name] = now
                continue
            mean = average[name].double() * (1 - share) + now.double() * share
            average[name] = torch.where(now == 0, 0.0, mean).to(now.dtype)
        count += 1
    return average


@pytest.mark.slow
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("kind", METHODS)
def test_an_averaged_model_is_as_sparse_as_the_model(kind: str, average: str) -> None:
    alone, beside = Record(), Record()
    fit(module_of(METHODS[kind]()), alone)
    module = module_of(METHODS[kind]())
    before = state_of(module)
    fit(module, AVERAGES[average](), beside)
    # What is trained is untouched, although every validation swapped it out.
    assert not [step for step, (a, b) in enumerate(zip(alone.trained, beside.trained, strict=True)) if differing(a, b)]
    expected, found = written_out_average(average, beside.trained), state_of(module)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
        assert torch.equal(found[name] == 0, value == 0), name
    assert zeros(adapter_state(module)) > 0
    # Frozen weights are those of the backbone, bit for bit.
    frozen = [name for name, parameter in module.named_parameters() if not parameter.requires_grad]
    assert len(frozen) > 20
    assert not [name for name in frozen if not torch.equal(found[name], before[name])]
    # Each validation saw the average of then.
    per_epoch = ROWS // BATCH
    for epoch, seen in enumerate(beside.validated):
        then = written_out_average(average, beside.trained[: (epoch + 1) * per_epoch])
        for name, value in then.items():
            torch.testing.assert_close(seen[name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(seen[name] == 0, value == 0), name
    assert len(beside.validated) == EPOCHS


@pytest.mark.parametrize("when", [{"update_every_n_steps": 7}, {"update_starting_at_step": 1000}])
@pytest.mark.parametrize("kind", METHODS)
def test_an_average_that_is_seldom_updated_is_as_sparse_as_the_model(kind: str, when: dict[str, int]) -> None:
    record, module = Record(), module_of(METHODS[kind]())
    fit(module, EMAWeightAveraging(decay=0.8, **when), record)
    per_epoch = ROWS // BATCH
    for epoch, seen in enumerate([*record.validated, state_of(module)]):
        trained = adapter_state_of(record.trained[min((epoch + 1) * per_epoch, len(record.trained)) - 1])
        assert zeros(trained) > 0
        for name, value in trained.items():
            assert (seen[name][value == 0] == 0).all(), (epoch, name)


@pytest.mark.parametrize("first", [True, False])
def test_the_order_of_callbacks_does_not_matter_to_averages(first: bool) -> None:
    method, record = METHODS["roselora"](), Record()
    module = Own(method)
    sparsify, average = ls.Sparsify(method), EMAWeightAveraging(decay=0.8)
    fit(module, *((sparsify, average) if first else (average, sparsify)), record)
    for name, value in written_out_average("ema", record.trained).items():
        assert torch.equal(module.state_dict()[name] == 0, value == 0), name
    assert [(a.lora_A != 0).sum(1).max() for _, a in ls.adapters_in(module)] == [3] * 4  # a tenth of 32


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("first", [True, False])
def test_an_average_of_hard_concrete_gates_is_on_the_budget(first: bool, every: int) -> None:
    """Their gates are zero where log α is not: its average would stay above for a long time."""
    method, record = ls.HardConcreteLoRA(["query", "value"], rank=4, budget=0.5, begin=2, end=10), Record()
    module = Own(method, grouped=True)
    own = ls.Sparsify(method), EMAWeightAveraging(decay=0.999, update_every_n_steps=every)
    fit(module, *(own if first else own[::-1]), record)
    names = [name for name in record.trained[-1] if name.endswith("gate")]
    closed = torch.cat([record.trained[-1][name] for name in names]) < 0
    for seen in (*record.validated[1:], state_of(module)):  # the first validation was before the end of the schedule
        estimates = method.effective_gate(torch.cat([seen[name] for name in names]), training=False)
        assert closed.sum() == 8
        assert ((estimates == 0) == closed).all()


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", METHODS)
def test_training_with_an_average_is_resumed(kind: str, own: bool, tmp_path: Path) -> None:
    def run(**options: Any) -> pl.LightningModule:
        method = METHODS[kind]()
        module, sparsify = (Own(method), [ls.Sparsify(method)]) if own else (module_of(method), [])
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        fit(module, *sparsify, EMAWeightAveraging(decay=0.8), keep, enable_checkpointing=True, **options)
        return module

    straight = run()
    file = tmp_path / "epoch=0.ckpt"
    saved = torch.load(file, weights_only=True)
    resumed = run(ckpt_path=file)
    assert not differing(state_of(straight), state_of(resumed))
    assert zeros(adapter_state(resumed)) > 0
    if not own:
        frozen = {name for name, parameter in straight.named_parameters() if not parameter.requires_grad}
        assert saved["current_model_state"].keys() == saved["state_dict"].keys()
        assert not frozen & saved["state_dict"].keys()
        loaded = ls.SequenceClassification.load_from_checkpoint(file, backbone=bert())
        assert not differing(adapter_state(loaded), adapter_state_of(saved["state_dict"]))


@pytest.mark.parametrize("averaged", [False, True])
@pytest.mark.parametrize("kind", METHODS)
def test_the_best_checkpoints_hold_what_was_validated(kind: str, averaged: bool, tmp_path: Path) -> None:
    record, keep = Record(), ModelCheckpoint(tmp_path, "{epoch}", monitor="val_loss", save_top_k=2)
    average = [EMAWeightAveraging(decay=0.8)] if averaged else []
    fit(module_of(METHODS[kind]()), *average, record, keep, enable_checkpointing=True)
    assert len(list(tmp_path.iterdir())) == 2
    for path in keep.best_k_models:
        validated = record.validated[int(Path(path).stem.removeprefix("epoch="))]
        loaded = ls.SequenceClassification.load_from_checkpoint(path, backbone=bert())
        assert not differing(adapter_state(loaded), adapter_state_of(validated))
        assert zeros(adapter_state(loaded)) > 0


@pytest.mark.parametrize("own", [True, False])
def test_stochastic_weight_averaging_is_refused(own: bool) -> None:
    method = METHODS["sora"]()
    module, callbacks = (Own(method), [ls.Sparsify(method)]) if own else (module_of(method), [])
    with pytest.raises(ls.UsageError, match=r"StochasticWeightAveraging .* Use lightning\.pytorch\.callbacks\.Weight"):
        fit(module, *callbacks, StochasticWeightAveraging(1e-3))


def test_an_average_that_cannot_be_kept_sparse_is_refused() -> None:
    class Later(WeightAveraging):
        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            """Would make its average in the middle of training."""

    with pytest.raises(ls.UsageError, match="Later has no AveragedModel"):
        fit(module_of(METHODS["sora"]()), Later())


@pytest.mark.parametrize("kind", METHODS)
def test_stopping_early_leaves_the_schedule_where_it_was(kind: str) -> None:
    record = Record()
    whole = fit(module_of(METHODS[kind]()), record)
    module = module_of(METHODS[kind]())
    stopped = fit(module, EarlyStopping("val_loss", min_delta=100.0, patience=1))  # nothing improves by 100
    assert steps_taken(stopped) == stopped.global_step == 2 * ROWS // BATCH < steps_taken(whole)
    # The schedules are those of the whole run, not of the part that was done.
    assert not differing(state_of(module), record.trained[2 * ROWS // BATCH - 1])


def test_training_can_stop_when_it_is_sparse_enough() -> None:
    module = module_of(METHODS["sora"]())
    record = Record()
    stop = EarlyStopping("sparsity/zero_gates", mode="max", stopping_threshold=0.2, check_on_train_epoch_end=True)
    trainer = fit(module, stop, record, max_epochs=10)
    per_epoch = ROWS // BATCH
    shares = []
    for state in record.trained[per_epoch - 1 :: per_epoch]:
        gates = [value for name, value in adapter_state_of(state).items() if name.endswith("gate")]
        shares.append(sum(int((gate == 0).sum()) for gate in gates) / sum(gate.numel() for gate in gates))
    assert shares[-1] > 0.2
    assert all(share <= 0.2 for share in shares[:-1])
    assert 0 < trainer.global_step == per_epoch * len(shares) < 10 * per_epoch


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_the_trial_steps_of_tuners_leave_no_trace(kind: str) -> None:
    untouched = module_of(METHODS[kind]())
    expected = fit(untouched)
    finder = LearningRateFinder(num_training_steps=15, update_attr=False)
    sizes = BatchSizeFinder(init_val=BATCH, max_trials=1, steps_per_trial=2)  # it finds the size that was
    for tuner in (finder, sizes):
        tuned = module_of(METHODS[kind]())
        trainer = fit(tuned, tuner)
        assert steps_taken(trainer) == trainer.global_step == steps_taken(expected)
        assert not differing(state_of(tuned), state_of(untouched)), tuner
    assert len(finder.optimal_lr.results["loss"]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
def test_training_uses_the_learning_rate_that_was_found(kind: str) -> None:
    method = METHODS[kind]()
    tuned = Own(method)
    trainer = fit(tuned, LearningRateFinder(min_lr=1e-4, num_training_steps=15), ls.Sparsify(method))
    assert tuned.lr not in (1e-3, 1e-4)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [tuned.lr]
    method = METHODS[kind]()
    plain = Own(method, lr=tuned.lr)
    fit(plain, ls.Sparsify(method))
    assert not differing(state_of(tuned), state_of(plain))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "options"),
    [
        (ls.SoRA(["query", "value"], rank=4, threshold=0.03, gate_lr=0.05), {}),
        (ls.SoRA(["query", "value"], rank=4, budget=0.25), {"lr_schedule": "cosine"}),
        (ls.RoseLoRA(["query", "value"], rank=4, density=0.1, loraplus_lr_ratio=4), {"warmup": 0.3}),
    ],
    ids=["gates", "budget", "loraplus"],
)
def test_a_found_learning_rate_is_the_peak_of_the_schedule(method: ls.SparseMethod, options: dict[str, Any]) -> None:
    def module(**settings: Any) -> ls.SequenceClassification:
        torch.manual_seed(0)
        return ls.SequenceClassification(bert(), method, **settings, **options)

    searched = module()
    fit(searched, LearningRateFinder(min_lr=1e-4, num_training_steps=15))
    found = searched.lr
    assert found is not None
    assert found not in (1e-3, 1e-4)
    expected = module(optimizer=lambda groups: torch.optim.AdamW(groups, lr=found))
    trainer = fit(expected)
    assert not differing(state_of(searched), state_of(expected))
    rates = {group["initial_lr"] for group in trainer.optimizers[0].param_groups}
    assert rates == {found} | ({0.05} if getattr(method, "gate_lr", None) else set()) | (
        {4 * found} if method.loraplus_lr_ratio == 4 else set()
    )


def test_a_found_learning_rate_that_overwrites_gate_lr_is_an_error() -> None:
    method = ls.SoRA(["query"], rank=4, threshold=0.03, gate_lr=0.05)
    with pytest.raises(ls.UsageError, match=r"gate_lr is 0\.05, but the optimizer holds gates with lr"):
        fit(Own(method, grouped=True), LearningRateFinder(num_training_steps=15), ls.Sparsify(method))


def test_a_tuner_in_the_middle_of_training_is_an_error() -> None:
    class Midway(LearningRateFinder):
        def on_fit_start(self, *args: Any) -> None:
            """Not yet."""

        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            self.lr_find(trainer, pl_module)

    with pytest.raises(ls.UsageError, match="run tuners before training"):
        fit(module_of(METHODS["roselora"]()), Midway(num_training_steps=5, update_attr=False))


@pytest.mark.slow
def test_a_found_batch_size_shortens_the_schedule_of_our_data(tmp_path: Path) -> None:
    backbone = save_tiny_bert(tmp_path / "bert")
    lines = [f"{'good' if i % 2 else 'bad'} film {i},{i % 2}" for i in range(96)]
    (tmp_path / "train.csv").write_text("\n".join(["text,label", *lines]))
    data = ls.TextClassificationData(
        data_files=dict.fromkeys(["train", "validation"], str(tmp_path / "train.csv")),
        text="text",
        label="label",
        tokenizer=backbone,
        batch_size=4,
    )
    module = ls.SequenceClassification(backbone, METHODS["roselora"](), lr_schedule="constant", warmup=0)
    trainer = fit(module, BatchSizeFinder(init_val=4, max_trials=3, steps_per_trial=2), data=data, max_epochs=2)
    assert data.batch_size == 16
    assert steps_taken(trainer) == trainer.global_step == 2 * 96 // 16
    assert [(a.lora_A != 0).sum(1).tolist() for _, a in ls.adapters_in(module)] == [[3] * 4] * 4


def test_the_schedule_knows_that_accumulation_changes() -> None:
    record = Record()
    trainer = fit(module_of(METHODS["roselora"]()), GradientAccumulationScheduler({1: 3, 2: 4}), record)
    total = 8 + 3 + 2  # eight batches an epoch, the last step of an epoch with what is left
    assert steps_taken(trainer) == trainer.global_step == total
    last_batches = [*range(8), 8 + 2, 8 + 5, 8 + 7, 16 + 3, 16 + 7]
    for step, batch in enumerate(last_batches, start=1):
        # B is zero until step 2, as the warm-up begins at a learning rate of zero: no score tells entries of A apart.
        density = cubic_density(step, total, 0.1, 0.1, 0.8) if step > 2 else 1
        kept = [(v != 0).sum(1).max() for k, v in record.trained[batch].items() if k.endswith("lora_A")]
        assert kept == [max(1, int(density * 32 + 1e-9))] * 4, step


def test_max_steps_still_ends_a_run_whose_accumulation_changes() -> None:
    growing = GradientAccumulationScheduler({1: 4})
    trainer = fit(module_of(METHODS["roselora"]()), growing, max_epochs=10, max_steps=9)
    assert steps_taken(trainer) == trainer.global_step == 9
    assert [(a.lora_A != 0).sum(1).tolist() for _, a in ls.adapters_in(trainer.lightning_module)] == [[3] * 4] * 4


def test_data_without_length_is_a_run_without_end() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(Data().train_dataloader().dataset)

    method = METHODS["roselora"]()
    with pytest.raises(ls.UsageError, match="this run has no end"):
        fit(Own(method), ls.Sparsify(method), data=DataLoader(Stream(), BATCH))
    method = METHODS["roselora"]()
    module = Own(method)
    fit(module, ls.Sparsify(method), data=DataLoader(Stream(), BATCH), max_steps=10)
    assert [(a.lora_A != 0).sum(1).tolist() for _, a in ls.adapters_in(module)] == [[3] * 4] * 4
