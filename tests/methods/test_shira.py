"""lit_sparse.SHiRA: its masks and steps, against dense references; what it shares with low-rank methods, and not."""

import functools
import json

import lightning as L
import pytest
import torch
from backbones import build_tiny
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrize
from transformers import BertForSequenceClassification, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls

MASKS = ("magnitude", "random", "gradient", "snip")
IDS = torch.randint(5, 60, (24, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids[:, 0] % 2} for ids in IDS.split(4)]
ROWS = [{"input_ids": ids, "labels": ids[0] % 2} for ids in IDS]


def model_of(**config):
    torch.manual_seed(0)
    return build_tiny(BertForSequenceClassification, **config).eval()


def injected(**arguments):
    """A model, its method and its adapters, with the mask chosen."""
    model, method = model_of(), ls.SHiRA(**{"changed": 0.1, "start_batches": 2, **arguments})
    adapters = ls.inject(model, method)
    if method.batch_start:
        ls.start_from_batches(model, method, BATCHES)
    return model, method, adapters


def mean_gradients(batches):
    """The gradient of every weight of the whole model, by plain autograd."""
    model = model_of()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def highest(scores, count):
    order = sorted(range(scores.numel()), key=lambda i: -float(scores.flatten()[i]))
    return set(order[:count])


@pytest.mark.parametrize("mask", MASKS)
def test_every_mask_is_that_of_the_paper(mask):
    _, _, adapters = injected(mask=mask)
    gradients = mean_gradients(BATCHES[:2])
    chosen = {name: adapter.indices.tolist() for name, adapter in adapters.items()}
    for name, adapter in adapters.items():
        weight, gradient = adapter.base.weight.detach(), gradients[f"{name}.weight"]
        scores = {"magnitude": weight, "gradient": gradient, "snip": weight * gradient}
        count = int(0.1 * weight.numel())
        assert len(set(chosen[name])) == len(chosen[name]) == count
        assert chosen[name] == sorted(chosen[name])
        assert not adapter.values.any()
        if mask in scores:
            assert set(chosen[name]) == highest(scores[mask].abs(), count)
    if mask == "random":
        assert chosen != {name: a.indices.tolist() for name, a in ls.inject(model_of(), ls.SHiRA(mask=mask)).items()}


class Masked(nn.Module):
    """W = W0 + M ∘ S with a dense trained S: what the method is by its definition."""

    def __init__(self, frozen, mask):
        super().__init__()
        self.frozen, self.mask = frozen.detach().clone(), mask

    def forward(self, S):
        return self.frozen + self.mask * S

    def right_inverse(self, weight):
        return torch.zeros_like(weight)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_its_steps_are_those_of_a_dense_change_under_a_mask(optimizer):
    model, method, adapters = injected(train_head=False)
    dense = model_of().requires_grad_(False)
    for name, adapter in adapters.items():
        layer = dense.get_submodule(name)
        mask = torch.zeros(layer.weight.numel())
        mask[adapter.indices.long()] = 1
        parametrize.register_parametrization(layer, "weight", Masked(layer.weight, mask.view_as(layer.weight)))
        layer.parametrizations.weight.original.requires_grad_(True)
    own = optimizer(ls.parameter_groups(model, method), lr=0.01)
    reference = optimizer([p for p in dense.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    steps = ls.SparseSteps(method, model, own, len(BATCHES))
    for batch in BATCHES:
        for part, stepped in ((model, own), (dense, reference)):
            part(**batch).loss.backward()
            if part is model:
                steps.observe()
            stepped.step()
            stepped.zero_grad()
    for name, adapter in adapters.items():
        expected = dense.get_submodule(name).weight
        torch.testing.assert_close(adapter.base.weight + adapter.delta_weight(), expected, rtol=1e-5, atol=1e-6)
        assert adapter.values.any(), name
    torch.testing.assert_close(model(**BATCHES[0]).logits, dense(**BATCHES[0]).logits, rtol=1e-5, atol=1e-5)


def test_layers_may_have_shares_of_their_own():
    _, method, adapters = injected(overrides={"query": {"changed": 0.5}, "pooler.dense": {"changed": 1e-9}})
    sizes = {name: adapter.size / adapter.base.weight.numel() for name, adapter in adapters.items()}
    assert sizes["bert.encoder.layer.0.attention.self.query"] == 0.5
    assert adapters["bert.pooler.dense"].size == 1
    assert method.goal(list(adapters.values())) == (
        f"{sum(a.size for a in adapters.values()):,} of {sum(a.base.weight.numel() for a in adapters.values()):,} "
        "adapted weights are trained."
    )
    assert all(method.mismatch(adapter) is None for adapter in adapters.values())
    assert ls.SHiRA(changed=0.3).mismatch(adapters["bert.encoder.layer.0.output.dense"]).endswith("entries, not 614")
    assert ls.SHiRA().mismatch(ls.LowRankLinear(nn.Linear(3, 3), 1, 1.0)) == "factors A and B"
    assert ls.LoRA().mismatch(adapters["bert.pooler.dense"]) == "no A and B"


def test_gradients_choose_the_rest_where_a_layer_is_trained_whole():
    _, _, adapters = injected(mask="gradient", overrides={"pooler.dense": {"changed": 1.0}})
    assert adapters["bert.pooler.dense"].size == 32 * 32
    assert all(adapter.is_placed for adapter in adapters.values())


@pytest.mark.parametrize("method", [*(ls.SHiRA(mask=mask) for mask in MASKS), ls.LIFT(), ls.SpIEL()], ids=range(6))
def test_adapters_are_made_without_memory_on_the_meta_device(method):
    config = model_of().config
    with torch.device("meta"):
        adapters = ls.inject(BertForSequenceClassification(config), method)
    assert all(adapter.values.is_meta and adapter.indices.is_meta for adapter in adapters.values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"changed": 0.0}, "changed must be above 0"),
        ({"changed": 1.1}, "changed must be"),
        ({"mask": "largest"}, "mask must be 'random'"),
        ({"start_batches": 0}, "start_batches must be at least 1"),
        ({"overrides": {"query": {"rank": 2}}}, r"SHiRA can set \['changed'\]"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ls.UsageError, match=message):
        ls.SHiRA(**arguments)


def test_layers_without_a_plain_matrix_are_refused_by_name():
    with pytest.raises(ls.UsageError, match=r"\['bert\.embeddings\.word_embeddings'\] are of another kind. Leave them"):
        ls.inject(model_of(), ls.SHiRA(["word_embeddings", "query"]))


def test_quantized_layers_are_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = model_of()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name.endswith("query"))
    with pytest.raises(ls.UsageError, match="linear layers that are not quantized"):
        ls.inject(model, ls.SHiRA())


def test_conv1d_of_gpt2_is_adapted():
    model = build_tiny(GPT2LMHeadModel).eval()
    adapters = ls.inject(model, ls.SHiRA(changed=0.1))
    assert {type(adapter.base) for adapter in adapters.values()} == {Conv1D}
    for adapter in adapters.values():
        nn.init.normal_(adapter.values)
    with torch.no_grad():
        live = model(IDS).logits
        torch.testing.assert_close(ls.merge(model)(IDS).logits, live)


@pytest.mark.parametrize(
    ("needs", "call"),
    [
        ("compact removes ranks", ls.compact),
        ("truncate cuts singular values", functools.partial(ls.truncate, budget=0.5)),
        ("The format sparse holds A and B", functools.partial(ls.save_adapter, folder="out")),
        ("llama.cpp's LoRA holds A and B", functools.partial(ls.export_gguf, folder="out")),
    ],
)
def test_what_needs_factors_refuses_in_words(needs, call):
    model, _, adapters = injected()
    for adapter in adapters.values():
        nn.init.normal_(adapter.values)
    with pytest.raises(ls.UsageError, match=f"{needs}.*and the adapters of .* have no A and B: they change single"):
        call(model)


def module_of(**arguments):
    torch.manual_seed(0)
    model = build_tiny(BertForSequenceClassification, hidden_dropout_prob=0.1)
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    return ls.SequenceClassification(model, ls.SHiRA(changed=0.1, **arguments), optimizer=optimizer)


def fit(module, steps, folder=None, **options):
    callbacks = options.pop("callbacks", [])
    if folder is not None:
        callbacks = [*callbacks, ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)]
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=2,
        callbacks=callbacks,
        logger=options.pop("logger", False),
        enable_checkpointing=folder is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(ROWS, batch_size=4), **options)
    return trainer


def test_a_checkpoint_of_another_share_is_refused(tmp_path):
    fit(module_of(), 1, tmp_path)
    module = module_of()
    module.method.changed = 0.2
    with pytest.raises(ls.UsageError, match=r"has the number of entries .* there and .* here"):
        fit(module, 2, ckpt_path=str(tmp_path / "step=1.ckpt"))


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (functools.partial(ls.CompactRanks, 2), "CompactRanks removes ranks, and the adapters"),
        (functools.partial(ls.ThresholdStages, 0.1, 0.2, 2, "loss", 1, 1, folder="stages"), "SHiRA has none"),
    ],
)
def test_callbacks_for_ranks_refuse_at_set_up(callback, message):
    with pytest.raises(ls.UsageError, match=message):
        fit(module_of(), 1, callbacks=[callback()])


def test_an_average_keeps_places():
    module = module_of()
    trainer = fit(module, 4, callbacks=[L.pytorch.callbacks.EMAWeightAveraging(decay=0.5)])
    assert trainer.global_step == 4
    assert all(adapter.is_placed and adapter.values.any() for _, adapter in ls.adapters_in(module))


def test_a_loop_without_a_start_is_told():
    model, method = model_of(), ls.SHiRA(mask="gradient")
    ls.inject(model, method)
    optimizer = torch.optim.SGD(ls.parameter_groups(model, method), lr=0.1)
    with pytest.raises(ls.UsageError, match="mask 'gradient' takes gradients, and none were taken"):
        ls.SparseSteps(method, model, optimizer, 3)
    with pytest.raises(ls.UsageError, match="There are no training batches to start from: mask 'gradient'"):
        ls.start_from_batches(model, method, [])
    ls.start_from_batches(model, method, BATCHES)
    ls.SparseSteps(method, model, optimizer, 3)
    with pytest.raises(ls.UsageError, match="has no new adapters"):
        ls.start_from_batches(model, method, BATCHES)


def test_adapters_of_another_method_are_told_apart():
    model, _, _ = injected()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ls.UsageError, match="has no A and B: it is not one of LoRA"):
        ls.SparseSteps(ls.LoRA(), model, optimizer, 3)


def test_what_is_left_is_told_and_logged(tmp_path, capsys):
    module = module_of()
    logger = L.pytorch.loggers.CSVLogger(tmp_path, name="log")
    fit(module, 6, tmp_path / "kept", logger=logger)
    told = capsys.readouterr().out
    assert "share of the weights that changes, parameters left" in told
    assert "ranks" not in told
    layers = ls.adapters.statistics.layer_sparsity(module)
    assert all(layer.max_rank == 0 and abs(layer.density_BA - 0.1) < 0.01 for layer in layers)
    from lit_sparse.callbacks.monitor import read_table

    assert read_table(tmp_path / "log" / "version_0" / "sparsity.csv") == layers
    logged = (tmp_path / "log" / "version_0" / "metrics.csv").read_text().partition("\n")[0].split(",")
    assert {"sparsity/density_BA", "sparsity/remaining_parameters"} <= set(logged)
    progress = torch.load(tmp_path / "kept" / "step=6.ckpt", weights_only=True)["lit_sparse"]["progress"]
    total = sum(layer.remaining_parameters for layer in layers)
    assert json.loads(json.dumps(progress)) == {
        "step": 6, "total": 6, "final": True, "ranks": 0, "parameters": total, "density": 1.0,
    }  # fmt: skip
