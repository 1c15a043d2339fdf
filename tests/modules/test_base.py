"""lit_sparse.modules.base: building, training mode, gradients, callbacks."""

import math
import sys
from pathlib import Path

import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch import Callback, LightningModule
from projects import last_figures, write_config
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

import lit_sparse as ls
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.cli.main import main


def classifier(backbone, method=None, **options):
    return ls.SequenceClassification(backbone, method or ls.LoRA(rank=2), num_labels=2, **options)


class OwnModule(LightningModule):
    """A user's module, which adapts its own model."""

    def __init__(self, backbone, method=None):
        super().__init__()
        self.model = AutoModelForSequenceClassification.from_pretrained(backbone)
        if method is not None:
            ls.inject(self.model, method)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class ForwardTwice(Callback):
    """Notes whether two passes of one batch agree, in training and in validation."""

    def __init__(self):
        self.agree = {"train": [], "validate": []}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self._note("train", pl_module, batch)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self._note("validate", pl_module, batch)

    @torch.no_grad()
    def _note(self, stage, module, batch):
        self.agree[stage].append(torch.equal(module(**batch).logits, module(**batch).logits))


@pytest.mark.parametrize("already_built", [False, True])
def test_backbone_dropout_is_on_in_training_and_off_in_validation(
    already_built, tiny_bert_with_dropout, trainer, loader
):
    backbone = tiny_bert_with_dropout
    if already_built:
        backbone = AutoModelForSequenceClassification.from_pretrained(backbone).eval()
    twice = ForwardTwice()
    # Two epochs: the second one shows the mode to which the Trainer returns after validation.
    trainer(max_epochs=2, callbacks=[twice]).fit(classifier(backbone), loader(), loader())
    assert twice.agree["train"] == [False] * 4
    assert all(twice.agree["validate"])
    assert twice.agree["validate"]


def test_dropout_of_the_adapters_is_on_in_training_only(tiny_bert, trainer, loader):
    class NonZeroB(ForwardTwice):
        def on_train_start(self, trainer, pl_module):
            for _, adapter in ls.adapters_in(pl_module):
                torch.nn.init.normal_(adapter.lora_B_t)

    twice = NonZeroB()
    module = classifier(tiny_bert, ls.LoRA(rank=2, dropout=0.5))
    trainer(max_epochs=1, callbacks=[twice], num_sanity_val_steps=0).fit(module, loader(), loader())
    assert twice.agree["train"] == [False, False]
    assert twice.agree["validate"] == [True, True]


def test_configure_model_builds_once_in_training_mode(tiny_bert):
    module = classifier(tiny_bert)
    assert module.model is None
    module.configure_model()
    built = module.model
    module.configure_model()
    assert module.model is built
    assert all(part.training for part in built.modules())


def test_only_adapters_and_the_head_are_trained(tiny_bert):
    module = classifier(tiny_bert, ls.SoRA(target_modules=["query"], rank=2, sparsity_weight=1.0))
    module.configure_model()
    layers = [f"model.bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
    adapters = {f"{layer}.{part}" for layer in layers for part in ("lora_A", "lora_B_t", "gate")}
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == adapters | {"model.classifier.weight", "model.classifier.bias"}


def test_forward_before_the_model_is_built_says_what_to_do(tiny_bert):
    with pytest.raises(ls.UsageError, match="configure_model"):
        classifier(tiny_bert)(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_a_module_without_task_takes_the_architecture_of_its_configuration(tiny_llama, trainer):
    module = ls.SparseModule(tiny_llama, ls.LoRA(rank=2), torch.optim.AdamW)
    ids = torch.arange(5, 15).repeat(4, 1)
    batch = {"input_ids": ids, "labels": ids}
    run = trainer(max_epochs=1)
    run.fit(module, DataLoader([batch] * 12, batch_size=None), DataLoader([batch], batch_size=None))
    assert isinstance(module.model, LlamaForCausalLM)
    with torch.no_grad(), ls.disable_adapters(module):
        before = module(**batch).loss
    assert run.callback_metrics["val_loss"] < 0.99 * before
    (tested,) = run.test(module, DataLoader([batch], batch_size=None), verbose=False)
    with torch.no_grad():
        assert tested["test_loss"] == pytest.approx(float(module(**batch).loss))


def gradients(backbone, batch, checkpointing):
    """Gradients of one batch, and how often the first adapted layer was called."""
    torch.manual_seed(3)
    module = classifier(backbone, ls.SoRA(rank=2, sparsity_weight=1.0), gradient_checkpointing=checkpointing)
    module.configure_model()
    calls = []
    for name, adapter in ls.adapters_in(module):
        torch.nn.init.normal_(adapter.lora_B_t)
        if name.endswith("layer.0.attention.self.query"):
            adapter.register_forward_hook(lambda *_: calls.append(1))
    module.model(**batch).loss.backward()
    return {n: p.grad for n, p in module.named_parameters() if p.requires_grad}, len(calls)


SPEECH = """
import lightning as L
import torch


class Speech(L.LightningDataModule):
    \"\"\"Spectrograms that are loud in the lower or the upper bands, each with one of two words.\"\"\"

    def rows(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        made = []
        for number in range(count):
            upper = number % 2
            features = 0.1 * torch.randn(8, 16, generator=generator)
            features[4 * upper : 4 * upper + 4] += 1
            made.append({"input_features": features, "labels": torch.tensor([7 + 4 * upper, 2])})
        return torch.utils.data.DataLoader(made, batch_size=8)

    def train_dataloader(self):
        return self.rows(64, 0)

    def val_dataloader(self):
        return self.rows(32, 1)
"""


@pytest.mark.slow
def test_a_user_teaches_a_speech_model_with_rows_of_their_own_by_the_command_line(tmp_path, monkeypatch):
    """Whisper has no module of its own: what computes its loss is trained by SparseModule."""
    sizes = {
        f"{half}_{part}": size for half in ("encoder", "decoder") for part, size in (("layers", 1), ("ffn_dim", 32))
    }
    sizes |= {f"{half}_attention_heads": 2 for half in ("encoder", "decoder")}
    tokens = {"vocab_size": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    spectrogram = {"num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 8}
    torch.manual_seed(0)
    # Of the scale of trained weights, so that the frozen output layer can tell words apart.
    config = WhisperConfig(d_model=32, init_std=0.3, dropout=0.0, **sizes, **tokens, **spectrogram)
    WhisperForConditionalGeneration(config).save_pretrained(tmp_path / "whisper")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lit-sparse"])
    Path("speech.py").write_text(SPEECH)
    config = write_config(
        tmp_path / "config.yaml",
        {
            "class_path": "lit_sparse.SparseModule",
            "init_args": {
                "backbone": "whisper",
                "method": {"class_path": "lit_sparse.SoRA", "init_args": {"rank": 4, "sparsity_weight": 0.5}},
            },
        },
        {"class_path": "speech.Speech"},
        lr=1e-2,
        max_epochs=10,
    )
    main(["fit", "--config", config])
    # Who knows nothing of the sound guesses the first word, and has the rest: ln 2 over two tokens.
    assert last_figures()["val_loss"] < 0.5 * math.log(2) / 2


def test_gradient_checkpointing_gives_equal_gradients(tiny_bert, loader):
    batch = next(iter(loader()))
    plain, calls = gradients(tiny_bert, batch, checkpointing=False)
    recomputed, more_calls = gradients(tiny_bert, batch, checkpointing=True)
    assert (calls, more_calls) == (1, 2)
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing_of_a_module_that_cannot_is_an_error():
    net = torch.nn.Sequential(torch.nn.Linear(3, 3))
    module = ls.SparseModule(net, ls.LoRA(), gradient_checkpointing=True)
    with pytest.raises(ls.UsageError, match="Sequential has no gradient_checkpointing_enable"):
        module.configure_model()


@pytest.mark.slow
def test_compile_compiles_the_model_and_changes_no_number(tmp_path, loader):
    backbone = save_tiny_bert(tmp_path, num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    batch, losses = next(iter(loader())), {}
    for compiled in (False, True):
        torch._dynamo.utils.counters.clear()
        torch.manual_seed(0)
        module = classifier(backbone, ls.SoRA(["query"], rank=2, sparsity_weight=1.0), compile=compiled)
        module.configure_model()
        for _, adapter in ls.adapters_in(module):
            torch.nn.init.normal_(adapter.lora_B_t)
        losses[compiled] = module(**batch).loss.item()
        assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == compiled
        assert not torch._dynamo.utils.counters["graph_break"]
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": 1.0}, r"warmup .* in \[0, 1\); got 1.0"),
        ({"warmup": -0.1}, "warmup"),
        ({"lr_schedule": "stairs"}, "'linear', 'cosine' or 'constant'; got 'stairs'"),
    ],
)
def test_arguments_out_of_range_are_errors(options, message, tiny_bert):
    with pytest.raises(ls.UsageError, match=message):
        classifier(tiny_bert, **options)


def test_backbone_args_reach_from_pretrained_and_are_refused_for_a_built_model(tiny_bert):
    module = classifier(tiny_bert, backbone_args={"dtype": "bfloat16"})
    module.configure_model()
    assert module.model.bert.embeddings.word_embeddings.weight.dtype == torch.bfloat16
    built = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with pytest.raises(ls.UsageError, match="already built"):
        classifier(built, backbone_args={"dtype": "bfloat16"})


@pytest.mark.parametrize("state", ["missing", "empty", "without weights", "truncated weights"])
def test_a_backbone_that_cannot_be_loaded_is_named(state, tmp_path, tiny_bert):
    folder = tmp_path / "backbone"
    if state != "missing":
        folder.mkdir()
    if state.endswith("weights"):
        (folder / "config.json").write_bytes((Path(tiny_bert) / "config.json").read_bytes())
    if state == "truncated weights":
        whole = (Path(tiny_bert) / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ls.UsageError, match=f"backbone.*{folder}"):
        classifier(str(folder)).configure_model()


def test_a_hub_name_that_cannot_be_had_offline_is_one_error():
    with pytest.raises(ls.UsageError, match="'nobody/nothing-at-all' cannot be loaded"):
        classifier("nobody/nothing-at-all").configure_model()


# Callbacks.


def test_the_module_brings_one_of_each_callback(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1)
    run.fit(classifier(tiny_bert), loader())
    kinds = [type(callback) for callback in run.callbacks]
    assert sum(isinstance(callback, ls.Sparsify) for callback in run.callbacks) == 1
    assert kinds.count(ls.SparsityMonitor) == 1
    assert kinds.count(ls.FiniteLoss) == 1


def test_a_monitor_in_the_trainer_keeps_its_settings(tiny_bert, trainer, loader):
    monitor = ls.SparsityMonitor(every_n_steps=3)
    run = trainer(max_epochs=1, callbacks=[monitor])
    run.fit(classifier(tiny_bert), loader())
    assert [callback for callback in run.callbacks if isinstance(callback, ls.SparsityMonitor)] == [monitor]
    assert monitor.every_n_steps == 3


def test_a_second_sparsify_beside_the_modules_own_is_an_error(tiny_bert, trainer, loader):
    method = ls.SoRA(sparsity_weight=1.0)
    with pytest.raises(ls.UsageError, match="SequenceClassification brings its own Sparsify"):
        trainer(max_epochs=1, callbacks=[ls.Sparsify(method)]).fit(classifier(tiny_bert, method), loader())


def test_two_sparsify_beside_a_module_of_the_users_own_are_an_error(tiny_bert, trainer, loader):
    method = ls.SoRA(sparsity_weight=1.0)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `Sparsify`"):  # Lightning's own
        trainer(callbacks=[ls.Sparsify(method), ls.Sparsify(method)])
    run = trainer(max_epochs=1, callbacks=[ls.Sparsify(method)])
    run.callbacks.append(ls.Sparsify(method))
    with pytest.raises(ls.UsageError, match="2 Sparsify callbacks"):
        run.fit(OwnModule(tiny_bert, method), loader())


def test_sparsify_without_adapters_is_an_error(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1, callbacks=[ls.Sparsify(ls.LoRA())])
    with pytest.raises(ls.UsageError, match=r"no adapter in OwnModule.*lit_sparse\.inject"):
        run.fit(OwnModule(tiny_bert), loader())


def test_sparsify_with_another_method_than_was_injected_is_an_error(tiny_bert, trainer, loader):
    run = trainer(max_epochs=1, callbacks=[ls.Sparsify(ls.SoRA(rank=4, sparsity_weight=1.0))])
    with pytest.raises(ls.UsageError, match=r"has no gate: it is not one of SoRA"):
        run.fit(OwnModule(tiny_bert, ls.LoRA(rank=4)), loader())


def test_one_trainer_serves_one_module_after_another(tiny_bert, trainer, loader):
    """As when the module that was fitted is loaded from its best checkpoint, and tested by the same Trainer."""
    run = trainer(max_epochs=1)
    first, second = classifier(tiny_bert), classifier(tiny_bert, ls.RoseLoRA(rank=2, density=0.5))
    run.fit(first, loader())
    run.test(second, loader(), verbose=False)
    run.fit_loop.max_epochs = 2  # the Trainer counts on
    run.fit(second, loader())
    assert [c.method for c in run.callbacks if isinstance(c, ls.Sparsify)] == [second.method]
    assert any(bool((adapter.lora_A == 0).any()) for _, adapter in ls.adapters_in(second))


def test_adapters_are_found_by_type(tiny_bert):
    module = classifier(tiny_bert)
    module.configure_model()
    found = dict(ls.adapters_in(module))
    assert len(found) == 13
    assert all(isinstance(adapter, LowRankLinear) for adapter in found.values())
