"""Every kind of place that adapters are read from, against the model that was stored there."""

import json
import shutil

import lightning.pytorch as pl
import pytest
import torch
from backbones import build_tiny
from lightning.pytorch import LightningModule
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader
from trained import as_trained
from transformers import BertForSequenceClassification, MixtralForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.statistics import layer_sparsity
from lit_sparse.interchange.remains import weight_name
from lit_sparse.reporting import sources
from lit_sparse.reporting.sources import read_adapters
from lit_sparse.reporting.stored import StoredAdapters
from lit_sparse.reporting.table import text_table


def as_in(adapters, model):
    """Whether what was read has the numbers of the model's adapters."""
    assert adapters.table == layer_sparsity(model)
    for layer, (_, adapter) in zip(adapters.layers.values(), ls.adapters_in(model), strict=True):
        assert layer.scale == pytest.approx(adapter.scale)
        assert float(layer.change_norms.norm()) == pytest.approx(float(adapter.delta_weight().norm()), rel=1e-5)
    return True


def saved(module, path="saved.ckpt"):
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def test_a_checkpoint_of_a_run(run):
    adapters = read_adapters(run.checkpoint)
    assert as_in(adapters, run.module)
    assert (adapters.kind, adapters.method, adapters.step) == ("a checkpoint", "SoRA", 16)
    assert adapters.arguments["rank"] == 4
    assert adapters.backbone == run.module.backbone
    alphas = {name.rpartition("layer.0.")[2]: layer.alpha for name, layer in adapters.layers.items() if ".0." in name}
    assert alphas["attention.self.query"] == 8
    assert alphas["attention.output.dense"] == 2
    assert len(adapters.gates) == len(run.adapters)
    assert {"val_loss", "train_loss", "sparsity/mean_rank"} <= set(adapters.curves)
    steps = [step for step, _ in adapters.curves["sparsity/mean_rank"]]
    assert steps == sorted(steps)


def test_a_compacted_checkpoint_counts_from_the_ranks_at_the_start(run):
    module = ls.SequenceClassification(
        build_tiny(BertForSequenceClassification), ls.SoRA(["query", "key"], rank=4, alpha=8, threshold=0.1)
    )
    module.configure_model()
    for adapter, dead in zip((a for _, a in ls.adapters_in(module)), (1, 4, 0, 2), strict=True):
        nn.init.normal_(adapter.lora_B_t)
        adapter.gate.data[:dead] = 0
    ls.compact(module)
    adapters = read_adapters(saved(module))
    assert [layer.rank for layer in adapters.table] == [3, 0, 4, 2]
    assert {layer.max_rank for layer in adapters.table} == {4}
    assert as_in(adapters, module)


@pytest.mark.parametrize("start", ["gora", "eva"])
@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_alphas_and_scales_are_those_of_ranks_that_a_start_allotted(start, alpha, use_rslora):
    options = {"alpha": alpha, "use_rslora": use_rslora}
    overrides = {"query": {"rank": 3}, "key": {"alpha": 5}}
    module = ls.SequenceClassification(
        build_tiny(BertForSequenceClassification), ls.LoRA(rank=4, init_weights=start, overrides=overrides, **options)
    )
    module.configure_model()
    batches = [{"input_ids": torch.randint(5, 60, (8, 6)), "labels": torch.arange(8) % 2} for _ in range(2)]
    ranks = ls.start_from_batches(module, module.method, batches, lambda batch: module(**batch).loss)
    assert len(set(ranks.values())) > 1
    for _, adapter in ls.adapters_in(module):
        nn.init.normal_(adapter.lora_B_t)
    adapters = read_adapters(saved(module))
    assert as_in(adapters, module)
    for layer in adapters.layers.values():
        divisor = layer.max_rank**0.5 if use_rslora else layer.max_rank
        assert layer.alpha == pytest.approx(layer.scale * divisor)


def test_experts_have_their_own_ranks(tmp_path):
    model = build_tiny(MixtralForCausalLM, num_local_experts=3)
    module = ls.CausalLM(model, ls.SoRA(["q_proj", "down_proj"], rank=2, threshold=0.1))
    module.configure_model()
    for i, (_, adapter) in enumerate(ls.adapters_in(module)):
        nn.init.normal_(adapter.lora_B_t)
        adapter.gate.data[i % 2] = 0
    adapters = read_adapters(saved(module))
    assert as_in(adapters, module)
    assert {len(layer.ranks) for layer in adapters.layers.values()} == {1, 3}
    ls.plot_support(saved(module), tmp_path / "experts.png", "0.mlp.experts.down_proj")
    assert (tmp_path / "experts.png").exists()


class Own(LightningModule):
    """A user's own, which holds one layer under two names and all frozen weights in its checkpoints."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
        self.again = self.first
        ls.inject(self, ls.LoRA(["0", "1"], rank=3, train_head=False))

    def training_step(self, batch, batch_idx):
        return self.first(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
def test_a_module_of_the_users_own_is_found_by_its_keys(tmp_path):
    module = Own()
    trainer = pl.Trainer(max_steps=2, logger=False, default_root_dir=tmp_path, accelerator="cpu")
    trainer.fit(module, DataLoader(torch.randn(8, 6), batch_size=4))
    adapters = read_adapters(next(tmp_path.rglob("*.ckpt")))
    assert list(adapters.layers) == ["first.0", "first.1"]
    assert adapters.table == layer_sparsity(module)
    assert {layer.scale for layer in adapters.layers.values()} == {None}
    assert (adapters.method, adapters.step, adapters.gates) == (None, 2, [])


def test_a_forged_pattern_cannot_hang(run, tmp_path):
    checkpoint = torch.load(run.checkpoint, weights_only=True)
    checkpoint["lit_sparse"]["method"]["init_args"]["overrides"] = {r"([a-z0-9._]+)+\d!": {"alpha": 3}}
    torch.save(checkpoint, tmp_path / "forged.ckpt")
    assert {layer.alpha for layer in read_adapters(tmp_path / "forged.ckpt").layers.values()} == {8}


def test_a_folder_of_pefts(tmp_path):
    model = build_tiny(BertForSequenceClassification, num_hidden_layers=11)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["query", "dense"], rank_pattern={"query": 2})
    peft = get_peft_model(model, config)
    for module in peft.modules():
        if hasattr(module, "lora_B") and len(module.lora_B):
            nn.init.normal_(module.lora_B["default"].weight)
    peft.save_pretrained(tmp_path / "peft")
    adapters = read_adapters(tmp_path / "peft")
    assert adapters.kind == "a folder in PEFT's format"
    assert adapters.arguments["r"] == 4
    layers = {name: m for name, m in peft.base_model.model.named_modules() if hasattr(m, "get_delta_weight")}
    names = [name for name in adapters.layers if name.endswith("query")]
    assert names == [f"bert.encoder.layer.{block}.attention.self.query" for block in range(11)]
    assert set(adapters.layers) == set(layers)
    for layer in adapters.table:
        delta, factors = layers[layer.name].get_delta_weight("default"), adapters.layers[layer.name]
        assert float(factors.change_norms.norm()) == pytest.approx(float(delta.detach().norm()), rel=1e-5)
        rank = 2 if "query" in layer.name else 4
        assert (layer.rank, factors.alpha, factors.scale) == (rank, 6, 6 / rank)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_folder_in_either_layout_counts_the_ranks_that_are_live(layout, tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification))
    ls.export_peft(model, tmp_path / "lora", layout)
    found = {layer.name: layer for layer in read_adapters(tmp_path / "lora").table}
    live = {layer.name: layer for layer in layer_sparsity(model) if layer.rank or layout == "padded"}
    assert {name: layer.rank for name, layer in found.items()} == {name: layer.rank for name, layer in live.items()}
    for name, layer in live.items():
        assert found[name].remaining_parameters == layer.remaining_parameters


@pytest.mark.parametrize("model_class", [BertForSequenceClassification, MixtralForCausalLM])
def test_a_folder_of_our_own(model_class, tmp_path):
    options = {"num_local_experts": 3, "num_key_value_heads": 4} if model_class is MixtralForCausalLM else {}
    model = build_tiny(model_class, **options)
    ls.inject(model, ls.SoRA(rank=4, threshold=0.1))
    generator = torch.Generator().manual_seed(0)
    for _, adapter in ls.adapters_in(model):
        nn.init.normal_(adapter.lora_B_t)
        adapter.gate.data *= torch.rand(adapter.gate.shape, generator=generator) < 0.5
    ls.save_adapter(model, tmp_path / "sparse", provenance=ls.Provenance(method="SoRA", arguments={"rank": 4}))
    adapters = read_adapters(tmp_path / "sparse")
    assert (adapters.kind, adapters.method, adapters.arguments) == ("a folder of save_adapter", "SoRA", {"rank": 4})
    live = {name: adapter for name, adapter in ls.adapters_in(model) if adapter.gate.any()}
    found = {layer.name: layer for layer in adapters.table}
    assert found.keys() == live.keys()
    for name, adapter in live.items():
        assert float(adapters.layers[name].change_norms.norm()) == pytest.approx(
            float(adapter.delta_weight().norm()), rel=1e-5
        )
        kept = int((adapter.gate != 0).sum()) * (adapter.in_features + adapter.out_features)
        assert found[name].remaining_parameters == kept
    ls.export_delta(model, tmp_path / "delta", provenance=ls.Provenance(method="SoRA"))
    patch = read_adapters(tmp_path / "delta")
    assert (patch.kind, patch.method) == ("a patch of weights", "SoRA")
    deltas = {
        weight_name(name, adapter).removesuffix(".weight"): adapter.delta_weight() for name, adapter in live.items()
    }
    assert {row.name for row in patch.table} == deltas.keys()
    for row in patch.table:
        delta, layer = deltas[row.name], patch.layers[row.name]
        assert row.remaining_parameters == int(delta.count_nonzero())
        assert row.density_BA == pytest.approx(row.remaining_parameters / delta.numel())
        dense = torch.zeros(delta.numel(), dtype=layer.values.dtype)
        dense[layer.indices] = layer.values
        assert torch.equal(dense, delta.flatten())
    assert "a patch of weights" in text_table(patch)


def test_a_shira_of_pefts_is_refused_in_words(tmp_path):
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.SHiRA(changed=0.05))
    for _, adapter in ls.adapters_in(model):
        nn.init.normal_(adapter.values)
    ls.export_peft(model, tmp_path / "peft")
    with pytest.raises(ls.UsageError, match="does not say how large the changed weights are: give the checkpoint"):
        read_adapters(tmp_path / "peft")


@pytest.mark.parametrize("part", ["", "sparsity.csv"])
def test_the_logs_of_a_run(run, part):
    adapters = read_adapters(run.logs / part)
    assert adapters.table == layer_sparsity(run.module)
    assert (adapters.kind, adapters.method, adapters.layers) == ("the logs of a run", "SoRA", {})
    assert "val_loss" in adapters.curves
    with pytest.raises(ls.UsageError, match=r"is the logs of a run, without A and B. Give a checkpoint"):
        adapters.layer(None)


def test_logs_need_neither_settings_nor_metrics(run, tmp_path):
    shutil.copy(run.logs / "sparsity.csv", tmp_path)
    assert read_adapters(tmp_path).method is None
    (tmp_path / "hparams.yaml").write_text("model: !!python/object:builtins.object {}\n")
    assert read_adapters(tmp_path).curves == {}


def test_a_model(run):
    adapters = read_adapters(run.module)
    assert as_in(adapters, run.module)
    assert adapters.kind == "a model"


def test_metrics_are_found_beside_a_level_above_or_where_they_are_said_to_be(run, tmp_path):
    beside = tmp_path / "beside"
    beside.mkdir()
    shutil.copy(run.checkpoint, beside)
    assert read_adapters(beside / "last.ckpt").curves == {}
    other = read_adapters(beside / "last.ckpt", run.logs / "metrics.csv").curves
    assert other == read_adapters(run.checkpoint).curves
    (beside / "metrics.csv").write_text("step,val_accuracy\n3,0.5\n1,0.25\n")
    assert read_adapters(beside / "last.ckpt").curves == {"val_accuracy": [(1, 0.25), (3, 0.5)]}


def test_a_format_is_a_line_of_the_table(run, tmp_path, monkeypatch):
    (tmp_path / "mine.json").write_text("{}")

    def read_mine(path):
        return StoredAdapters(name=str(path), kind="mine", table=[])

    own = sources.Source(lambda path: (path / "mine.json").is_file(), read_mine, "a folder of mine")
    monkeypatch.setattr(sources, "SOURCES", (own, *sources.SOURCES))
    assert read_adapters(tmp_path).kind == "mine"
    assert read_adapters(run.checkpoint).kind == "a checkpoint"


def test_layers_are_found_by_trailing_parts(run):
    adapters = read_adapters(run.checkpoint)
    name = "model.bert.encoder.layer.1.attention.self.query"
    assert adapters.layer("1.attention.self.query").name == adapters.layer(name).name == name
    largest = max(run.adapters, key=lambda name: float(run.adapters[name].delta_weight().norm()))
    assert adapters.layer(None).name == largest
    with pytest.raises(ls.UsageError, match=r"The layer 'query' could be any of \['model.bert"):
        adapters.layer("query")
    with pytest.raises(ls.UsageError, match=r"no layer '1.attention.self.quary' in .*Did you mean '1.attention.self.q"):
        adapters.layer("1.attention.self.quary")


def test_what_cannot_be_read_is_said(run, tmp_path):
    def refused(path, message):
        with pytest.raises(ls.UsageError, match=message):
            read_adapters(path)

    refused(
        tmp_path / "nowhere",
        r"nowhere' does not exist. Give a folder in PEFT's format or a folder of save_adapter or export_delta or",
    )
    refused(tmp_path, r"holds no adapters: it is empty. Give a folder")
    (tmp_path / "metrics.csv").write_text("step\n")
    refused(tmp_path, r"it has a metrics.csv, but no sparsity.csv, which SparsityMonitor writes when a run ends")
    refused(run.checkpoint.parent, r"holds no adapters: it has \['last.ckpt'\]")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    refused(tmp_path / "text.ckpt", r"text.ckpt' cannot be read as a checkpoint")
    for name in ("adapter_model.safetensors", "adapter.gguf"):
        (tmp_path / name).write_bytes(b"")
        refused(tmp_path / name, rf"{name}' is one file of an export: give its folder")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    refused(tmp_path / "empty.ckpt", r"empty.ckpt' cannot be read as a checkpoint")
    torch.save({"state_dict": nn.Linear(2, 2).state_dict()}, tmp_path / "plain.ckpt")
    refused(tmp_path / "plain.ckpt", r"plain.ckpt' holds no adapters: no lora_A and lora_B_t")
    torch.save([1], tmp_path / "list.ckpt")
    refused(tmp_path / "list.ckpt", r"list.ckpt' is no checkpoint: it has no state_dict")
    torch.save({"state_dict": {"x.lora_A": torch.ones(2, 3)}}, tmp_path / "half.ckpt")
    refused(tmp_path / "half.ckpt", r"no matching lora_A and lora_B_t of 'x': it is damaged")
    (tmp_path / "sparsity.csv").write_text("name,size\na,1\n")
    refused(tmp_path, r"sparsity.csv is no table of SparsityMonitor's")
    (tmp_path / "sparsity.csv").write_text("name,rank\n")
    refused(tmp_path, r"sparsity.csv lists no adapters")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    refused(tmp_path, r"describes 'IA3'; only LORA can be loaded")
    refused(nn.Linear(2, 2), r"Linear holds no adapter. Inject a method first")
    with pytest.raises(ls.UsageError, match=r"none.csv' does not exist. Give the metrics.csv that CSVLogger wrote"):
        read_adapters(run.checkpoint, tmp_path / "none.csv")
    (tmp_path / "other.csv").write_text("a,b\n1,x\n")
    with pytest.raises(ls.UsageError, match=r"other.csv' cannot be read as metrics: 'step'"):
        read_adapters(run.checkpoint, tmp_path / "other.csv")
