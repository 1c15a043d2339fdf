"""lit_sparse.AdapterBank: each adapter against itself alone on a fresh backbone, and the backbone against itself."""

import functools
import json

import peft
import pytest
import torch
from backbones import build_tiny, save_tiny_bert
from lightning.pytorch import Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    MixtralForCausalLM,
)

import lit_sparse as ls

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 6, 7, 9]])
ROWS = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(IDS.repeat(4, 1))]
METHODS = {
    "SoRA": ls.SoRA("all-linear", rank=4, sparsity_weight=4.0, gate_lr=0.1),
    "RoseLoRA": ls.RoseLoRA(["query", "dense"], rank=3, density=0.2, begin=0, end=2),
    "GoRA": ls.LoRA("all-linear", rank=2, layers=[0, 1], init_weights="gora", start_batches=1),
    "EVA": ls.LoRA("all-linear", rank=2, init_weights="eva", start_batches=1, exclude_modules=["pooler.dense"]),
    "GatedRoseLoRA": ls.GatedRoseLoRA(["value"], rank=4, density=0.5, begin=0, end=2, threshold=0.1),
}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(scope="module")
def sources(folder, tmp_path_factory):
    """Adapters of all kinds by name, each with the logits that it gives alone on a backbone of its own."""
    made = tmp_path_factory.mktemp("adapters")
    found = {}
    for name, method in METHODS.items():
        path = made / f"{name}.ckpt"
        found[name] = path, logits(run(folder, method, path).model)
    for name, settings in {
        "peft": {"target_modules": ["query", "value"], "r": 4, "modules_to_save": ["classifier"]},
        "peft without head": {"target_modules": ["dense"], "rank_pattern": {"intermediate.dense": 2}},
    }.items():
        lora = peft.LoraConfig(init_lora_weights=False, **settings)
        adapted = peft.get_peft_model(load(folder), lora)
        if "modules_to_save" in settings:
            torch.nn.init.normal_(adapted.get_submodule("base_model.model.classifier.modules_to_save.default").weight)
        adapted.save_pretrained(made / name)
        found[name] = made / name, logits(adapted)
    return found


def load(folder, **arguments):
    return AutoModelForSequenceClassification.from_pretrained(folder, **arguments)


def run(folder, method, path, **arguments):
    """A module that was trained for a few steps, saved at ``path``."""
    torch.manual_seed(0)
    module = ls.SequenceClassification(
        folder, method, optimizer=functools.partial(torch.optim.AdamW, lr=0.05), **{"num_labels": 2, **arguments}
    )
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(ROWS, 4))
    trainer.save_checkpoint(path)
    return module


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def state(model):
    return {name: (value, value.clone()) for name, value in model.state_dict(keep_vars=True).items()}


def assert_unchanged(model, before):
    after = model.state_dict(keep_vars=True)
    assert after.keys() == before.keys()
    for name, (tensor, value) in before.items():
        assert after[name] is tensor, name
        assert torch.equal(tensor, value), name


def test_every_adapter_is_what_it_is_alone_and_the_backbone_stays_what_it_was(folder, sources):
    model = load(folder)
    plain, before = logits(model), state(model)
    bank = ls.AdapterBank(model)
    for name, (path, _) in sources.items():
        bank.add(name, path)
        assert bank.in_use is None
        assert torch.equal(logits(model), plain)
    assert bank.names == list(sources)
    for _ in range(2):
        for name, (_, expected) in sources.items():
            bank.use(name)
            assert bank.in_use == name
            assert not torch.allclose(expected, plain, atol=1e-2)
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    bank.use(None)
    assert torch.equal(logits(model), plain)
    assert_unchanged(model, before)


def test_frozen_weights_are_shared_and_nothing_is_trained(folder, sources):
    model = load(folder)
    frozen = {id(p) for p in model.parameters()}
    bank = ls.AdapterBank(model)
    for name, (path, _) in sources.items():
        bank.add(name, path)
        with bank.using(name):
            assert not any(p.requires_grad for p in model.parameters())
            own = {id(p) for _, adapter in ls.adapters_in(model) for p in adapter.parameters(recurse=False)}
            others = {n for n, p in model.named_parameters() if id(p) not in frozen | own}
            assert others <= {"classifier.weight", "classifier.bias"}


def test_statistics_and_switches_see_the_adapter_in_use(folder, sources):
    model = load(folder)
    bank = ls.AdapterBank(model)
    bank.add("a", sources["SoRA"][0])
    bank.add("b", sources["RoseLoRA"][0])
    assert not list(ls.adapters_in(model))
    with bank.using("a"):
        assert all(adapter.gate is not None for _, adapter in ls.adapters_in(model))
        with bank.using("b"):
            assert all(adapter.gate is None for _, adapter in ls.adapters_in(model))
            before = logits(model)
            with ls.disable_adapters(model, head=False):
                assert not torch.equal(logits(model), before)
        assert bank.in_use == "a"
        with pytest.raises(RuntimeError, match="of the caller's own"), bank.using(None):
            raise RuntimeError("of the caller's own")
        assert bank.in_use == "a"
    assert bank.in_use is None


def test_heads_for_other_numbers_of_labels_take_turns(folder, sources, tmp_path):
    three = run(folder, METHODS["SoRA"], tmp_path / "three.ckpt", num_labels=3)
    model = load(folder)
    bank = ls.AdapterBank(model)
    bank.add("two", sources["peft"][0])
    bank.add("three", tmp_path / "three.ckpt")
    with bank.using("three"):
        assert model.classifier.out_features == 3
        torch.testing.assert_close(logits(model), logits(three.model), rtol=0, atol=1e-6)
        with bank.using("two"):
            assert logits(model).shape == (3, 2)
    assert (model.classifier.out_features, logits(model).shape) == (2, (3, 2))


@pytest.mark.parametrize("model_class", [AlbertForSequenceClassification, MixtralForCausalLM])
def test_shared_layers_and_experts_are_switched_too(model_class, tmp_path):
    options = {"num_key_value_heads": 4, "tie_word_embeddings": False} if model_class is MixtralForCausalLM else {}
    torch.manual_seed(0)
    module = ls.SparseModule(build_tiny(model_class, **options), ls.SoRA(rank=2, threshold=0.01))
    rows = [{"input_ids": row, "labels": row if model_class is MixtralForCausalLM else row[0] % 2} for row in IDS]
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, **QUIET)
    trainer.fit(module, DataLoader(rows, 3))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    model = build_tiny(model_class, **options)
    plain, bank = logits(model), ls.AdapterBank(model)
    bank.add("own", tmp_path / "run.ckpt")
    with bank.using("own"):
        assert torch.equal(logits(model), logits(module.model))
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))],
)
def test_a_model_that_moved_or_changed_its_mode_takes_the_adapter_along(device, folder, sources):
    model = load(folder).eval()
    bank = ls.AdapterBank(model)
    bank.add("a", sources["SoRA"][0])
    bank.add("b", sources["peft"][0])
    bank.use("a")
    model.to(device).train()
    for name in ("b", None, "a"):
        bank.use(name)
        assert {p.device.type for p in model.parameters()} == {device}
        assert all(module.training for module in model.modules())


def test_a_removed_adapter_is_forgotten(folder, sources):
    model = load(folder)
    plain, bank = logits(model), ls.AdapterBank(model)
    bank.add("a", sources["SoRA"][0])
    bank.use("a")
    bank.remove("a")
    assert (bank.names, bank.in_use) == ([], None)
    assert torch.equal(logits(model), plain)
    bank.add("a", sources["peft"][0])


def test_a_half_precision_backbone_keeps_its_dtype_and_heads_their_precision(folder, sources):
    model = load(folder, dtype=torch.bfloat16)
    plain, bank = logits(model), ls.AdapterBank(model)
    for name, (path, _) in sources.items():
        bank.add(name, path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(model), plain)
    bank.use("SoRA")
    assert model.classifier.weight.dtype == torch.float32
    torch.testing.assert_close(logits(model), sources["SoRA"][1], rtol=0, atol=0.1)  # 2⁻⁸ in a dozen layers
    assert len(model.classifier._forward_pre_hooks) == 1


# What is refused leaves bank and model as they were.


def test_a_bank_needs_a_plain_backbone(folder):
    model = load(folder)
    ls.inject(model, METHODS["SoRA"])
    with pytest.raises(ls.UsageError, match="BertForSequenceClassification holds adapters already"):
        ls.AdapterBank(model)


def test_names(folder, sources):
    bank = ls.AdapterBank(load(folder))
    bank.add("a", sources["peft"][0])
    with pytest.raises(ls.UsageError, match="has an adapter 'a' already"):
        bank.add("a", sources["peft"][0])
    for call in (bank.use, bank.remove):
        with pytest.raises(ls.UsageError, match=r"no adapter 'b'; it has \['a'\]"):
            call("b")


def test_a_merge_ends_the_bank(folder, sources):
    model = load(folder)
    bank = ls.AdapterBank(model)
    bank.add("a", sources["peft"][0])
    bank.use("a")
    ls.merge(model)
    with pytest.raises(ls.UsageError, match="model was changed while 'a' was in use"):
        bank.use(None)


def changed(change):
    """A checkpoint of the SoRA run after ``change``."""

    def make(folder, sources, tmp_path):
        checkpoint = torch.load(sources["SoRA"][0], weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, tmp_path / "changed.ckpt")
        return tmp_path / "changed.ckpt"

    return make


def text_file(folder, sources, tmp_path):
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    return tmp_path / "text.ckpt"


def lightning_checkpoint(folder, sources, tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def pissa(folder, sources, tmp_path):
    run(folder, ls.LoRA(["query"], rank=2, init_weights="pissa"), tmp_path / "pissa.ckpt")
    return tmp_path / "pissa.ckpt"


def another_backbone(folder, sources, tmp_path):
    other = save_tiny_bert(tmp_path / "other", initializer_range=0.5)
    run(other, METHODS["RoseLoRA"], tmp_path / "other.ckpt")
    return tmp_path / "other.ckpt"


def broken_folder(folder, sources, tmp_path):
    tensors = load_file(sources["peft"][0] / "adapter_model.safetensors")
    tensors["base_model.model.nowhere"] = torch.ones(2)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = json.loads((sources["peft"][0] / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    return tmp_path


BAD = {
    "nothing there": (lambda folder, sources, tmp_path: tmp_path / "none.ckpt", "none.ckpt' does not exist"),
    "a text": (text_file, "cannot be read as a checkpoint"),
    "a checkpoint of something else": (lightning_checkpoint, "was not written by a lit_sparse module"),
    "another backbone": (another_backbone, "the frozen weights of .* differ"),
    "PiSSA": (pissa, "init_weights 'pissa', which changed the shared weights"),
    "a folder with a tensor too many": (broken_folder, "holds .*'nowhere'.*has no place"),
    "weights outside the backbone": (
        changed(lambda c: c["state_dict"].update({"extra.weight": torch.ones(1)})),
        "'extra.weight'.*lie outside the backbone",
    ),
    "a weight too few": (changed(lambda c: c["state_dict"].popitem()), "do not fit .*missing"),
    "a method that is not known": (
        changed(lambda c: c["lit_sparse"]["method"].update(class_path="os.system")),
        "trained with os.system, and 0 classes of this name are known",
    ),
    "a head of another shape": (
        changed(lambda c: c["state_dict"].update({"model.classifier.weight": torch.ones(2, 7)})),
        r"'classifier.weight' of shape \(2, 7\), the backbone \(2, 32\)",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_a_source_that_does_not_fit_changes_nothing(make, message, folder, sources, tmp_path):
    model = load(folder)
    bank = ls.AdapterBank(model)
    bank.add("good", sources["RoseLoRA"][0])
    before, path = state(model), make(folder, sources, tmp_path)
    with bank.using("good"), pytest.raises(ls.UsageError, match=message):
        bank.add("bad", path)
    assert bank.names == ["good"]
    assert_unchanged(model, before)
    assert model.classifier.out_features == 2
    assert not any(p.requires_grad for p in model.parameters())
    with bank.using("good"):
        torch.testing.assert_close(logits(model), sources["RoseLoRA"][1], rtol=0, atol=1e-6)
