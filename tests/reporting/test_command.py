"""`lit-sparse inspect SOURCE`: what it prints, what it writes, and what it says when it cannot."""

import re
import sys
from pathlib import Path

import programs
import pytest
import torch

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.cli.inspect import names_a_source
from lit_sparse.cli.main import main

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def _as_from_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    monkeypatch.setattr(sys, "path", list(sys.path))


def cells_of(text):
    """Layer to its cells, of the lines between the two rules."""
    lines = text.split("─\n")[1].splitlines()[:-1]
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_the_table_has_a_line_for_each_layer_and_totals(run, capsys):
    main(["inspect", str(run.checkpoint)])
    text = capsys.readouterr().out
    assert text.splitlines()[0].startswith(
        f"{run.checkpoint}: a checkpoint, trained by SoRA, step 16 of 16, sparsity final, on "
    )
    head = text.splitlines()[3].split()
    assert head == ["layer", "rank", "alpha", "A", "B", "BA", "bound", "|A|", "|B|", "|ΔW|", "left", "bytes"]
    cells, layers = cells_of(text), layer_sparsity(run.module)
    common = "model.bert."
    assert list(cells) == [layer.name.removeprefix(common) for layer in layers]
    for layer in layers:
        row = dict(zip(head[1:], cells[layer.name.removeprefix(common)], strict=True))
        adapter = run.adapters[layer.name]
        live = adapter.gate != 0
        assert row["rank"] == f"{layer.rank}/{layer.max_rank}"
        assert float(row["alpha"]) == adapter.scale * adapter.rank
        assert row["A"] == f"{layer.density_A:.3f}"
        assert row["BA"] == f"{layer.density_BA:.3f}"
        assert float(row["|A|"]) == pytest.approx(float(adapter.lora_A.detach()[live].norm()), rel=5e-3)
        assert float(row["|ΔW|"]) == pytest.approx(float(adapter.delta_weight().detach().norm()), rel=5e-3)
        assert row["left"] == f"{layer.remaining_parameters:,}"
        size = adapter.lora_A.nbytes + adapter.lora_B_t.nbytes + adapter.gate.nbytes
        assert row["bytes"] == f"{size:,}"
    left, held = sum(layer.rank for layer in layers), sum(layer.max_rank for layer in layers)
    parameters = sum(layer.remaining_parameters for layer in layers)
    assert re.search(rf"\nall layers +{left}/{held} ", text)
    assert f"{parameters:,} parameters in {left} of {held} ranks, " in text
    assert held > left


def test_logs_show_what_they_have(run, capsys):
    main(["inspect", str(run.logs)])
    text = capsys.readouterr().out
    assert "|ΔW|" not in text
    assert "Norms, gates and the support of BA are not in the logs: give a checkpoint" in text
    assert len(cells_of(text)) == len(run.adapters)


@pytest.mark.slow
def test_figures_and_report_are_written(run, tmp_path, capsys):
    query = "0.attention.self.query"
    words = ["--figures", str(tmp_path / "new" / "figures"), f"--report={tmp_path / 'report.html'}", "--layer", query]
    main(["inspect", *words, str(run.checkpoint)])
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "new" / "figures").iterdir()}
    assert set(drawn) == {"ranks.png", "change.png", "curves.png", "gates.png", "support.png"}
    assert all(picture.startswith(PNG) for picture in drawn.values())
    assert f"model.bert.encoder.layer.{query}</text>" in (tmp_path / "report.html").read_text()
    assert "Wrote ranks.png, change.png, curves.png, gates.png, support.png into" in capsys.readouterr().out


def test_metrics_come_from_where_they_are_said_to_be(run, tmp_path, capsys):
    (tmp_path / "mine.csv").write_text("step,val_f1\n1,0.125\n2,0.625\n")
    main(["inspect", str(run.checkpoint), "--metrics", str(tmp_path / "mine.csv"), "--report", "r.html"])
    page = Path("r.html").read_text()
    assert "val f1" in page
    assert "0.625" in page
    assert "val_accuracy" not in page


def test_without_matplotlib_the_table_is_there_and_figures_name_the_extra(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    main(["inspect", str(run.checkpoint)])
    assert "all layers" in capsys.readouterr().out
    for option in ("--figures", "--report"):
        with pytest.raises(SystemExit) as caught:
            main(["inspect", str(run.checkpoint), option, "x"])
        assert caught.value.code == 1
        assert 'Figures need matplotlib: pip install "lit-sparse[plot]"' in capsys.readouterr().err
    assert not Path("x").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "'nowhere' does not exist. Give "),
        (["plain.ckpt"], "'plain.ckpt' holds no adapters"),
        (["CKPT", "--reprot", "x.html"], "--reprot x.html. Did you mean --report?"),
        (["CKPT", "--config", "x.yaml"], "--config x.yaml. --help lists the known ones."),
        (["CKPT", "other"], "unrecognized arguments: other"),
        (["--report", "x.html"], "arguments are required: source"),
        (["CKPT", "--layer", "1.attention.self.qerry"], "Did you mean '1.attention.self.query'"),
        (["CKPT", "--report", "no/such/folder/x.html"], "'no/such/folder/x.html' cannot be written"),
        (["CKPT", "--figures", "plain.ckpt"], "'plain.ckpt' cannot be written"),
    ],
)
def test_errors_are_one_line(run, words, message, capsys):
    torch.save({"state_dict": {}}, "plain.ckpt")
    with pytest.raises(SystemExit) as caught:
        main(["inspect", *(str(run.checkpoint) if word == "CKPT" else word for word in words)])
    assert caught.value.code == (2 if re.search("unrecognized|required", message) or "--" in message else 1)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["inspect", "x", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert "usage: lit-sparse inspect" in text
    assert "HTML file to write" in text


@pytest.mark.parametrize(
    ("words", "stored"),
    [
        ([], False),
        (["--help"], False),
        (["--config", "a.yaml"], False),
        (["--config=a.yaml", "--config", "b.yaml", "--trainer.devices", "-1"], False),
        (["--config", "a.yaml", "--print_config"], False),
        (["a.ckpt"], True),
        (["--report", "r.html", "a.ckpt"], True),
        (["--report=r.html"], True),
        (["a.ckpt", "--config", "a.yaml"], True),
    ],
)
def test_a_configuration_is_told_from_a_source(words, stored):
    assert names_a_source(words) == stored


@pytest.mark.slow
def test_as_a_program(run):
    done = programs.run(["-m", "lit_sparse", "inspect", run.logs])
    assert done.returncode == 0, done.stderr
    assert "all layers" in done.stdout


def test_a_scale_that_is_not_known_is_said(run, capsys):
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    del checkpoint["lit_sparse"]
    checkpoint["state_dict"]["frozen"] = torch.zeros(3)
    torch.save(checkpoint, "own.ckpt")
    main(["inspect", "own.ckpt"])
    text = capsys.readouterr().out
    assert "The file names no scale and no experts: norms of BA are without it" in text
    assert "alpha" not in text.splitlines()[3]


def test_pissa_is_said(capsys):
    backbone = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    module = ls.SparseModule(backbone, ls.LoRA(["0"], rank=2, init_weights="pissa", train_head=False))
    module.configure_model()
    checkpoint = {"state_dict": module.state_dict(), "global_step": 0}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, "pissa.ckpt")
    main(["inspect", "pissa.ckpt"])
    assert "PiSSA changed the frozen weights at the start" in capsys.readouterr().out
