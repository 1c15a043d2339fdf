"""The page: complete, in one file, and of the right numbers."""

import re
from html.parser import HTMLParser

import pytest
from backbones import build_tiny
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.reporting.report import _short, _size, _title
from lit_sparse.reporting.run_logs import scores
from lit_sparse.reporting.sources import read_adapters

VOID = {"meta", "wbr", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Tags with their attributes, the table's cells, and whether tags are closed as they were opened."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.rows, self.words = [], [], [], ""
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words += data + " "
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


@pytest.fixture(scope="session")
def text(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("page") / "report.html"
    ls.write_report(run.checkpoint, output)
    return output.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def page(text):
    return Page(text)


def test_nothing_is_fetched(text, page):
    sources = [v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "srcset", "action")]
    assert sources
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not {"link", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.tags}
    assert not re.findall(r"https?:|@import|url\((?!#)|fetch\(|XMLHttp|import\(", re.sub(r"base64,[^\"]*", "", text))


def test_the_table_has_every_layer(run, page):
    layers = layer_sparsity(run.module)
    head, *rows = page.rows
    assert len(rows) == len(layers)
    for row, layer in zip(rows, layers, strict=True):
        cells = dict(zip(head, row, strict=True))
        assert layer.name.endswith(cells["layer"])
        assert cells["rank"] == f"{layer.rank}/{layer.max_rank}"
        assert cells["left"] == f"{layer.remaining_parameters:,}"
    sortable = [a for tag, a in page.tags if tag == "td"]
    assert all(float(a["data-value"]) >= -1 for a in sortable)


def test_it_names_source_method_and_key_numbers(run, page):
    layers = layer_sparsity(run.module)
    words = " ".join(page.words.split())
    curves = read_adapters(run.checkpoint).curves
    deltas = [adapter.delta_weight() for adapter in run.adapters.values()]
    changed = sum(int((delta != 0).sum()) for delta in deltas) / sum(delta.numel() for delta in deltas)
    for expected in (
        str(run.checkpoint),
        "SoRA",
        "threshold 0.12",
        f"ranks left {sum(layer.rank for layer in layers)} of {sum(layer.max_rank for layer in layers)};",
        f"parameters left {_short(sum(layer.remaining_parameters for layer in layers))} of ",
        f"weights changed {100 * changed:.3g} %",
        f"val accuracy {curves['val_accuracy'][-1][1]:.4g}",
    ):
        assert expected in words


def test_every_figure_is_inline_and_its_ids_are_its_own(page):
    figures = [a["id"] for tag, a in page.tags if tag == "figure"]
    assert figures == ["ranks", "change", "curves", "gates", "support"]
    svgs = [a for tag, a in page.tags if tag == "svg"]
    assert len(svgs) >= 4 + 4
    labels = [svg["aria-label"] for svg in svgs]
    assert len(labels) == len(set(labels))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for reference in [a["xlink:href"] for tag, a in page.tags if tag == "use"]:
        assert reference[1:] in ids


def test_black_is_the_ink_of_the_page(text):
    assert "prefers-color-scheme: dark" in text
    assert "#000000" not in text
    assert "currentColor" in text


@pytest.mark.parametrize("source", ["logs", "peft", "model"])
def test_other_sources_have_a_page_of_what_they_have(run, source, tmp_path):
    from peft import LoraConfig, get_peft_model

    if source == "peft":
        config = LoraConfig(r=2, target_modules=["query"])
        get_peft_model(build_tiny(BertForSequenceClassification), config).save_pretrained(tmp_path / "peft")
    places = {"logs": run.logs, "peft": tmp_path / "peft", "model": run.module}
    figures = {
        "logs": ["ranks", "curves"],
        "peft": ["ranks", "change", "support"],
        "model": ["ranks", "change", "gates", "support"],
    }
    ls.write_report(places[source], tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert [a["id"] for tag, a in page.tags if tag == "figure"] == figures[source]


def test_names_cannot_be_markup(tmp_path):
    from lit_sparse.adapters.statistics import LayerSparsity
    from lit_sparse.callbacks.monitor import write_table

    folder = tmp_path / "<b>&run"
    write_table([LayerSparsity("a.<i>x", 1, 2, 1.0, 1.0, 1.0, 1.0, 1, 1)], folder / "sparsity.csv")
    (folder / "hparams.yaml").write_text("backbone: <script>alert(1)</script>\n")
    ls.write_report(folder, tmp_path / "r.html")
    page = Page((tmp_path / "r.html").read_text())
    assert not {"b", "i"} & {tag for tag, attributes in page.tags if "style" not in attributes}
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<b>&run" in page.words


def test_the_step_of_a_score_is_not_after_the_checkpoint():
    curves = {"val_loss": [(1, 3.0), (4, 2.0)], "val_f1": [(1, 0.1), (4, 0.2)], "train_loss": [(1, 9.0)]}
    assert scores(curves, 3) == {"val_f1": (1, 0.1), "val_loss": (1, 3.0)}
    assert list(scores(curves, None)) == ["val_f1", "val_loss"]
    assert scores(curves, 0) == {}


def test_numbers_are_short(run):
    assert [_short(n) for n in (9_999, 10_000, 337_920, 2_500_000, 7_000_000_000)] == [
        "9,999",
        "10 k",
        "338 k",
        "2.5 M",
        "7 B",
    ]
    assert [_size(n) for n in (10, 2048, 3 * 2**20, 5 * 2**30)] == ["10 B", "2 KiB", "3 MiB", "5 GiB"]
    assert _title(read_adapters(run.checkpoint)).endswith("version_0 / last.ckpt")


def test_errors(run, tmp_path):
    with pytest.raises(ls.UsageError, match="There is no layer 'x'"):
        ls.write_report(run.checkpoint, tmp_path / "r.html", layer="x")
    with pytest.raises(ls.UsageError, match="without A and B"):
        ls.write_report(run.logs, tmp_path / "r.html", layer="query")
    with pytest.raises(ls.UsageError, match=r"r.html' cannot be written: No such file"):
        ls.write_report(run.logs, tmp_path / "no" / "r.html")
    assert not list(tmp_path.iterdir())
