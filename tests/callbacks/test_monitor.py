"""What SparsityMonitor logs, shows and writes."""

import csv
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.callbacks import monitor
from lit_sparse.callbacks.monitor import read_table

FIGURES = {
    "mean_rank",
    "zero_gates",
    "density_A",
    "density_B",
    "remaining_parameters",
    "density_BA",
    "density_BA_bound",
}
KINDS = ["attention.self.query", "attention.self.key", "attention.self.value"]
KINDS += ["attention.output.dense", "intermediate.dense", "output.dense"]


def rows(count: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(5, 60, (count, 6))
    return [{"input_ids": row, "labels": row[0] % 2} for row in tokens]


def fit(folder: Path, method: Any, *callbacks: pl.Callback, **options: Any) -> tuple[ls.SparseModule, pl.Trainer]:
    backbone = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(folder / "bert"))
    module = ls.SparseModule(backbone, method)
    settings: dict[str, Any] = {"logger": CSVLogger(folder, name="log"), "enable_progress_bar": False}
    settings |= {"max_epochs": 2, "accelerator": "cpu", "enable_checkpointing": False, "log_every_n_steps": 2}
    trainer = pl.Trainer(callbacks=list(callbacks), enable_model_summary=False, **(settings | options))
    trainer.fit(module, DataLoader(rows(), batch_size=4))
    return module, trainer


@pytest.mark.filterwarnings("ignore")
def test_figures_reach_the_logger_and_the_progress_bar(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, ls.SoRA(rank=4, threshold=0.08))
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        logged = [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]
    steps = [row for row in logged if "sparsity/mean_rank" in row]
    assert len(steps) == 2 * 8 / 2 + 2  # every other step, and after each epoch
    assert {key.removeprefix("sparsity/") for row in logged for key in row if "/" in key} == {
        *FIGURES,
        *(f"rank/{kind}" for kind in [*KINDS, "pooler.dense"]),
    }
    ranks = [float(row["sparsity/mean_rank"]) for row in steps]
    assert ranks[0] > ranks[-1]
    # In line with the losses, which Lightning logs every other step too, and counts from 0.
    assert {row["step"] for row in steps} == {row["step"] for row in logged if "train_loss" in row}
    adapters = [adapter for _, adapter in ls.adapters_in(module)]
    live = [int((adapter.gate != 0).sum()) for adapter in adapters]
    total = sum(n * (a.in_features + a.out_features) for n, a in zip(live, adapters, strict=True))
    held = sum(4 * (a.in_features + a.out_features) for a in adapters)
    last = layer_sparsity(module)
    assert sum(layer.remaining_parameters for layer in last) == total
    assert total < held
    assert trainer.progress_bar_metrics["density"] == pytest.approx(total / held)
    assert set(trainer.progress_bar_metrics) <= {"loss", "density", "v_num"}, "the bar is one line"


@pytest.mark.filterwarnings("ignore")
def test_each_kind_of_layer_has_its_mean_rank_after_each_epoch(tmp_path: Path) -> None:
    module, trainer = fit(tmp_path, ls.SoRA(rank=4, threshold=0.08))
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["sparsity/density_BA"]]
    assert len(logged) == 2
    layers = {layer.name: layer.rank for layer in layer_sparsity(module)}
    for kind in KINDS:
        ranks = [layers[f"model.bert.encoder.layer.{block}.{kind}"] for block in (0, 1)]
        assert float(logged[-1][f"sparsity/rank/{kind}"]) == pytest.approx(sum(ranks) / 2)
    assert float(logged[-1]["sparsity/rank/pooler.dense"]) == layers["model.bert.pooler.dense"]


class Pictures(Logger):
    """Keeps what it is given; takes images itself, as that of Weights & Biases does."""

    name, version = "pictures", 0

    def __init__(self) -> None:
        super().__init__()
        self.images: dict[str, tuple[Any, Any]] = {}

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *others: Any) -> None:
        pass

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (self.images[key],) = [(image, step) for image in images]


class Figures(Pictures):
    """Has an experiment that takes figures, as that of TensorBoard does."""

    log_image = None  # type: ignore[assignment]

    @property
    def experiment(self) -> Any:
        return SimpleNamespace(add_figure=self.add_figure)

    def add_figure(self, tag: str, figure: Any, global_step: int) -> None:
        self.images[tag] = (figure, global_step)


@pytest.mark.filterwarnings("ignore")
def test_loggers_that_take_pictures_get_them_at_the_end(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    images, figures = Pictures(), Figures()
    loggers = [CSVLogger(tmp_path), images, figures]
    module, _ = fit(tmp_path, ls.SoRA(rank=4, threshold=0.08), logger=loggers)
    assert set(images.images) == set(figures.images) == {"sparsity/ranks", "sparsity/gates"}
    for image, step in images.images.values():
        assert step == 16
        assert image.dtype == "uint8"
        assert image.ndim == 3
        assert image.std() > 0
    figure, step = figures.images["sparsity/ranks"]
    assert isinstance(figure, Figure)
    assert step == 16
    left = sum(layer.rank for layer in layer_sparsity(module))
    assert figure.axes[0].get_title().startswith(f"{left} of ")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("installed", [True, False])
def test_no_gates_or_no_matplotlib_is_no_error(tmp_path: Path, installed: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(monitor, "_MATPLOTLIB", installed)
    if not installed:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    images = Pictures()
    fit(tmp_path, ls.LoRA(["query"], rank=2), logger=images)
    assert set(images.images) == ({"sparsity/ranks"} if installed else set())


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_gets_pictures(tmp_path: Path) -> None:
    pytest.importorskip("tensorboardX")
    fit(tmp_path, ls.SoRA(["query"], rank=2, threshold=0.1), logger=TensorBoardLogger(tmp_path, name="board"))
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("events.out.*"))
    assert b"sparsity/ranks" in written
    assert b"sparsity/gates" in written
    assert b"sparsity/rank/attention.self.query" in written


@pytest.mark.filterwarnings("ignore")
def test_the_kinds_of_layers_are_shown_and_all_layers_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, trainer = fit(tmp_path, ls.RoseLoRA(rank=4, density=0.1, begin=0, end=4, target_modules=["query"]))
    written = read_table(Path(trainer.log_dir) / "sparsity.csv")
    assert written == layer_sparsity(module)
    shown = capsys.readouterr().out
    assert "Adapters in model.bert.encoder.layer" in shown
    (head,) = [line.split() for line in shown.splitlines() if line.startswith("kind of layer")]
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("attention.self.query")]
    assert head[3:] == ["layers", "A", "B", "BA", "left"]  # all ranks are live, as always under this method
    assert row[1:4] == ["2", "0.094", "0.094"]
    kept = 3  # of 32 in each row of A and column of B
    changed = 100 * sum(layer.density_BA for layer in written) / 2
    ending = f"{2 * 4 * 2 * kept} parameters in 8 of 8 ranks, {changed:.2f} % of the adapted weights changed"
    assert f"The run ended at step 16 of 16, sparsity final, {ending}." in " ".join(shown.split())
    assert row[-1] == str(2 * 4 * 2 * kept)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "heads", "ranks"),
    [
        (ls.SoRA(rank=4, budget=0.5), ["layers", "ranks", "each", "left"], r"\d+/8"),
        (ls.LoRA(rank=4), ["layers", "ranks", "each", "left"], "8/8"),
        (ls.RoseLoRA(rank=4, density=0.5, begin=0, end=4), ["layers", "A", "B", "BA", "left"], None),
        (
            ls.GatedRoseLoRA(rank=4, density=0.5, budget=0.5),
            ["layers", "ranks", "each", "A", "B", "BA", "left"],
            r"\d+/8",
        ),
    ],
)
def test_the_columns_are_those_that_the_method_changes(
    method: ls.SparseMethod, heads: list[str], ranks: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, _ = fit(tmp_path, method)
    shown = capsys.readouterr().out
    (head,) = [line.split() for line in shown.splitlines() if line.startswith("kind of layer")]
    (row,) = [line.split() for line in shown.splitlines() if line.startswith("attention.self.query")]
    assert head[3:] == heads
    assert ranks is None or re.fullmatch(ranks, row[2])
    goal = method.goal([adapter for _, adapter in ls.adapters_in(module)])
    assert goal is None or goal in " ".join(shown.split())
    assert "lit-sparse chat" not in shown


def test_summary_prints_the_table_of_a_model_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path / "bert"))
    with pytest.raises(ls.UsageError, match="BertForSequenceClassification holds no adapter to list"):
        ls.summary(model)
    adapters = ls.inject(model, ls.LoRA(["query"], rank=4))
    for adapter in adapters.values():
        adapter.lora_B_t.data[:3] = 1.0  # three of four ranks are live
    capsys.readouterr()
    ls.summary(model)
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "Adapters in bert.encoder.layer: live ranks, parameters left"
    (row,) = [line.split() for line in shown if line.startswith("attention.self.query")]
    parameters = sum(3 * (a.in_features + a.out_features) for a in adapters.values())
    assert row[1:] == ["2", "6/8", "3", f"{parameters:,}"]
    assert " ".join(shown).endswith(
        f"{parameters:,} parameters in 6 of 8 ranks, 100.00 % of the adapted weights changed."
    )


@pytest.mark.filterwarnings("ignore")
def test_the_last_line_names_the_file_and_the_next_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, ls.LoRA(rank=2), ls.SparseCheckpoint(tmp_path / "kept here"), enable_checkpointing=True)
    shown = capsys.readouterr().out
    commands = [shlex.split(line)[1:] for line in shown.splitlines() if line.startswith("  lit-sparse ")]
    file = commands[0][1]
    assert (tmp_path / file).samefile(tmp_path / "kept here" / "last.ckpt")
    assert commands[0] == ["inspect", file]
    assert commands[1] == ["export", "--ckpt_path", file, "--format", "peft", "--output", "FOLDER"]


@pytest.mark.filterwarnings("ignore")
def test_without_a_logger_nothing_is_written(tmp_path: Path) -> None:
    fit(tmp_path, ls.LoRA(rank=2), logger=False)
    assert not list(tmp_path.rglob("sparsity.csv"))


@pytest.mark.filterwarnings("ignore")
def test_a_monitor_of_the_users_own_keeps_its_settings(tmp_path: Path) -> None:
    mine = ls.SparsityMonitor(every_n_steps=8)
    _, trainer = fit(tmp_path, ls.LoRA(rank=2), mine)
    assert [c for c in trainer.callbacks if isinstance(c, ls.SparsityMonitor)] == [mine]
    with (Path(trainer.log_dir) / "metrics.csv").open() as file:
        steps = [row for row in csv.DictReader(file) if row["sparsity/mean_rank"]]
    assert len(steps) == 2 + 2


def test_errors() -> None:
    with pytest.raises(ls.UsageError, match="every_n_steps must be at least 1; got 0"):
        ls.SparsityMonitor(every_n_steps=0)

    class Plain(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = pl.Trainer(callbacks=[ls.SparsityMonitor()], max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(ls.UsageError, match="SparsityMonitor found no adapter in Plain"):
        trainer.fit(Plain(), DataLoader(torch.randn(4, 2)))
