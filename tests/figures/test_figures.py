"""What the figures show, read back from their axes."""

import re

import numpy as np
import pytest
import torch

from lit_sparse.adapters.naming import common_start, places
from lit_sparse.errors import UsageError
from lit_sparse.figures.canvas import inline_svg, pixels
from lit_sparse.figures.curves import curve_figure, panels
from lit_sparse.figures.gates import gate_figure
from lit_sparse.figures.grid import grid_figure
from lit_sparse.figures.support import support_cells, support_figure


def sparse(*shape, share=0.2):
    return torch.randn(*shape) * (torch.rand(*shape) < share)


@pytest.mark.parametrize("cells", [1, 3, 5, 100])
def test_cells_are_those_of_the_dense_product(cells):
    A, B_t = sparse(4, 13), sparse(4, 11)
    sizes, touched = support_cells(A, B_t, cells)
    dense = (B_t.t().double() @ A.double()).numpy()
    rows = np.array_split(dense, min(cells, 11))
    grid = [np.array_split(row, min(cells, 13), axis=1) for row in rows]
    expected = [[float(np.sqrt((cell**2).mean())) for cell in row] for row in grid]
    assert np.allclose(sizes.numpy(), expected)
    assert np.array_equal(touched.numpy(), [[bool((cell != 0).any()) for cell in row] for row in grid])


def test_cells_of_no_rank_are_blank():
    sizes, touched = support_cells(torch.empty(0, 5), torch.empty(0, 3), 10)
    assert sizes.shape == touched.shape == (3, 5)
    assert not sizes.any()
    assert not touched.any()
    support_figure("empty", (3, 5), sizes, touched)


def test_the_spy_plot_leaves_what_is_not_touched_blank():
    A, B_t = sparse(2, 30), sparse(2, 20)
    image = support_figure("layer", (20, 30), *support_cells(A, B_t, 50)).axes[0].images[0]
    drawn = ~np.ma.getmaskarray(image.get_array())
    assert np.array_equal(drawn, (B_t.t() @ A != 0).numpy())
    assert image.cmap(np.ma.masked)[:3] == (1, 1, 1)
    assert image.cmap(0.0)[:3] != (1, 1, 1)


def test_gates_at_zero_stand_on_those_near_it():
    gates = [torch.tensor([0.0, 0.0, 1.0, -1.0]), torch.tensor([0.0, 0.01, 0.5])]
    axes = gate_figure(gates).axes[0]
    assert axes.get_title() == "3 of 7 gates are zero"
    bars = [(bar.get_x() + bar.get_width() / 2, bar.get_y(), bar.get_height()) for bar in axes.patches]
    assert sum(height for _, bottom, height in bars if bottom == 0) == 4
    assert [(round(x, 6), y, h) for x, y, h in bars if y] == [(0, 1, 3)]


def test_a_tall_bar_of_zeros_is_cut_off():
    figure = gate_figure([torch.cat([torch.zeros(500), torch.linspace(0.1, 1, 20)])])
    assert figure.axes[0].get_ylim()[1] < 100
    assert [text.get_text() for text in figure.axes[0].texts] == [" 500 ↑"]
    gate_figure([torch.zeros(4)])  # nothing else to compare with
    assert gate_figure([torch.tensor([0.0, float("nan"), 1.0])]).axes[0].get_title() == "1 of 3 gates are zero"


def test_curves_have_a_panel_for_each_kind():
    curves = {
        "sparsity/mean_rank": [(1, 8.0), (5, 3.0)],
        "sparsity/rank/query": [(5, 2.0)],
        "sparsity/density_A": [(1, 1.0)],
        "sparsity/zero_gates": [(1, 0.0)],
        "val_loss": [(5, 0.3)],
        "val_f1": [(5, 0.9)],
        "lr": [(1, 0.1)],
    }
    titles = ["live ranks per layer", "live ranks by kind of layer", "density", "loss", "metric"]
    figure = curve_figure(curves, step=4)
    assert [axes.get_title(loc="left") for axes in figure.axes] == titles == list(panels(curves))
    line, mark = figure.axes[0].lines
    assert line.get_xydata().tolist() == [[1, 8], [5, 3]]
    assert mark.get_xdata() == [4, 4]
    assert panels({"lr": [(1, 0.1)]}) == {}
    with pytest.raises(UsageError, match=r"There are no curves to draw among \['lr'\]"):
        curve_figure({"lr": [(1, 0.1)]})


def test_errors():
    with pytest.raises(UsageError, match="There are no gates to draw"):
        gate_figure([])
    with pytest.raises(UsageError, match="There is no adapter to draw"):
        grid_figure({}, "title", "label", 1, "{}")


def test_an_inline_picture_has_the_inks_of_the_page_and_no_addresses():
    figures = [grid_figure({"a.0.x": 1, "a.1.x": 5}, "title", "label", 5, "{:d}") for _ in range(2)]
    svg, again = (inline_svg(figure, "what it shows") for figure in figures)
    assert svg == again
    assert svg.startswith('<svg role="img" aria-label="what it shows" ')
    assert "http" not in re.sub(r"base64,[^\"]*", "", svg)
    assert re.search(r"<text [^>]*fill: #111111[^>]*>1</text>", svg)  # dark on a light cell
    assert "xlink:href" in svg
    assert pixels(figures[0]).shape[2] == 3


def test_kinds_and_blocks():
    names = ["model.enc.layer.0.att.query", "model.enc.layer.11.att.query", "model.pooler.dense"]
    assert list(places(names).values()) == [("att.query", 0), ("att.query", 11), ("pooler.dense", -1)]
    assert common_start(names) == "model."
    one_block = ["m.layer.3.q", "m.layer.3.v"]
    assert list(places(one_block).values()) == [("q", 3), ("v", 3)]
    two_stacks = ["t.enc.0.q", "t.dec.0.q"]
    assert list(places(two_stacks).values()) == [("enc.q", 0), ("dec.q", 0)]
    assert places([]) == {}
    assert common_start(["alone"]) == ""
