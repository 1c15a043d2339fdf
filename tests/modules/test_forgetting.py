"""lit_sparse.ForgettingProbe: other data measured before and after training."""

import functools
import json
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.callbacks.measuring import measured


def causal_lm(backbone):
    return ls.CausalLM(
        backbone,
        ls.LoRA(rank=4, dropout=0.5),
        max_new_tokens=4,
        optimizer=functools.partial(torch.optim.AdamW, lr=3e-2),
    )


def texts(folder, word, count=8):
    folder.mkdir()
    rows = [{"instruction": f"{word} {n}", "input": "", "output": f"the {word}"} for n in range(count)]
    for split in ("train", "validation", "test"):
        (folder / f"{split}.json").write_text(json.dumps(rows))
    return ls.InstructionData(str(folder), template="{instruction} : ", batch_size=4)


def test_a_language_model_forgets_what_it_is_not_trained_on(tiny_llama, tmp_path, trainer):
    data, other = texts(tmp_path / "dog", "dog"), texts(tmp_path / "river", "river")
    module, probe = causal_lm(tiny_llama), ls.ForgettingProbe(other, "river")
    run = trainer(max_epochs=6, callbacks=[probe], logger=CSVLogger(tmp_path, "log", "0"))
    untouched = causal_lm(tiny_llama)
    (before,) = trainer().validate(untouched, texts(tmp_path / "again", "river"), verbose=False)
    run.fit(module, data)
    for figure in ("loss", "perplexity", "token_accuracy"):
        assert probe.before[figure] == pytest.approx(before[f"val_{figure}"], rel=1e-5)
    (after,) = trainer().validate(module, texts(tmp_path / "once more", "river"), verbose=False)
    for figure in ("loss", "perplexity", "token_accuracy"):
        assert probe.after[figure] == pytest.approx(after[f"val_{figure}"], rel=1e-5)
        assert probe.change[figure] == probe.after[figure] - probe.before[figure]
    assert probe.change["loss"] != 0
    logged = (tmp_path / "log" / "0" / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"river/loss_before", "river/loss_after", "river/loss_change", "river/perplexity_after"} <= set(logged)


def test_the_data_module_of_the_run_keeps_its_trainer(tiny_llama, tmp_path, trainer):
    data, seen = texts(tmp_path / "dog", "dog"), []

    class Look(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            seen.append(data.trainer is trainer)

    trainer(max_epochs=1, callbacks=[ls.ForgettingProbe(data, split="test"), Look()]).fit(causal_lm(tiny_llama), data)
    assert seen == [True]


def test_measuring_changes_nothing_of_training(tiny_llama, tmp_path, trainer):
    ends = []
    for probes in ([], [ls.ForgettingProbe(texts(tmp_path / "river", "river"), split="test")]):
        torch.manual_seed(0)
        module = causal_lm(tiny_llama)
        trainer(max_epochs=2, callbacks=probes).fit(module, texts(tmp_path / f"dog{len(probes)}", "dog"))
        ends.append({name: value.detach() for name, value in module.named_parameters() if value.requires_grad})
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


@pytest.mark.parametrize(("split", "only"), [("test", "test"), ("validate", "validation")])
def test_other_data_need_no_training_rows(split, only, tiny_llama, tmp_path, trainer):
    other = texts(tmp_path / "river", "river")
    for file in (tmp_path / "river").iterdir():
        if file.stem != only:
            file.unlink()
    probe = ls.ForgettingProbe(other, "river", split)
    run = trainer(max_epochs=1, callbacks=[probe])
    run.fit(causal_lm(tiny_llama), texts(tmp_path / "dog", "dog"))
    assert probe.before["loss"] > 0
    assert run.state.fn == "fit"
    assert run.state.finished


def test_a_resumed_run_keeps_what_was_measured_before(tiny_llama, tmp_path, trainer):
    data, other = texts(tmp_path / "dog", "dog"), texts(tmp_path / "river", "river")
    probe = ls.ForgettingProbe(other)
    run = trainer(max_epochs=1, callbacks=[probe])
    run.fit(causal_lm(tiny_llama), data)
    run.save_checkpoint(tmp_path / "one.ckpt")
    again = ls.ForgettingProbe(texts(tmp_path / "river2", "river"))
    resumed = trainer(max_epochs=2, callbacks=[again])
    resumed.fit(causal_lm(tiny_llama), texts(tmp_path / "dog2", "dog"), ckpt_path=str(tmp_path / "one.ckpt"))
    assert again.before == probe.before
    assert again.after != probe.after


def test_answers_of_another_task(tiny_llama, tmp_path, trainer):
    for split in ("train", "test"):
        (tmp_path / "boolq").mkdir(exist_ok=True)
        rows = [{"instruction": f"is it {n}", "input": "", "output": "true", "answer": "true"} for n in range(6)]
        (tmp_path / "boolq" / f"{split}.json").write_text(json.dumps(rows))
    other = ls.ReasoningData(str(tmp_path), template="{instruction} : ", max_length=64)
    probe = ls.ForgettingProbe(other, "boolq", split="test")
    trainer(max_epochs=1, callbacks=[probe]).fit(causal_lm(tiny_llama), texts(tmp_path / "dog", "dog"))
    assert probe.before.keys() == probe.after.keys() == {"accuracy"}
    assert 0 <= probe.after["accuracy"] <= 1


def test_a_measure_of_your_own_and_a_module_of_your_own(tiny_llama, tmp_path, trainer):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def forward(self, x):
            return type("Output", (), {"loss": self.layer(x).square().mean()})

        def training_step(self, batch, batch_idx):
            return self(**batch).loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Rows(L.LightningDataModule):
        def val_dataloader(self):
            return DataLoader([{"x": torch.ones(2, 1)}, {"x": torch.zeros(6, 1)}], batch_size=None)

    counted = ls.ForgettingProbe(
        Rows(), "count", measure=lambda module, batches, data: {"rows": sum(len(b["x"]) for b in batches)}
    )
    losses = ls.ForgettingProbe(Rows(), "loss")
    module = Own()
    w, b = module.layer.weight.item(), module.layer.bias.item()
    trainer(max_steps=3, callbacks=[counted, losses]).fit(
        module, DataLoader([{"x": torch.ones(2, 1)}] * 3, batch_size=None)
    )
    assert counted.before == counted.after == {"rows": 8}
    assert losses.before["loss"] == pytest.approx((2 * (w + b) ** 2 + 6 * b**2) / 8)


def test_classifiers_are_measured_by_rows(tiny_bert):
    module = ls.SequenceClassification(tiny_bert, ls.LoRA(rank=2), num_labels=2)
    module.configure_model()
    module.train()
    made = [{"input_ids": torch.randint(5, 60, (rows, 6)), "labels": torch.randint(0, 2, (rows,))} for rows in (1, 7)]
    found = measured(module, made)
    assert module.training
    module.eval()
    with torch.no_grad():
        logits = torch.cat([module(**batch).logits for batch in made])
    labels = torch.cat([batch["labels"] for batch in made])
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_perplexity_of_a_lost_model_is_a_number():
    class Lost(ls.CausalLM):
        def _scored(self, batch):
            return 5000 * torch.nn.functional.one_hot(batch["ids"], 4).float(), 0 * batch["ids"]

    found = measured(Lost("unused", ls.LoRA(rank=1)), [{"ids": torch.ones(2, 3, dtype=torch.long)}])
    assert found["loss"] == pytest.approx(5000)
    assert math.isfinite(found["perplexity"])


def test_a_loss_that_is_no_number_stays_one(tiny_bert):
    class Broken(ls.SequenceClassification):
        def forward(self, **batch):
            output = super().forward(**batch)
            output.loss = output.loss * (math.nan if len(batch["labels"]) == 1 else 1)
            return output

    module = Broken(tiny_bert, ls.LoRA(rank=2), num_labels=2)
    module.configure_model()
    made = [{"input_ids": torch.randint(5, 60, (rows, 6)), "labels": torch.zeros(rows).long()} for rows in (1, 3)]
    assert math.isnan(measured(module, made)["loss"])
    assert math.isfinite(measured(module, made[1:])["loss"])


def test_a_tagger_is_measured_as_it_is_validated(tiny_bert, trainer):
    names = ["O", "B-X", "I-X"]
    module = ls.TokenClassification(tiny_bert, ls.LoRA(rank=2), num_labels=3, label_names=names)
    labels = torch.randint(0, 3, (4, 6), generator=torch.Generator().manual_seed(1)).masked_fill(
        torch.eye(4, 6) > 0, -100
    )
    ids = torch.randint(5, 60, (4, 6))
    made = [{"input_ids": ids[rows], "labels": labels[rows]} for rows in (slice(0, 1), slice(1, 4))]
    (logged,) = trainer().validate(module, DataLoader(made, batch_size=None), verbose=False)
    assert {f"val_{name}": value for name, value in measured(module, made).items()} == pytest.approx(logged)
    assert logged.keys() == {f"val_{name}" for name in ("loss", "accuracy", "precision", "recall", "f1")}


def test_what_the_user_is_told(tiny_llama, tmp_path, trainer):
    data = texts(tmp_path / "dog", "dog")
    with pytest.raises(ls.UsageError, match="split must be 'validate' or 'test'; got 'predict'"):
        ls.ForgettingProbe(data, split="predict")
    with pytest.raises(ls.UsageError, match="holds no slash; got 'a/b'"):
        ls.ForgettingProbe(data, "a/b")
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `ForgettingProbe`"):
        trainer(callbacks=[ls.ForgettingProbe(data), ls.ForgettingProbe(data)]).fit(causal_lm(tiny_llama), data)
    two = [ls.ForgettingProbe(data, "one"), ls.ForgettingProbe(data, "two")]
    trainer(max_epochs=1, callbacks=two).fit(causal_lm(tiny_llama), data)
    assert two[0].after == two[1].after
    with pytest.raises(ls.UsageError, match="nothing to measure CausalLM by"):
        measured(causal_lm(tiny_llama), [])
