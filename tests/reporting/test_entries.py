"""What is shown of adapters without factors: a table, a page and figures, from a checkpoint of any module."""

import csv
import functools
import io

import lightning as L
import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from programs import run
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

import lit_sparse as ls
from lit_sparse.adapters.entries import LayerEntries
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.table import text_table


class Own(L.LightningModule):
    """A user's module, whose checkpoint has no record of ours."""

    def __init__(self):
        super().__init__()
        self.method = ls.SHiRA(["query"], changed=0.25)
        self.bert = build_tiny(BertForSequenceClassification)
        ls.inject(self.bert, self.method)

    def configure_callbacks(self):
        return [ls.Sparsify(self.method)]

    def training_step(self, batch, batch_idx):
        return self.bert(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(ls.parameter_groups(self, self.method), lr=0.01)


def ours(method=None):
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    model = build_tiny(BertForSequenceClassification)
    return ls.SequenceClassification(model, method or ls.SHiRA(["query"], changed=0.25), optimizer=optimizer)


def moving():
    return ours(ls.SpIEL(["query"], changed=0.25, update_every=1, window=1))


def checkpoint_of(module, folder):
    ids = torch.randint(5, 60, (16, 6))
    rows = [{"input_ids": row, "labels": row[0] % 2} for row in ids]
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt"


@pytest.mark.parametrize("make", [ours, moving, Own])
def test_a_checkpoint_is_shown_without_ranks(make, tmp_path):
    module = make()
    file = checkpoint_of(module, tmp_path)
    stored = read_adapters(file)
    trained = dict(ls.adapters_in(module))
    assert stored.layers.keys() == trained.keys()
    for name, layer in stored.layers.items():
        assert layer.shape == (32, 32)
        assert torch.equal(layer.values, trained[name].values)
        norm = float(trained[name].delta_weight().double().norm())
        assert float(layer.change_norms) == pytest.approx(norm)
    text = text_table(stored)
    assert "512 parameters, 25.00 % of the adapted weights changed." in text
    head = next(line for line in text.splitlines() if line.startswith("layer"))
    assert head.split() == ["layer", "BA", "|ΔW|", "left", "bytes"]


@pytest.mark.slow
def test_the_command_writes_page_and_figures(tmp_path):
    pytest.importorskip("matplotlib")
    file = checkpoint_of(ours(), tmp_path)
    done = run(["-m", "lit_sparse", "inspect", file, "--report", "page.html", "--figures", "drawn"])
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert "Entries of ΔW" in page
    assert "weights changed" in page
    assert "ranks left" not in page
    assert '<td class="rank"' not in page
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"change.png", "support.png"}
    ls.plot_support(file, tmp_path / "support.png", "layer.0.attention.self.query")
    with pytest.raises(ls.UsageError, match="have no ranks to draw"):
        ls.plot_ranks(file, tmp_path / "ranks.png")


@pytest.mark.parametrize("method", [ls.SHiRA(changed=0.1), ls.SoRA(rank=2)])
def test_a_folder_is_shown_as_it_is_stored(method, tmp_path):
    """In the model's order, with the bytes of the file, and a patch without ranks."""
    model = build_tiny(BertForSequenceClassification, num_hidden_layers=11)
    adapters = ls.inject(model, method)
    with torch.no_grad():
        for number, adapter in enumerate(adapters.values()):
            if isinstance(adapter, ls.DeltaLinear):
                adapter.values.normal_()
            else:
                adapter.lora_A[:, :: 2 if number % 4 else 32] = 0  # half of A: it is stored as columns and numbers
                adapter.lora_B_t[:, : 16 * (number % 3)].normal_()  # all of B: a patch of the weight has no places
    ls.export_delta(model, tmp_path / "delta")
    folders = [tmp_path / "delta"]
    if isinstance(method, ls.SoRA):
        ls.save_adapter(model, tmp_path / "sparse")
        folders.append(tmp_path / "sparse")
    changed = [name for name, adapter in adapters.items() if adapter.delta_weight().any()]
    for folder in folders:
        stored = read_adapters(folder)
        assert list(stored.layers) == [layer.name for layer in stored.table] == changed
        tensors = load_file(folder / "adapter.safetensors")
        for name, layer in stored.layers.items():
            own = [tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")]
            assert layer.nbytes == sum(tensor.nbytes for tensor in own) > 0
        entries = [layer for layer in stored.layers.values() if isinstance(layer, LayerEntries)]
        whole = sum(layer.values.nbytes == layer.nbytes for layer in entries)
        assert (0 < whole < len(changed)) == (folder.name == "delta" and isinstance(method, ls.SoRA))
        text = text_table(stored)
        ranked = folder.name == "sparse"
        head = next(line for line in text.splitlines() if line.startswith("layer")).split()
        assert ("rank" in head) == (" ranks, " in text) == ranked
        pytest.importorskip("matplotlib")
        ls.write_report(folder, tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert ("ranks left" in page) == ("keep many ranks" in page) == ("from A, B and gates alone." in page) == ranked
        assert ("from changed entries alone." in page) == (not ranked)


def test_cells_are_those_of_the_dense_change():
    torch.manual_seed(0)
    indices, values = torch.randperm(13 * 9)[:30].sort().values, torch.randn(30, dtype=torch.float64)
    dense = torch.zeros(13 * 9, dtype=torch.float64).index_put((indices,), values).view(13, 9)
    sizes, touched = LayerEntries(name="x", indices=indices, values=values, shape=(13, 9)).cells(4)
    for i, rows in enumerate(dense.tensor_split(4)):
        for j, cell in enumerate(rows.tensor_split(4, dim=1)):
            assert float(sizes[i, j]) == pytest.approx(float(cell.square().mean().sqrt()))
            assert bool(touched[i, j]) == bool((cell != 0).any())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "arguments"),
    [("SHiRA", {"mask": "snip", "start_batches": 2}), ("SpIEL", {"update_every": 2, "window": 1})],
)
def test_fit_export_and_merge_by_the_command_line(method, arguments, tmp_path):
    """As a user types it: train from the command line, then take the files elsewhere."""
    save_tiny_bert(tmp_path / "bert")
    for split, count in (("train", 32), ("validation", 8)):
        table = io.StringIO()
        rows = [(("good", "bad")[i % 2], ("yes", "no")[i % 2]) for i in range(count)]
        csv.writer(table).writerows([("text", "label"), *rows])
        (tmp_path / f"{split}.csv").write_text(table.getvalue())
    words = ["fit", "--model", "SequenceClassification", "--model.backbone", "bert", "--model.method", method]
    for name, value in {"changed": 0.1, **arguments}.items():
        words += [f"--model.method.{name}", str(value)]
    words += ["--data", "TextClassificationData", "--data.path", ".", "--data.batch_size", "8"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.logger", "false"]
    words += ["--trainer.callbacks", "SparseCheckpoint", "--trainer.callbacks.dirpath", "kept"]
    done = run(["-m", "lit_sparse", *words])
    assert done.returncode == 0, done.stderr[-3000:]
    listed = run(["-m", "lit_sparse", "inspect", *words[1:]])
    assert "Delta 32 → 32, 102 entries" in listed.stdout, listed.stdout + listed.stderr
    for form in ("peft", "delta", "merged"):
        export = ["export", "--ckpt_path", "kept/last.ckpt", "--output", form, "--format", form]
        done = run(["-m", "lit_sparse", *export])
        assert done.returncode == 0, done.stderr[-3000:]
        assert "9.96 % of the adapted weights changed" in done.stdout
    export = ["export", "--ckpt_path", "kept/last.ckpt", "--output", "cut", "--budget", "0.5"]
    done = run(["-m", "lit_sparse", *export])
    assert done.returncode != 0
    assert "budget cuts singular values of BA, and the adapters of" in done.stderr
    answers = [ls.from_pretrained(tmp_path / form).predict("good") for form in ("peft", "delta", "merged")]
    for answer in answers[1:]:
        assert answer[0]["label"] == answers[0][0]["label"]
        assert answer[0]["score"] == pytest.approx(answers[0][0]["score"], abs=1e-5)
