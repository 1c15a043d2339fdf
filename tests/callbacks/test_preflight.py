"""What Lightning's callbacks need is looked for before training, where it can be."""

import lightning as L
import pytest
from backbones import save_tiny_bert
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint

import lit_sparse as ls
from lit_sparse import UsageError
from lit_sparse.cli.parser import refused_by_lightning


@pytest.fixture
def parts(tmp_path):
    """A module and its data."""
    (tmp_path / "rows.csv").write_text("text,label\n" + "a good film,yes\na bad film,no\n" * 4)
    file = str(tmp_path / "rows.csv")
    method = ls.SoRA(rank=2, sparsity_weight=0.1)
    module = ls.SequenceClassification(save_tiny_bert(tmp_path / "bert"), method)
    return module, ls.TextClassificationData(data_files={"train": file, "validation": file}, batch_size=4)


def trainer(tmp_path, *callbacks, **options):
    settings = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_progress_bar": False}
    return L.Trainer(**settings, default_root_dir=tmp_path, callbacks=list(callbacks), **options)


@pytest.mark.parametrize("kind", [EarlyStopping, ModelCheckpoint])
def test_a_validation_metric_that_is_not_logged_is_refused_before_training(kind, parts, tmp_path):
    run = trainer(tmp_path, kind(monitor="val_acc"))
    with pytest.raises(UsageError, match=rf"{kind.__name__} monitors 'val_acc', but .*Did you mean 'val_accuracy'"):
        run.fit(*parts)
    assert run.global_step == 0


@pytest.mark.parametrize("monitor", ["val_loss", "val_accuracy", "train_loss"])
def test_what_is_logged_is_monitored(monitor, parts, tmp_path):
    run = trainer(tmp_path, EarlyStopping(monitor=monitor), ModelCheckpoint(monitor=monitor, dirpath=tmp_path / "kept"))
    run.fit(*parts)
    assert run.global_step == 2


@pytest.mark.parametrize(("monitor", "known"), [("val_1_accuracy", True), ("val_accuracy", False)])
def test_metrics_of_several_validation_sets_are_looked_for(monitor, known, parts, tmp_path):
    class TwoSets(ls.TextClassificationData):
        def val_dataloader(self):
            return [super().val_dataloader()] * 2

    file = str(tmp_path / "rows.csv")
    data = TwoSets(data_files={"train": file, "validation": file}, batch_size=4)
    run = trainer(tmp_path, EarlyStopping(monitor=monitor))
    if known:
        run.fit(parts[0], data)
        assert run.global_step == 2
    else:
        with pytest.raises(UsageError, match=r"logs \['val_0_accuracy', 'val_0_loss', 'val_1_accuracy'"):
            run.fit(parts[0], data)


def test_a_learning_rate_finder_of_another_attribute_is_refused(parts, tmp_path):
    run = trainer(tmp_path, LearningRateFinder(attr_name="rate"))
    with pytest.raises(UsageError, match=r"LearningRateFinder sets the attribute \['rate'\]"):
        run.fit(*parts)


def test_lightnings_errors_are_told_from_those_of_others(parts, tmp_path):
    """One that comes from a module, through Lightning, is a fault, and keeps its traceback."""

    class Faulty(ls.SequenceClassification):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("a fault")

    _, data = parts
    faulty = Faulty(str(tmp_path / "bert"), ls.SoRA(rank=2, sparsity_weight=0.1))
    with pytest.raises(RuntimeError, match="a fault") as raised:
        trainer(tmp_path).fit(faulty, data)
    assert not refused_by_lightning(raised.value)
    with pytest.raises(RuntimeError, match="train_acc") as raised:
        trainer(tmp_path, EarlyStopping(monitor="train_acc")).fit(*parts)
    assert refused_by_lightning(raised.value)
