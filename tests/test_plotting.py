"""lit_sparse.reporting.plotting: pictures of a model and of a run's table."""

import re
import sys

import pytest
import torch
from backbones import build_tiny
from transformers import AlbertForSequenceClassification, BertForSequenceClassification, T5ForConditionalGeneration

import lit_sparse
from lit_sparse.adapters.injection import inject
from lit_sparse.adapters.statistics import LayerSparsity, layer_sparsity
from lit_sparse.callbacks.monitor import write_table
from lit_sparse.errors import UsageError
from lit_sparse.methods.sora import SoRA
from lit_sparse.reporting.plotting import plot_ranks

PNG = b"\x89PNG\r\n\x1a\n"


def adapted(model_class=BertForSequenceClassification, **arguments):
    model = build_tiny(model_class)
    adapters = inject(model, SoRA(threshold=0.1, **arguments))
    return model, adapters


def texts(svg) -> list[tuple[str, str]]:
    """The words of a picture, each with its place."""
    return re.findall(r'<text [^>]*?transform="([^"]*)"[^>]*>([^<]+)</text>', svg.read_text())


def test_a_model_and_its_table_give_the_same_picture(tmp_path):
    import numpy as np
    from matplotlib.image import imread

    model, adapters = adapted()
    for i, adapter in enumerate(adapters.values()):
        adapter.gate.data[: i % 9] = 0
    table = tmp_path / "sparsity.csv"
    write_table(layer_sparsity(model), table)
    lit_sparse.plot_ranks(model, tmp_path / "model.png")
    lit_sparse.plot_ranks(str(table), str(tmp_path / "table.png"))
    assert (tmp_path / "model.png").read_bytes().startswith(PNG)
    pixels = [imread(tmp_path / name) for name in ("model.png", "table.png")]
    assert np.array_equal(*pixels)
    assert pixels[0].std() > 0


@pytest.mark.parametrize(
    "model_class",
    [BertForSequenceClassification, AlbertForSequenceClassification, T5ForConditionalGeneration],
)
def test_every_layer_is_drawn_at_a_place_of_its_own(model_class, tmp_path, monkeypatch):
    """Encoder and decoder of T5 both have a block 0."""
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    model, adapters = adapted(model_class, rank=97)
    for adapter in adapters.values():
        adapter.gate.data[:30] = 0
        adapter.lora_B_t.data.fill_(1.0)
    plot_ranks(model, tmp_path / "ranks.svg")
    drawn = texts(tmp_path / "ranks.svg")
    places = [place for place, word in drawn if word == "67"]
    assert len(places) == len(set(places)) == len(adapters)
    assert f"{67 * len(adapters)} of {97 * len(adapters)} ranks remain" in [word for _, word in drawn]


def test_every_layer_keeps_its_rank_kind_and_block(tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    names = {"m.0.a.x": 61, "m.1.a.x": 62, "m.1.b.x": 63, "pooler.dense": 64, "other.dense": 65}
    layers = [LayerSparsity(name, rank, 97, 1.0, 1.0, 1.0, 1.0, 1, 1) for name, rank in names.items()]
    write_table(layers, tmp_path / "sparsity.csv")
    plot_ranks(tmp_path / "sparsity.csv", tmp_path / "ranks.svg")
    drawn = texts(tmp_path / "ranks.svg")
    words = [word for _, word in drawn]
    assert {"a.x", "b.x", "pooler.dense", "other.dense", "block"} <= set(words)
    place = {word: tuple(map(float, re.findall(r"-?[\d.]+", spot)[-2:])) for spot, word in drawn}
    (x61, y61), (x62, y62), (x63, y63), (x64, y64), (x65, y65) = (place[str(rank)] for rank in names.values())
    assert y61 == y62 < y63 < y64 < y65  # one row for each kind, downward
    assert x64 == x65 < x61 < x62 == x63  # outside of blocks, block 0, block 1


def test_a_model_without_adapters_cannot_be_drawn(tmp_path):
    message = "There is no adapter to draw: inject a method, or give the sparsity.csv of a run"
    with pytest.raises(UsageError, match=message):
        plot_ranks(build_tiny(BertForSequenceClassification), tmp_path / "x.png")
    write_table([], tmp_path / "sparsity.csv")
    with pytest.raises(UsageError, match=message):
        plot_ranks(tmp_path / "sparsity.csv", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.fixture
def run(tmp_path):
    """A checkpoint, and the log of its run above it."""
    module = lit_sparse.SparseModule(build_tiny(BertForSequenceClassification), SoRA(threshold=0.1))
    module.configure_model()
    for _, adapter in lit_sparse.adapters_in(module):
        torch.nn.init.normal_(adapter.lora_B_t)
        adapter.gate.data[:3] = 0
    checkpoint = {"state_dict": module.state_dict(), "global_step": 3}
    module.on_save_checkpoint(checkpoint)
    (tmp_path / "checkpoints").mkdir()
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "metrics.csv").write_text("step,val_loss,sparsity/mean_rank\n1,2.0,\n1,,7.0\n3,1.0,5.0\n")
    return module, tmp_path / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("plot", [lit_sparse.plot_ranks, lit_sparse.plot_gates, lit_sparse.plot_support])
def test_a_model_and_its_checkpoint_give_the_same_picture(plot, run, tmp_path):
    import numpy as np
    from matplotlib.image import imread

    module, checkpoint = run
    plot(module, tmp_path / "model.png")
    plot(checkpoint, tmp_path / "file.png")
    pixels = [imread(tmp_path / name) for name in ("model.png", "file.png")]
    assert np.array_equal(*pixels)
    assert pixels[0].std() > 0


def test_curves_are_those_of_the_run_of_a_checkpoint(run, tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    lit_sparse.plot_curves(run[1], tmp_path / "curves.svg")
    words = re.findall(r">([^<]+)</text>", (tmp_path / "curves.svg").read_text())
    assert {"loss", "val_loss", "live ranks per layer", "mean_rank", "optimizer step"} <= set(words)
    other = tmp_path / "other.csv"
    other.write_text("step,lr\n1,0.5\n")
    with pytest.raises(UsageError, match=r"There are no curves to draw among \['lr'\]"):
        lit_sparse.plot_curves(run[1], tmp_path / "x.png", metrics=other)


def test_a_layer_is_drawn_by_its_name(run, tmp_path, monkeypatch):
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    lit_sparse.plot_support(run[1], tmp_path / "support.svg", "1.attention.self.value")
    assert ">model.bert.encoder.layer.1.attention.self.value</text>" in (tmp_path / "support.svg").read_text()
    with pytest.raises(UsageError, match=r"no layer 'valu' in .*Did you mean 'value'"):
        lit_sparse.plot_support(run[1], tmp_path / "x.png", "valu")


def test_without_gates_there_are_none_to_draw(tmp_path):
    model = build_tiny(BertForSequenceClassification)
    inject(model, lit_sparse.LoRA(["query"], rank=2))
    with pytest.raises(UsageError, match="There are no gates to draw: only SoRA and methods like it have them"):
        lit_sparse.plot_gates(model, tmp_path / "x.png")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r'Figures need matplotlib: pip install "lit-sparse\[plot\]"'):
        plot_ranks(adapted()[0], tmp_path / "x.png")
