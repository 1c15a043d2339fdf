"""lit_sparse.ForgettingCap: however a run is trained, its end has not forgotten more than it may."""

import csv
import functools
import json
import math
from pathlib import Path

import lightning as L
import pytest
import torch
from backbones import save_tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from programs import run as run_program
from projects import write_config
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.way_back import WayBack
from lit_sparse.serving.from_checkpoint import export_checkpoint

METHODS = {
    "LoRA": lambda: ls.LoRA(rank=4, dropout=0.5),
    "SoRA": lambda: ls.SoRA(rank=4, threshold=0.02),
    "budget": lambda: ls.SoRA(rank=4, budget=0.5, begin=2, end=6),
    "RoseLoRA": lambda: ls.RoseLoRA(rank=4, density=0.3, begin=2, end=6),
    "GatedRoseLoRA": lambda: ls.GatedRoseLoRA(rank=4, threshold=0.02, density=0.3, begin=2, end=6),
    "SHiRA": lambda: ls.SHiRA(changed=0.05, mask="random"),
    "LIFT": lambda: ls.LIFT(changed=0.05, filter_rank=4, update_every=3),
    "GoRA": lambda: ls.LoRA(rank=4, init_weights="gora", start_batches=2, gora_gamma=0.1),
    "SpIEL": lambda: ls.SpIEL(changed=0.05, update_every=3, window=2),
}
by_method = pytest.mark.parametrize("method", METHODS)


def causal_lm(backbone, method="LoRA", lr=3e-2, **options):
    made = METHODS[method]() if isinstance(method, str) else method
    optimizer = functools.partial(torch.optim.AdamW, lr=lr)
    return ls.CausalLM(backbone, made, max_new_tokens=4, optimizer=optimizer, **options)


def texts(folder, word, count=8, **options):
    """The same prompts with another answer for every word: who learns one forgets the others."""
    if not folder.exists():
        folder.mkdir()
        rows = [{"instruction": f"a {n}", "input": "", "output": f"the {word}"} for n in range(count)]
        for split in ("train", "validation"):
            (folder / f"{split}.json").write_text(json.dumps(rows))
    return ls.InstructionData(str(folder), template="{instruction} : ", **{"batch_size": 4, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


@pytest.fixture(scope="module")
def knowing_llama(folder):
    """A model that was trained on the rivers, and so has something to forget."""
    name = save_tiny_llama(folder / "llama")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(name)
    data = texts(folder / "river", "river", batch_size=8, tokenizer=name)
    data.prepare_data()
    data.setup("validate")
    (batch,) = data.val_dataloader()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(20):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(name)
    return name


@pytest.fixture
def dogs(folder):
    return texts(folder / "dog", "dog")


@pytest.fixture
def rivers(folder):
    return texts(folder / "river", "river")


@pytest.fixture
def rise(knowing_llama, folder, trainer):
    """How much higher a module's loss on the rivers is than the pretrained model's, by validation."""

    def loss(module):
        (found,) = trainer().validate(module, texts(folder / "river", "river"), verbose=False)
        return found["val_loss"]

    return lambda module: loss(module) - loss(causal_lm(knowing_llama))


def trained(module):
    return {name: value.detach().clone() for name, value in module.named_parameters() if value.requires_grad}


@by_method
def test_the_end_is_within_the_tolerance(method, knowing_llama, dogs, rivers, rise, trainer):
    plain, free = causal_lm(knowing_llama, method), ls.ForgettingProbe(rivers)
    trainer(max_epochs=4, callbacks=[free]).fit(plain, dogs)
    tolerance = 0.3 * free.change["loss"]
    assert tolerance > 0
    cap, module = ls.ForgettingCap(rivers, tolerance), causal_lm(knowing_llama, method)
    trainer(max_epochs=4, callbacks=[cap]).fit(module, dogs)
    assert cap.change["loss"] <= tolerance
    assert cap.bound
    assert cap.scale < 1
    assert rise(module) == pytest.approx(cap.change["loss"], abs=1e-5)
    assert 0.9 * tolerance <= rise(module)  # it gave up no more than it had to
    assert cap.before == pytest.approx(free.before) or method == "GoRA"  # which starts apart from the pretrained model


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # a budget does not hold after one step
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    tolerance=st.sampled_from([1e-4, 1e-3, 1e-2, 0.1, 1.0]),
    lr=st.sampled_from([1e-3, 3e-2, 0.3]),
    method=st.sampled_from(list(METHODS)),
    steps=st.integers(1, 9),
    seed=st.integers(0, 9),
)
def test_any_run_ends_within_any_tolerance(tolerance, lr, method, steps, seed, knowing_llama, folder, rise, trainer):
    torch.manual_seed(seed)
    cap, module = ls.ForgettingCap(texts(folder / "river", "river"), tolerance), causal_lm(knowing_llama, method, lr)
    trainer(max_steps=steps, callbacks=[cap]).fit(module, texts(folder / "dog", "dog"))
    assert rise(module) <= tolerance + 1e-6


def test_a_cap_that_never_binds_changes_nothing(knowing_llama, dogs, rivers, trainer):
    ends = []
    cap = ls.ForgettingCap(rivers, 100.0)
    for callbacks in ([], [cap]):
        torch.manual_seed(0)
        module = causal_lm(knowing_llama)
        trainer(max_epochs=2, callbacks=callbacks).fit(module, dogs)
        ends.append(trained(module))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    assert cap.bound == 0
    assert "The cap never bound" in cap.report


@by_method
def test_shrinking_wakes_no_rank_and_no_entry(method, knowing_llama, dogs, trainer):
    module = causal_lm(knowing_llama, method)
    trainer(max_epochs=4).fit(module, dogs)
    adapters = dict(ls.adapters_in(module))
    before = {name: adapter.delta_weight() for name, adapter in adapters.items()}
    state, way = trained(module), WayBack(module)
    way.go(1.25)
    for name, adapter in adapters.items():
        torch.testing.assert_close(adapter.delta_weight(), 0.25 * before[name])
        assert torch.equal(adapter.delta_weight() == 0, before[name] == 0)
    after = trained(module)
    assert all(torch.equal(after[name] == 0, value == 0) for name, value in state.items())
    assert all(
        torch.equal(after[name], value) for name, value in state.items() if not name.endswith(("lora_B_t", "values"))
    )
    way.go(WayBack.whole)
    assert all(torch.equal(trained(module)[name], value) for name, value in state.items())


def test_the_shortest_way_ends_at_the_pretrained_model_with_its_head(tiny_bert, loader, trainer):
    module = ls.SequenceClassification(tiny_bert, METHODS["SoRA"](), num_labels=2)
    module.configure_model()
    head = module.model.classifier.weight.detach().clone()
    trainer(max_epochs=2).fit(module, loader())
    learned = module.model.classifier.weight.detach().clone()
    assert not torch.equal(head, learned)
    batch = next(iter(loader()))
    module.eval()
    with torch.no_grad(), ls.disable_adapters(module):
        pretrained = module(**batch).logits
    way = WayBack(module)
    way.go(1.0)
    assert torch.equal(module.model.classifier.weight, learned)
    way.go(0.25)
    torch.testing.assert_close(module.model.classifier.weight.data, head + 0.25 * (learned - head))
    way.go(way.shortest)
    with torch.no_grad():
        torch.testing.assert_close(module(**batch).logits, pretrained)


def test_a_head_goes_back_only_if_it_must(tiny_bert, toy_rows, loader, trainer):
    """Rows with the opposite labels: their loss rises by the head too."""

    class Opposite(L.LightningDataModule):
        def val_dataloader(self):
            rows = [toy_rows(16)[i] for i in range(16)]
            return DataLoader([{**row, "labels": 1 - row["labels"]} for row in rows], batch_size=8)

    scales = {}
    for tolerance in (1e-4, 0.05, 1.0):
        torch.manual_seed(0)
        module = ls.SequenceClassification(
            tiny_bert, ls.LoRA(rank=4), num_labels=2, optimizer=functools.partial(torch.optim.AdamW, lr=0.02)
        )
        cap = ls.ForgettingCap(Opposite(), tolerance)
        trainer(max_epochs=4, callbacks=[cap]).fit(module, loader())
        assert cap.change["loss"] <= tolerance
        scales[tolerance] = cap.scale
    assert scales[1e-4] == 0
    assert 0 < scales[0.05] < scales[1.0] or scales[0.05] == 0


def files_of(tmp_path, *callbacks):
    return [path for callback in callbacks for path in Path(callback.dirpath or tmp_path).glob("*.ckpt")]


def loss_on(module, data, trainer):
    (found,) = trainer().validate(module, data, verbose=False)
    return found["val_loss"]


@pytest.mark.parametrize("steps", [8, 7], ids=["to the end of an epoch", "into an epoch"])
def test_every_file_of_the_end_holds_what_was_certified(steps, knowing_llama, folder, rivers, rise, trainer, tmp_path):
    data = texts(folder / "dogs", "dog", count=16)
    kinds = {
        "own": ls.SparseCheckpoint(str(tmp_path / "own")),
        "monitored": ls.SparseCheckpoint(str(tmp_path / "monitored"), monitor="val_loss", filename="best"),
        "steps": ls.SparseCheckpoint(str(tmp_path / "steps"), every_n_train_steps=1, filename="newest"),
        "plain": ModelCheckpoint(str(tmp_path / "plain"), save_last=True),
        "plain steps": ModelCheckpoint(str(tmp_path / "plain_steps"), every_n_train_steps=1, filename="newest"),
    }
    cap, module = ls.ForgettingCap(rivers, 0.01), causal_lm(knowing_llama)
    run = trainer(max_steps=steps, callbacks=[*kinds.values(), cap], enable_checkpointing=True)
    run.fit(module, data)
    assert cap.scale < 1
    files = files_of(tmp_path, *kinds.values())
    assert len(files) >= len(kinds)
    for file in files:
        saved = ls.CausalLM.load_from_checkpoint(file)
        assert rise(saved) <= 0.01 + 1e-5, file
        if file.stem != "best":
            assert all(torch.equal(value, trained(saved)[name]) for name, value in trained(module).items()), file
    export_checkpoint(str(tmp_path / "own" / "last.ckpt"), str(tmp_path / "exported"))
    again = causal_lm(knowing_llama, ls.LoRA(rank=4), start_from=str(tmp_path / "exported"))
    assert rise(again) <= 0.01 + 1e-5


def test_a_best_file_from_between_two_measurements_is_told_of(knowing_llama, folder, rivers, trainer, tmp_path):
    class Early(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            pl_module.log("early", -float(trainer.global_step))

    kept = ModelCheckpoint(str(tmp_path / "kept"), monitor="early", mode="max", every_n_train_steps=1)
    callbacks = [Early(), kept, ls.ForgettingCap(rivers, 0.01)]
    run = trainer(max_epochs=1, callbacks=callbacks, enable_checkpointing=True, limit_val_batches=0)
    with pytest.warns(UserWarning, match="The best checkpoint by 'early' was saved between two measurements"):
        run.fit(causal_lm(knowing_llama), texts(folder / "dogs", "dog", count=16))


@pytest.mark.parametrize("kill_at", [2, 3, 4, 6])
@pytest.mark.parametrize("method", ["LoRA", "GatedRoseLoRA"])
def test_a_resumed_run_ends_bit_for_bit_as_if_uninterrupted(method, kill_at, knowing_llama, folder, trainer, tmp_path):
    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == kill_at:
                trainer.save_checkpoint(tmp_path / "killed.ckpt")
                raise RuntimeError("killed")

    def fit(*callbacks, ckpt_path=None):
        L.seed_everything(3, verbose=False)
        cap, module = ls.ForgettingCap(texts(folder / "river", "river"), 0.01), causal_lm(knowing_llama, method)
        run = trainer(max_epochs=2, callbacks=[cap, *callbacks], val_check_interval=2)
        run.fit(module, texts(folder / "dogs", "dog", count=16), ckpt_path=ckpt_path)
        return trained(module), cap

    straight, cap = fit()
    with pytest.raises(RuntimeError, match="killed"):
        fit(Kill())
    resumed, again = fit(ckpt_path=str(tmp_path / "killed.ckpt"))
    assert cap.bound
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    assert (again.before, again.after, again.report) == (cap.before, cap.after, cap.report)


def test_what_is_logged_and_reported(knowing_llama, dogs, rivers, trainer, tmp_path, capsys):
    cap, logger = ls.ForgettingCap(rivers, 0.01, "river"), CSVLogger(tmp_path, "log", "0")
    module = causal_lm(knowing_llama)
    trainer(max_epochs=3, callbacks=[cap], logger=logger).fit(module, dogs)
    with (tmp_path / "log" / "0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("river/scale")]
    assert len(rows) == cap.measurements == 3  # once for a validation and the end of its epoch
    bound = [row for row in rows if float(row["river/scale"]) < 1]
    assert len(bound) == cap.bound > 0
    for row in rows:
        assert float(row["river/rise"]) <= 0.01
        assert (float(row["river/rise_trained"]) > 0.01) == (row in bound)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The loss on river rose by {cap.change['loss']:.3g} (cap 0.01). The cap bound at {cap.bound} of 3" in shown
    assert f"at the end it scaled the adapters by {cap.scale:.3g}. Validation without and with it: loss" in shown
    (with_it,) = trainer().validate(module, dogs, verbose=False)
    assert f"→ {with_it['val_loss']:.4g}" in cap.report


class NoLabels(L.LightningDataModule):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def val_dataloader(self):
        return DataLoader(self.rows, batch_size=None)


IDS = torch.arange(5, 11).view(1, 6)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "cannot measure CausalLM on NoLabels. There is nothing to measure CausalLM by: no batches"),
        ([{"input_ids": IDS, "labels": torch.full_like(IDS, -100)}], "no batches, or none with labels"),
        ([{"input_ids": IDS}], "CausalLM cannot take the rows of NoLabels"),
        ([{"pixel_values": torch.ones(1, 3, 4, 4)}], "cannot take the rows of NoLabels"),
        ([{"input_ids": IDS, "labels": torch.ones(1).long()}], "on NoLabels. CausalLM needs a label for every token"),
        ([{"input_ids": IDS + 10**6, "labels": IDS}], "cannot take the rows of NoLabels"),
    ],
    ids=["empty", "no labels", "none at all", "images", "classes", "another vocabulary"],
)
def test_data_that_cannot_be_measured(rows, message, knowing_llama, dogs, trainer):
    with pytest.raises(ls.UsageError, match=message):
        trainer(max_epochs=1, callbacks=[ls.ForgettingCap(NoLabels(rows), 0.1)]).fit(causal_lm(knowing_llama), dogs)


def test_answers_have_no_loss(knowing_llama, dogs, trainer, tmp_path):
    (tmp_path / "boolq").mkdir()
    rows = [{"instruction": f"is it {n}", "input": "", "output": "true", "answer": "true"} for n in range(6)]
    for split in ("train", "test"):
        (tmp_path / "boolq" / f"{split}.json").write_text(json.dumps(rows))
    cap = ls.ForgettingCap(ls.ReasoningData(str(tmp_path), template="{instruction} : "), 0.1, split="test")
    with pytest.raises(ls.UsageError, match="caps a loss, but CausalLM measures accuracy on ReasoningData"):
        trainer(max_epochs=1, callbacks=[cap]).fit(causal_lm(knowing_llama), dogs)


def test_what_the_user_is_told(knowing_llama, dogs, rivers, trainer):
    for tolerance in (0.0, -0.1, math.nan, math.inf):
        with pytest.raises(ls.UsageError, match=r"tolerance must be (finite and )?above 0"):
            ls.ForgettingCap(rivers, tolerance)
    two = [ls.ForgettingCap(rivers, 0.1, "one"), ls.ForgettingCap(rivers, 0.1, "two")]
    with pytest.raises(ls.UsageError, match="several ForgettingCaps"):
        trainer(max_epochs=1, callbacks=two).fit(causal_lm(knowing_llama), dogs)
    average = [EMAWeightAveraging(), ls.ForgettingCap(rivers, 0.1)]
    with pytest.raises(ls.UsageError, match="EMAWeightAveraging saves an average of the weights"):
        trainer(max_epochs=1, callbacks=average).fit(causal_lm(knowing_llama), dogs)
    with pytest.raises(ls.UsageError, match="init_weights 'pissa'"):
        trainer(max_epochs=1, callbacks=[ls.ForgettingCap(rivers, 0.1)]).fit(
            causal_lm(knowing_llama, ls.LoRA(rank=4, init_weights="pissa")), dogs
        )
    with pytest.raises(ls.UsageError, match="cannot shrink trained rows of tokens"):
        trainer(max_epochs=1, callbacks=[ls.ForgettingCap(rivers, 0.1)]).fit(
            causal_lm(knowing_llama, new_tokens=["<x>"]), dogs
        )
    nan = ls.ForgettingCap(rivers, 0.1, measure=lambda *_: {"loss": math.nan})
    with pytest.raises(ls.UsageError, match="loss of the pretrained model on InstructionData is nan"):
        trainer(max_epochs=1, callbacks=[nan]).fit(causal_lm(knowing_llama), dogs)


@pytest.mark.parametrize("found", [{}, None])
def test_a_measure_without_a_loss(found, knowing_llama, dogs, rivers, trainer):
    cap = ls.ForgettingCap(rivers, 0.1, measure=lambda *_: found)
    with pytest.raises(ls.UsageError, match="caps a loss, but CausalLM measures nothing on InstructionData"):
        trainer(max_epochs=1, callbacks=[cap]).fit(causal_lm(knowing_llama), dogs)


def test_validation_rows_may_have_no_length(knowing_llama, dogs, rivers, trainer):
    class Stream(IterableDataset):
        def __iter__(self):
            for n in range(4):
                yield {"input_ids": IDS[0] + n, "attention_mask": torch.ones_like(IDS[0]), "labels": IDS[0] + n}

    cap = ls.ForgettingCap(rivers, 1e-3)
    loaders = DataLoader(Stream(), batch_size=2), DataLoader(Stream(), batch_size=2)
    trainer(max_epochs=1, callbacks=[cap]).fit(causal_lm(knowing_llama), *loaders)
    assert cap.scale < 1
    assert "Validation without and with it: loss" in cap.report


def test_a_loss_that_is_never_within_the_tolerance_fails_the_run(knowing_llama, dogs, rivers, trainer):
    losses = iter(range(1000))
    cap = ls.ForgettingCap(rivers, 0.1, measure=lambda *_: {"loss": float(next(losses))})
    with pytest.raises(ls.TrainingError, match=r"no scale of the adapters is within the tolerance 0\.1"):
        trainer(max_epochs=1, callbacks=[cap]).fit(causal_lm(knowing_llama), dogs)


@pytest.mark.slow
def test_the_command_line(knowing_llama, folder, dogs, rivers, rise, tmp_path):
    def data(word):
        arguments = {"path": str(folder / word), "template": "{instruction} : ", "batch_size": 4}
        return {"class_path": "lit_sparse.InstructionData", "init_args": arguments}

    cap = {"class_path": "lit_sparse.ForgettingCap", "init_args": {"data": data("river"), "tolerance": 0.01}}
    kept = {"class_path": "lit_sparse.SparseCheckpoint", "init_args": {"dirpath": "kept"}}
    model = {"class_path": "lit_sparse.CausalLM", "init_args": {"backbone": knowing_llama}}
    write_config(tmp_path / "run.yaml", model, data("dog"), 3e-2, max_epochs=3, callbacks=[cap, kept])
    done = run_program(["-m", "lit_sparse", "fit", "--config", "run.yaml"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The cap bound at" in " ".join(done.stdout.split())
    assert rise(ls.CausalLM.load_from_checkpoint(tmp_path / "kept" / "last.ckpt")) <= 0.01 + 1e-5
