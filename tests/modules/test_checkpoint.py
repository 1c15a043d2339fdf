"""Checkpoints of the modules: what they hold, what loads them, exact resuming, and what is refused."""

import functools
import math
import re

import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForSequenceClassification

import lit_sparse as ls
from lit_sparse.errors import TrainingError
from lit_sparse.modules.checkpoint import KEY

METHODS = [
    ls.LoRA(rank=2),
    ls.SoRA(rank=4, sparsity_weight=2.0, freeze_zero_after=2),
    ls.RoseLoRA(rank=4, density=0.2, begin=1, end=6),
    ls.LoRA(rank=2, init_weights="gora", start_batches=2),
    ls.LoRA(rank=2, init_weights="lora_ga", start_batches=2),
    ls.LoRA(rank=2, init_weights="eva", start_batches=2),
    ls.GatedRoseLoRA(rank=4, threshold=0.02, density=0.2, begin=0.0, end=0.5, loraplus_lr_ratio=3.0),
    ls.SHiRA(changed=0.1, mask="random"),
    ls.SHiRA(changed=0.1, mask="snip", start_batches=2),
    ls.LIFT(changed=0.1, filter_rank=4, update_every=3),
    ls.SpIEL(changed=0.1, update_every=6, window=4),  # half of 16 steps is within the window from 7 to 10
    ls.HardConcreteLoRA(rank=4, budget=0.5, begin=1, end=6),
]
BUFFERS = {  # beside the parameters
    "LoRA": set(),
    "SoRA": {"steps_at_zero"},
    "RoseLoRA": {"sensitivity_A", "sensitivity_B_t"},
    "GatedRoseLoRA": {"sensitivity_A", "sensitivity_B_t"},
    "SHiRA": {"indices", "shape"},
    "LIFT": {"indices", "shape"},
    "SpIEL": {"indices", "shape", "candidates", "accumulated", "pending"},
    "HardConcreteLoRA": {"multiplier", "multiplier_of_square", "target"},
}
pytestmark = [  # in runs of two steps
    pytest.mark.filterwarnings("ignore:The adapters hold"),
    pytest.mark.filterwarnings("ignore:SpIEL first chooses"),
]
by_method = pytest.mark.parametrize(
    "method", METHODS, ids=lambda method: f"{type(method).__name__}-{getattr(method, 'mask', method.init_weights)}"
)


def classifier(backbone, method=None, **options):
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    return ls.SequenceClassification(
        backbone, method or METHODS[1], num_labels=2, **{"optimizer": optimizer, **options}
    )


@pytest.fixture
def saved(tmp_path, trainer, loader):
    """Fit a module for an epoch and save it; gives back the file."""

    def fit_and_save(module, name="saved.ckpt"):
        run = trainer(max_epochs=1)
        run.fit(module, loader())
        run.save_checkpoint(tmp_path / name)
        return str(tmp_path / name)

    return fit_and_save


@torch.no_grad()
def logits_of(module, loader):
    return module.eval()(**{k: v for k, v in next(iter(loader())).items() if k != "labels"}).logits


# What a checkpoint holds.


@by_method
def test_a_checkpoint_holds_what_is_trained_and_nothing_frozen(method, tiny_bert, saved):
    module = classifier(tiny_bert, method)
    checkpoint = torch.load(saved(module), weights_only=True)
    factors = {"lora_A", "lora_B_t", *(["gate"] if method.gated else [])}
    own = (factors if isinstance(method, ls.SparseMethod) else {"values"}) | BUFFERS[type(method).__name__]
    adapters = {f"{name}.{part}" for name, _ in ls.adapters_in(module) for part in own}
    assert len(adapters) == 13 * len(own)
    head = {"model.classifier.weight", "model.classifier.bias"}
    others = {"model.bert.embeddings.position_ids", "model.bert.embeddings.token_type_ids"}  # BERT's, if persistent
    assert checkpoint["state_dict"].keys() - others == adapters | head
    optimizer = checkpoint["optimizer_states"][0]["state"]
    assert len(optimizer) == sum(p.requires_grad for p in module.parameters())


def test_a_checkpoint_is_small(tmp_path, saved):
    backbone = save_tiny_bert(tmp_path / "wide", hidden_size=128, intermediate_size=2048, vocab_size=5000)
    file = saved(classifier(backbone, ls.LoRA(["query"], rank=1)))
    frozen = sum(f.stat().st_size for f in (tmp_path / "wide").glob("*.safetensors"))
    assert frozen > 5e6
    assert (tmp_path / file).stat().st_size < 0.02 * frozen


# Loading in Python.


@by_method
def test_a_module_made_in_python_loads_with_equal_logits(method, tiny_bert, saved, loader):
    module = classifier(tiny_bert, method, warmup=0.25, lr_schedule="cosine")
    file = saved(module)
    loaded = ls.SequenceClassification.load_from_checkpoint(file)
    assert torch.equal(logits_of(loaded, loader), logits_of(module, loader))
    assert type(loaded.method) is type(method)
    assert loaded.method.init_args() == method.init_args()
    assert (loaded.warmup, loaded.lr_schedule, loaded.num_labels) == (0.25, "cosine", 2)
    optimizer = loaded.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["lr"] == 1e-2


def test_shares_of_the_run_do_not_become_steps(tiny_bert, saved):
    """1.0 is the whole run, 1 is one step."""
    module = classifier(tiny_bert, ls.RoseLoRA(rank=2, begin=0.0, end=1.0))
    loaded = ls.SequenceClassification.load_from_checkpoint(saved(module)).method
    assert (loaded.begin, type(loaded.begin)) == (0.0, float)
    assert (loaded.end, type(loaded.end)) == (1.0, float)


def test_a_module_with_a_built_model_loads_with_that_model_given(tiny_bert, saved, loader):
    def build():
        return AutoModelForSequenceClassification.from_pretrained(tiny_bert)

    module = classifier(build())
    file = saved(module)
    loaded = ls.SequenceClassification.load_from_checkpoint(file, backbone=build())
    assert torch.equal(logits_of(loaded, loader), logits_of(module, loader))


def test_a_module_with_the_default_optimizer_loads(tiny_bert, saved, loader):
    module = ls.SequenceClassification(tiny_bert, ls.LoRA(rank=2), num_labels=2)
    loaded = ls.SequenceClassification.load_from_checkpoint(saved(module))
    assert torch.equal(logits_of(loaded, loader), logits_of(module, loader))


def test_a_causal_lm_loads(tiny_llama, trainer, tmp_path):
    ids = torch.arange(5, 15).repeat(2, 1)
    batch = {"input_ids": ids, "labels": ids}
    module, run = ls.CausalLM(tiny_llama, ls.SoRA(rank=2, sparsity_weight=1.0)), trainer(max_steps=3, max_epochs=9)
    run.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    run.save_checkpoint(tmp_path / "lm.ckpt")
    loaded = ls.CausalLM.load_from_checkpoint(tmp_path / "lm.ckpt")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, module.eval()(**batch).logits)


# Resuming.


class Interrupt(Callback):
    """Ends the run after an epoch, as a user's Ctrl-C or a time limit would."""

    def __init__(self, after):
        self.after = after

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.after:
            trainer.should_stop = True


def trained_state(module):
    """Copies of everything trained, and of the adapters' buffers."""
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    return {name: value.clone() for name, value in module.state_dict().items() if name not in frozen}


@by_method
def test_resuming_at_an_epochs_end_is_bit_equal_to_no_interruption(method, tiny_bert, tmp_path, trainer, loader):
    train = functools.partial(loader, count=32, batch_size=8)
    straight, run = classifier(tiny_bert, method), trainer(max_epochs=4)
    torch.manual_seed(1)
    run.fit(straight, train())
    steps = run.global_step

    torch.manual_seed(1)
    keep = ModelCheckpoint(tmp_path, filename="half", save_on_train_epoch_end=True)
    half = trainer(max_epochs=4, callbacks=[keep, Interrupt(after=2)], enable_checkpointing=True)
    half.fit(classifier(tiny_bert, method), train())
    assert half.global_step == steps // 2

    torch.manual_seed(99)  # nothing of the rest may depend on it
    resumed, rest = classifier(tiny_bert, method), trainer(max_epochs=4)
    rest.fit(resumed, train(), ckpt_path=str(tmp_path / "half.ckpt"))
    assert rest.global_step == steps
    sparsify = next(callback for callback in rest.callbacks if isinstance(callback, ls.Sparsify))
    assert sparsify.steps_taken == steps
    expected, found = trained_state(straight), trained_state(resumed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for one, other in zip(run.optimizers[0].state.values(), rest.optimizers[0].state.values(), strict=True):
        for key in one:
            assert torch.equal(one[key], other[key])


def test_a_second_fit_without_checkpoint_starts_counting_anew(tiny_bert, trainer, loader):
    module = classifier(tiny_bert, METHODS[2])
    for _ in range(2):
        run = trainer(max_epochs=1)
        run.fit(module, loader())
        assert next(c for c in run.callbacks if isinstance(c, ls.Sparsify)).steps_taken == 2


# What is refused.


def test_a_checkpoint_of_another_rank_names_layer_and_ranks(tiny_bert, saved, trainer, loader):
    file = saved(classifier(tiny_bert, ls.LoRA(rank=2)))
    with pytest.raises(ls.UsageError, match=r"query' has rank 2 there and 3 here.*'rank': 2"):
        trainer(max_epochs=2).fit(classifier(tiny_bert, ls.LoRA(rank=3)), loader(), ckpt_path=file)


@pytest.mark.parametrize(("theirs", "ours"), [(["query"], ["query", "value"]), (["query", "value"], ["query"])])
def test_a_checkpoint_of_other_layers_names_the_first(theirs, ours, tiny_bert, saved, trainer, loader):
    file = saved(classifier(tiny_bert, ls.LoRA(theirs, rank=2)))
    with pytest.raises(ls.UsageError, match=r"adapters differ from the model's: .*attention.self.value"):
        trainer(max_epochs=2).fit(classifier(tiny_bert, ls.LoRA(ours, rank=2)), loader(), ckpt_path=file)


def test_a_checkpoint_of_another_method_with_equal_ranks_is_refused(tiny_bert, saved, trainer, loader):
    file = saved(classifier(tiny_bert, ls.LoRA(rank=2)))
    with pytest.raises(ls.UsageError, match="trained with LoRA, but the method here is SoRA"):
        trainer(max_epochs=2).fit(classifier(tiny_bert, ls.SoRA(rank=2, threshold=0.1)), loader(), ckpt_path=file)


def test_a_checkpoint_of_a_backbone_with_other_weights_is_refused(tiny_bert, tmp_path, saved, trainer, loader):
    file = saved(classifier(tiny_bert))
    other = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    with torch.no_grad():
        other.bert.encoder.layer[1].output.dense.weight.normal_(0, 0.02)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "unused").write_text("")
    with pytest.raises(ls.UsageError, match=rf"belongs to the backbone '{tiny_bert}'; the frozen weights of '.*other'"):
        trainer(max_epochs=2).fit(classifier(str(tmp_path / "other")), loader(), ckpt_path=file)
    with pytest.raises(ls.UsageError, match="the frozen weights"):
        ls.SequenceClassification.load_from_checkpoint(file, backbone=str(tmp_path / "other"))


def test_a_checkpoint_of_a_backbone_of_another_structure_is_refused(tiny_bert, tmp_path, saved, trainer, loader):
    method = ls.LoRA(rank=2, layers=[0], target_modules=["query"])
    file = saved(classifier(tiny_bert, method))
    deeper = save_tiny_bert(tmp_path / "deeper", num_hidden_layers=3)
    with pytest.raises(ls.UsageError, match="another structure"):
        trainer(max_epochs=2).fit(classifier(deeper, method), loader(), ckpt_path=file)


def test_a_half_precision_copy_of_the_backbone_fits(tiny_bert, saved, loader):
    module = classifier(tiny_bert)
    file = saved(module)
    loaded = ls.SequenceClassification.load_from_checkpoint(file, backbone_args={"dtype": "bfloat16"})
    difference = (logits_of(loaded, loader).float() - logits_of(module, loader)).abs().max()
    assert 0 < difference < 0.2


class Foreign(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(2)).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_checkpoint_of_another_lightning_module_is_refused(tiny_bert, tmp_path, trainer, loader):
    run = trainer(max_epochs=1)
    run.fit(Foreign(), loader())
    run.save_checkpoint(tmp_path / "foreign.ckpt")
    with pytest.raises(ls.UsageError, match="not written by a lit_sparse module"):
        trainer(max_epochs=2).fit(classifier(tiny_bert), loader(), ckpt_path=str(tmp_path / "foreign.ckpt"))


def test_a_checkpoint_that_lacks_a_trained_value_is_refused(tiny_bert, tmp_path, saved, trainer, loader):
    file = saved(classifier(tiny_bert, ls.LoRA(rank=2)))
    checkpoint = torch.load(file, weights_only=True)
    removed = next(key for key in checkpoint["state_dict"] if key.endswith("lora_A"))
    del checkpoint["state_dict"][removed]
    checkpoint["state_dict"]["stranger"] = torch.zeros(1)
    torch.save(checkpoint, tmp_path / "lacking.ckpt")
    with pytest.raises(ls.UsageError, match=rf"1 are missing \['{re.escape(removed)}'\], 1 are unknown \['stranger'\]"):
        trainer(max_epochs=2).fit(
            classifier(tiny_bert, ls.LoRA(rank=2)), loader(), ckpt_path=str(tmp_path / "lacking.ckpt")
        )


def test_the_record_names_version_backbone_and_method(tiny_bert, saved):
    record = torch.load(saved(classifier(tiny_bert, ls.LoRA(rank=2))), weights_only=True)[KEY]
    assert record["version"] == ls.__version__
    assert record["backbone"] == tiny_bert
    assert record["method"]["class_path"].endswith("LoRA")
    assert record["method"]["init_args"]["rank"] == 2


# A loss that is no number.


class BreaksAt(ls.SequenceClassification):
    """Its loss is not a number from a given optimizer step on."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.bad if self.trainer.global_step >= 5 else loss

    bad = math.nan


class Overflows(BreaksAt):
    bad = math.inf


@pytest.mark.parametrize("kind", [BreaksAt, Overflows])
def test_a_loss_that_is_no_number_stops_with_step_and_last_good_checkpoint(kind, tiny_bert, tmp_path, trainer, loader):
    module = kind(tiny_bert, ls.SoRA(rank=2, sparsity_weight=1.0), num_labels=2)
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    run = trainer(max_epochs=4, callbacks=[keep], enable_checkpointing=True)
    with pytest.raises(TrainingError, match=r"became NaN or infinite at optimizer step 5 \(epoch 2\).*step=4\.ckpt"):
        run.fit(module, loader())
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["step=2.ckpt", "step=4.ckpt"]
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    resumed = ls.SequenceClassification(tiny_bert, ls.SoRA(rank=2, sparsity_weight=1.0), num_labels=2)
    rest = trainer(max_epochs=4)
    rest.fit(resumed, loader(), ckpt_path=str(tmp_path / "step=4.ckpt"))
    assert rest.global_step == 8


def test_without_a_checkpoint_the_message_says_so(tiny_bert, trainer, loader):
    module = BreaksAt(tiny_bert, ls.LoRA(rank=2), num_labels=2)
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        trainer(max_epochs=4).fit(module, loader())
