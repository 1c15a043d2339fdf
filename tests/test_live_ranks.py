"""One rule says which ranks are live: monitor, table, inspect, report, compaction and exports show the same numbers."""

import csv
import functools
import math
import re
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from backbones import build_tiny
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.statistics import live_ranks
from lit_sparse.cli.inspect import inspect_adapters
from lit_sparse.interchange.stored_folder import read_layers

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from add_a_method import MagnitudeRanks

RANK = 4


class ZeroedRows(ls.SparseMethod):
    """Zeroes half of the ranks, without gates: one by its row of A, one by its row of Bᵀ."""

    def __init__(self, target_modules: str | list[str] = "all-linear", rank: int = RANK) -> None:
        super().__init__(target_modules, rank=rank)

    def after_step(self, adapters, step, observed) -> None:
        for adapter in adapters:
            adapter.lora_A[0] = 0
            adapter.lora_B_t[1] = 0


class SomeClosed(ls.HardConcreteLoRA):
    """Starts with a gate in four closed and one wide open, farther than a short run moves them."""

    def adapt(self, layer, overrides):
        adapter = super().adapt(layer, overrides)
        with torch.no_grad():
            adapter.gate.copy_(torch.linspace(-6, 6, RANK))
        return adapter


METHODS = {
    "rows": ZeroedRows(),
    "magnitudes": MagnitudeRanks(rank=RANK, kept=1),
    "hard concrete": SomeClosed(rank=RANK, penalty_weight=1.0),
}


@pytest.fixture(scope="module", params=METHODS)
def run(request, tmp_path_factory):
    """A trained module, and the folder that holds its logs and checkpoint."""
    folder = tmp_path_factory.mktemp("run")
    tokens = torch.randint(2, 60, (16, 8), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in tokens]
    backbone = folder / "backbone"
    build_tiny(BertForSequenceClassification).save_pretrained(backbone)
    method = METHODS[request.param]
    optimizer = functools.partial(torch.optim.Adam, lr=1e-2)
    module = ls.SequenceClassification(str(backbone), method, num_labels=2, optimizer=optimizer)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=CSVLogger(folder, name=None, version="logs"),
        callbacks=[ls.SparsityMonitor()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(folder / "logs" / "end.ckpt")
    return module, folder / "logs"


def gates_of(adapter):
    """A factor for each rank, spelt out."""
    if adapter.gate is None:
        return [1.0] * len(adapter.lora_A)
    return [min(1.0, max(0.0, 1.2 / (1 + math.exp(-v)) - 0.1)) for v in adapter.gate.tolist()]


def counted(module):
    """(live ranks, parameters in them), spelt out."""
    ranks = parameters = 0
    for _, adapter in ls.adapters_in(module):
        for a, b, gate in zip(adapter.lora_A.tolist(), adapter.lora_B_t.tolist(), gates_of(adapter), strict=True):
            if any(a) and any(b) and gate:
                ranks += 1
                parameters += sum(v != 0 for v in a) + sum(v != 0 for v in b)
    return ranks, parameters


def change(adapter):
    """``scale · B diag(gate) A``, spelt out."""
    gates = torch.tensor(gates_of(adapter))
    return adapter.scale * adapter.lora_B.detach() * gates @ adapter.lora_A.detach()


def test_a_layer_in_evaluation_computes_with_the_gates_that_are_exported(run):
    module, _ = run
    for _, adapter in ls.adapters_in(module.eval()):
        x = torch.randn(3, adapter.in_features)
        torch.testing.assert_close(adapter(x), adapter.base(x) + x @ change(adapter).T, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.delta_weight(), change(adapter), rtol=1e-4, atol=1e-6)


def test_monitor_and_its_table_count_the_live_ranks(run):
    module, logs = run
    ranks, parameters = counted(module)
    layers = len(list(ls.adapters_in(module)))
    assert 0 < ranks < layers * RANK
    table = list(csv.DictReader((logs / "sparsity.csv").read_text().splitlines()))
    assert sum(int(row["rank"]) for row in table) == ranks
    assert sum(int(row["remaining_parameters"]) for row in table) == parameters
    logged = [
        row for row in csv.DictReader((logs / "metrics.csv").read_text().splitlines()) if row["sparsity/mean_rank"]
    ][-1]
    assert float(logged["sparsity/mean_rank"]) * layers == ranks
    assert float(logged["sparsity/remaining_parameters"]) == parameters


@pytest.mark.slow
def test_inspect_and_report_count_the_live_ranks(run, tmp_path, capsys):
    module, logs = run
    ranks, parameters = counted(module)
    inspect_adapters(str(logs / "end.ckpt"), report=str(tmp_path / "report.html"))
    held = len(list(ls.adapters_in(module))) * RANK
    for text in (capsys.readouterr().out, (tmp_path / "report.html").read_text()):
        assert re.search(rf"\b{ranks} of {held} ranks|\b{held - ranks} of {held} ranks are zero", text)
        assert f"{parameters:,}" in text


@pytest.mark.parametrize("form", ["peft", "sparse"])
def test_exports_hold_the_live_ranks(form, run, tmp_path, capsys):
    module, logs = run
    ranks, parameters = counted(module)
    ls.export_checkpoint(str(logs / "end.ckpt"), str(tmp_path / "out"), form)
    if form == "peft":
        tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
        pairs = [(A, tensors[key.replace("lora_A", "lora_B")].T) for key, A in tensors.items() if "lora_A" in key]
    else:
        pairs = [(factors.lora_A, factors.lora_B_t) for factors in read_layers(tmp_path / "out").values()]
    assert sum(int((A.any(1) & B_t.any(1)).sum()) for A, B_t in pairs) == ranks
    assert sum(int(A.count_nonzero() + B_t.count_nonzero()) for A, B_t in pairs) == parameters
    by_hand = [change(adapter) for _, adapter in ls.adapters_in(module.model)]
    assert sorted(float((B_t.T @ A).norm()) for A, B_t in pairs) == pytest.approx(
        sorted(float(delta.norm()) for delta in by_hand if delta.any()), rel=1e-4
    )
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{parameters:,} parameters in {ranks} of" in card
    inspect_adapters(str(tmp_path / "out"))
    assert f"{parameters:,}" in capsys.readouterr().out


def test_compaction_leaves_the_live_ranks(run):
    module, _ = run
    ranks, _ = counted(module)
    assert sum(ls.compact(module.model).values()) == ranks
    assert all(bool(live_ranks(adapter).all()) for _, adapter in ls.adapters_in(module))
