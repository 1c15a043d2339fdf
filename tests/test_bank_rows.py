"""AdapterBank.rows: every row of a mixed batch against the row by itself under its own adapter."""

import functools

import pytest
import torch
from backbones import build_tiny, save_tiny_bert, save_tiny_gpt2, save_tiny_llama, save_tiny_t5
from fake_gpu import GPU, fake_gpu
from torch._dynamo.utils import counters
from trained import save_checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    MixtralForCausalLM,
    RobertaForSequenceClassification,
    ViTForImageClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

import lit_sparse as ls
from lit_sparse.adapters.rowwise import RowwiseChoice, RowwiseLinear

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 6, 7, 9], [5, 9, 5, 9]])
METHODS = {
    "gated": ls.SoRA("all-linear", rank=4, alpha=6, threshold=0.1),
    "masked": ls.RoseLoRA("all-linear", rank=3, density=0.3, layers=[0]),
    "dense": ls.LoRA("all-linear", rank=2, layers=[1]),
}
NAMES = ["masked", None, "gated", "dense"]


def bank_of(build, folder, methods=METHODS, std=0.5, **options):
    """A bank of runs on a backbone that ``build`` makes anew, equal each time."""
    model = build().eval()
    bank = ls.AdapterBank(model)
    for seed, (name, method) in enumerate(methods.items()):
        torch.manual_seed(seed)
        module = ls.SparseModule(build(), method, **options)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad and parameter.dim() > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=std)
            for number, (_, adapter) in enumerate(ls.adapters_in(module)):
                if adapter.gate is not None:
                    adapter.gate[: number % 3] = 0
        for part in module.model.modules():
            if isinstance(part, torch.nn.Linear) and part.weight.requires_grad:
                torch.nn.init.normal_(part.weight, std=std)
        bank.add(name, save_checkpoint(module, folder / f"{name}.ckpt", std=std))
    return bank


@torch.no_grad()
def one_by_one(bank, names, **batch):
    found = []
    for row, name in enumerate(names):
        with bank.using(name) as model:
            found.append(model(**{key: value[row : row + 1] for key, value in batch.items()}).logits)
    return torch.cat(found)


@torch.no_grad()
def mixed(bank, names, **batch):
    with bank.rows(names) as model:
        return model(**batch).logits


def assert_rows_are_their_own(bank, names=NAMES, **batch):
    expected = one_by_one(bank, names, **batch)
    plain = one_by_one(bank, [None] * len(names), **batch)
    changed = [not torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, plain, strict=True)]
    assert changed == [name is not None for name in names]
    torch.testing.assert_close(mixed(bank, names, **batch), expected, rtol=1e-4, atol=1e-4)
    again = mixed(bank, [None] * len(names), **batch)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)


def bert(folder):
    build = functools.partial(save_tiny_bert, folder)
    build()
    return functools.partial(AutoModelForSequenceClassification.from_pretrained, folder)


def test_rows_of_an_encoder_with_heads_of_their_own(tmp_path):
    """Of other layers, ranks and methods; one head stays the backbone's."""
    methods = {**METHODS, "dense": ls.LoRA("all-linear", rank=2, layers=[1], train_head=False)}
    bank = bank_of(bert(tmp_path / "bert"), tmp_path, methods)
    before = {n: p.clone() for n, p in bank.model.named_parameters()}
    assert_rows_are_their_own(bank, input_ids=IDS)
    assert_rows_are_their_own(bank, ["gated", "gated", "dense", "gated"], input_ids=IDS)
    with bank.rows(NAMES) as model:
        kinds = [type(module) for module in model.modules()]
        assert kinds.count(RowwiseChoice) == 1  # the head; all other layers multiply by A and B of their rows
        assert kinds.count(RowwiseLinear) >= 12
    after = dict(bank.model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_padded_rows_and_masks(tmp_path):
    bank = bank_of(bert(tmp_path / "bert"), tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, 2:] = 0
    assert_rows_are_their_own(bank, input_ids=IDS, attention_mask=mask)


def test_an_adapter_in_use_is_in_use_again_and_switches_work(tmp_path):
    bank = bank_of(bert(tmp_path / "bert"), tmp_path)
    bank.use("dense")
    expected = one_by_one(bank, ["dense"] * 4, input_ids=IDS)
    with bank.rows(NAMES) as model, ls.disable_adapters(model, head=False), torch.no_grad():
        found = model(IDS).logits
        assert bank.in_use is None
    assert bank.in_use == "dense"
    with torch.no_grad():
        torch.testing.assert_close(bank.model(IDS).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(found[1], one_by_one(bank, [None], input_ids=IDS[1:2])[0], rtol=0, atol=1e-5)
    bank.remove("dense")
    with pytest.raises(ls.UsageError, match="no adapter 'dense'"), bank.rows(NAMES):
        pass
    assert_rows_are_their_own(bank, ["gated", None, "masked", "masked"], input_ids=IDS)


@pytest.mark.parametrize("save", [save_tiny_llama, save_tiny_gpt2])
def test_rows_of_a_language_model_and_what_it_generates(save, tmp_path):
    folder = save(tmp_path / "model")
    # In float64, where no two beams are equal to rounding.
    build = functools.partial(AutoModelForCausalLM.from_pretrained, folder, dtype=torch.float64)
    bank = bank_of(build, tmp_path)
    assert_rows_are_their_own(bank, input_ids=IDS)
    for options in ({}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
        settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}
        alone = []
        for row, name in enumerate(NAMES):
            with bank.using(name) as model:
                alone.append(model.generate(IDS[row : row + 1], **settings))
        with bank.rows(NAMES) as model:
            assert torch.equal(model.generate(IDS, **settings), torch.cat(alone))
            assert torch.equal(model.generate(input_ids=IDS, **settings), torch.cat(alone))
    assert len({tuple(row.tolist()[4:]) for row in torch.cat(alone)}) > 1
    assert "generate" not in vars(bank.model)


def test_rows_of_an_encoder_and_decoder_generate(tmp_path):
    folder = save_tiny_t5(tmp_path / "t5")
    bank = bank_of(functools.partial(AutoModelForSeq2SeqLM.from_pretrained, folder), tmp_path)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 2, "do_sample": False}
    alone = []
    for row, name in enumerate(NAMES):
        with bank.using(name) as model:
            alone.append(model.generate(IDS[row : row + 1], **settings))
    with bank.rows(NAMES) as model:
        assert torch.equal(model.generate(IDS, **settings), torch.cat(alone))


def test_embeddings_convolutions_and_heads_of_several_layers(tmp_path):
    roberta = functools.partial(seeded, build_tiny, RobertaForSequenceClassification)
    methods = {
        "gated": ls.SoRA(["word_embeddings", "query"], rank=3, threshold=0.1),
        "masked": ls.RoseLoRA(["word_embeddings", "dense"], rank=2, density=0.5, train_head=False),
        "dense": ls.LoRA(["key"], rank=2),
    }
    assert_rows_are_their_own(bank_of(roberta, tmp_path, methods), input_ids=IDS)
    vit = functools.partial(seeded, build_tiny, ViTForImageClassification)
    methods = {
        "gated": ls.SoRA(["projection", "q_proj"], rank=3, threshold=0.1),
        "masked": ls.RoseLoRA(["fc1"], rank=2, density=0.5),
        "dense": ls.LoRA(["projection"], rank=2),
    }
    config = vit().config
    pixels = torch.randn(4, config.num_channels, config.image_size, config.image_size)
    assert_rows_are_their_own(bank_of(vit, tmp_path, methods), pixel_values=pixels)


def seeded(build, *args, **options):
    torch.manual_seed(0)
    return build(*args, **options)


def test_half_precision(tmp_path):
    build = functools.partial(bert(tmp_path / "bert"), dtype=torch.bfloat16)
    bank = bank_of(build, tmp_path, std=0.1)
    expected = one_by_one(bank, NAMES, input_ids=IDS)
    torch.testing.assert_close(mixed(bank, NAMES, input_ids=IDS), expected.to(torch.float32), rtol=0.05, atol=0.05)


ENTRIES = {"entries": ls.SHiRA(["query", "value"], changed=0.2), "dense": ls.LoRA(["query"], rank=2)}
CONVOLUTION = {"entries": ls.LoRA(["projection"], rank=2), "dense": ls.LoRA(["q_proj"], rank=2)}


@pytest.mark.parametrize(("methods", "images"), [(ENTRIES, False), (CONVOLUTION, True)], ids=["entries", "convolution"])
def test_layers_of_all_kinds_in_half_precision(methods, images, tmp_path):
    """Values in float32 on weights in bfloat16."""
    names, batch = ["entries", None, "dense"], {"input_ids": IDS[:3]}
    build = functools.partial(bert(tmp_path / "bert"), dtype=torch.bfloat16)
    if images:
        build = functools.partial(seeded, build_tiny, ViTForImageClassification)
        config = build().config
        batch = {"pixel_values": torch.randn(3, 3, config.image_size, config.image_size, dtype=torch.bfloat16)}
    bank = ls.AdapterBank(build().to(torch.bfloat16).eval())
    for name, method in methods.items():
        module = ls.SparseModule(build().to(torch.bfloat16), method)
        module.configure_model()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=0.1)
        kept = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
        module.on_save_checkpoint(kept)
        torch.save(kept, tmp_path / f"{name}.ckpt")
        bank.add(name, tmp_path / f"{name}.ckpt")
    expected = one_by_one(bank, names, **batch)
    assert not torch.allclose(expected, one_by_one(bank, [None] * 3, **batch).to(expected), atol=0.05)
    torch.testing.assert_close(mixed(bank, names, **batch), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("function", [ls.merge, ls.unload])
def test_rows_are_left_before_a_merge(function, tmp_path):
    bank = bank_of(bert(tmp_path / "bert"), tmp_path)
    before = {name: tensor.clone() for name, tensor in bank.model.state_dict().items()}
    with pytest.raises(ls.UsageError, match=r"outside of rows\(…\)"), bank.rows(NAMES) as model:
        function(model)
    after = bank.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_model_that_turns_its_batches_is_refused(tmp_path):
    """As many positions as rows: the shapes fit, and each position would go through the adapter of a row."""
    config = XLNetConfig(vocab_size=100, d_model=32, n_layer=2, n_head=4, d_inner=64)
    bank = bank_of(functools.partial(seeded, XLNetForSequenceClassification, config), tmp_path)
    with pytest.raises(ls.UsageError, match="cannot be told apart"), bank.rows(NAMES):
        pass


def test_sums_are_of_finite_weights_and_without_tokens(tmp_path):
    folder = save_tiny_llama(tmp_path / "llama")
    module = ls.CausalLM(folder, ls.LoRA(rank=2), new_tokens=["<x>"])
    run = save_checkpoint(module, tmp_path / "run.ckpt")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(module.model.config.vocab_size)
    bank = ls.AdapterBank(model.eval())
    bank.add("run", run)
    with pytest.raises(ls.UsageError, match="'run' holds rows of new tokens, which cannot be added up"):
        bank.add_sum("sum", {"run": 1.0})
    with pytest.raises(ls.UsageError, match="A weight must be"):
        bank.add_sum("sum", {"run": float("nan")})
    with pytest.raises(ls.UsageError, match=r"takes a list .* got 'run'"), bank.rows("run"):
        pass
    assert bank.names == ["run"]


def test_a_call_does_not_wait_for_the_gpu(tmp_path):
    bank = bank_of(bert(tmp_path / "bert"), tmp_path)
    expected, half = mixed(bank, NAMES, input_ids=IDS), mixed(bank, NAMES[:2], input_ids=IDS[:2])
    with fake_gpu() as gpu, torch.no_grad():
        bank.model.to(GPU)
        ids = IDS.to(GPU)
        mask = torch.ones_like(ids)
        with bank.rows(NAMES) as model:
            gpu.waits.clear()
            found = model(input_ids=ids, attention_mask=mask).logits
            assert not [wait for wait in gpu.waits if "lit_sparse" in str(wait)]
        assert found.device == GPU
        found = found.to("cpu")
        with bank.rows(NAMES[:2]) as model:
            again = model(input_ids=ids[:2], attention_mask=mask[:2]).logits.to("cpu")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(again, half, rtol=1e-4, atol=1e-4)


def test_a_weighted_sum_of_adapters(tmp_path):
    """Against the sum of the changes written into the weights; by itself, and for a row."""
    bank = bank_of(bert(tmp_path / "bert"), tmp_path)
    weights = {"gated": 0.5, "masked": -2.0, "dense": 1.0}
    bank.add_sum("sum", weights, head="masked")
    expected = bert(tmp_path / "bert")().eval()
    with torch.no_grad():
        for name, weight in weights.items():
            with bank.using(name) as model:
                for layer, adapter in ls.adapters_in(model):
                    expected.get_submodule(layer).weight += weight * adapter.delta_weight()
                if name == "masked":
                    expected.classifier.load_state_dict(model.classifier.state_dict())
        with bank.using("sum") as model:
            torch.testing.assert_close(model(IDS).logits, expected(IDS).logits, rtol=1e-4, atol=1e-4)
        found = mixed(bank, ["sum", None, "gated", "sum"], input_ids=IDS)
        torch.testing.assert_close(found[::3], expected(IDS).logits[::3], rtol=1e-4, atol=1e-4)
    with pytest.raises(ls.UsageError, match="has an adapter 'sum' already"):
        bank.add_sum("sum", {"gated": 1.0})
    with pytest.raises(ls.UsageError, match="no adapter 'other'"):
        bank.add_sum("more", {"gated": 1.0}, head="other")
    with pytest.raises(ls.UsageError, match=r"Nothing is left of \{'gated': 0\}"):
        bank.add_sum("more", {"gated": 0})
    assert bank.names == [*METHODS, "sum"]


@pytest.mark.slow
def test_an_adapter_of_the_same_shapes_needs_no_other_graph(tmp_path):
    """Compiled blocks: one graph for all adapters alike, and one for all mixtures of them."""
    torch._dynamo.reset()
    counters.clear()
    methods = {name: ls.LoRA("all-linear", rank=4) for name in ("one", "two", "three")}
    bank = bank_of(bert(tmp_path / "bert"), tmp_path, methods)
    names = [["one", "two", None, "one"], ["two", None, None, "one"], ["three", "one", "two", None]]
    expected = [mixed(bank, some, input_ids=IDS) for some in names]
    alone = [one_by_one(bank, [name] * 4, input_ids=IDS) for name in methods]
    ls.compile_blocks(bank.model, backend="aot_eager")
    with torch.no_grad():
        for name, logits in zip(methods, alone, strict=True):
            with bank.using(name) as model:
                torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
        bank.remove("two")
        bank.add("two", tmp_path / "one.ckpt")
        with bank.using("two") as model:
            torch.testing.assert_close(model(IDS).logits, alone[0], rtol=1e-4, atol=1e-4)
        assert counters["stats"]["unique_graphs"] == 1
        bank.remove("two")
        bank.add("two", tmp_path / "two.ckpt")
        mixed(bank, ["one", "two", "three", None], input_ids=IDS)  # so that all three are in the layers
        for some, logits in zip(names, expected, strict=True):
            torch.testing.assert_close(mixed(bank, some, input_ids=IDS), logits, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_what_cannot_be_mixed_is_refused(tmp_path):
    build = bert(tmp_path / "bert")
    bank = bank_of(build, tmp_path)
    three = ls.SequenceClassification(str(tmp_path / "bert"), ls.LoRA(["query"], rank=2), num_labels=3)
    bank.add("three", save_checkpoint(three, tmp_path / "three.ckpt"))
    expected = mixed(bank, NAMES, input_ids=IDS)
    cases = [
        (["gated"] * 3, lambda model: model(IDS), r"batch has 4 rows, and rows\(…\) names adapters for 3"),
        (["gated"] * 2, lambda model: model(IDS), "batch has 4 rows, .* for 2"),
        (["gated", "other"], lambda model: model(IDS[:2]), "no adapter 'other'"),
        (["gated", "three"], lambda model: model(IDS[:2]), "head of 'three' has another number of outputs"),
        (NAMES, lambda _: bank.use("gated"), r"cannot be changed within rows"),
        (NAMES, lambda _: bank.remove("gated"), r"cannot be changed within rows"),
        (NAMES, lambda _: mixed(bank, NAMES, input_ids=IDS), r"cannot be changed within rows"),
        (NAMES, lambda model: model.bert.encoder(torch.ones(3, 2, 32)), "rows of a batch cannot be told apart"),
    ]
    for names, call, message in cases:
        with pytest.raises(ls.UsageError, match=message), bank.rows(names) as model:
            call(model)
        torch.testing.assert_close(mixed(bank, NAMES, input_ids=IDS), expected, rtol=0, atol=0)
    bank.model.train()
    with pytest.raises(ls.UsageError, match=r"call model.eval\(\)"), bank.rows(NAMES):
        pass


def test_experts_are_refused(tmp_path):
    options = {"num_key_value_heads": 4, "tie_word_embeddings": False}
    build = functools.partial(seeded, build_tiny, MixtralForCausalLM, **options)
    bank = bank_of(build, tmp_path, {"gated": ls.SoRA(rank=2, threshold=0.1)})
    with pytest.raises(ls.UsageError, match="'gated' adapts experts"), bank.rows(["gated"]):
        pass
