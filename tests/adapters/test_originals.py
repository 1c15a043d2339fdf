"""The pretrained model under the trained one: as a reference, after unload, after unmerge; bit for bit."""

import copy
import io

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import build_tiny
from torch import Tensor, nn
from trained import METHODS, SORA, as_trained, logits
from transformers import (
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
)

import lit_sparse as ls
from lit_sparse.adapters.token_rows import TokenRows, train_rows
from lit_sparse.errors import UsageError

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
by_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def mixtral():
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    return model.eval() if model.set_experts_implementation("eager") is None else model


def state(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def require_same_bits(model, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype, name
        assert _bits(tensor) == _bits(before[name]), name


class Normed(nn.Module):
    """A head of its own with a buffer that training moves, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = build_tiny(BertModel)
        self.head = nn.Sequential(nn.BatchNorm1d(32), nn.Linear(32, 2))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.encoder(input_ids).pooler_output) * self.temperature


# disable_adapters.


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [BertForSequenceClassification, RobertaForSequenceClassification])
def test_without_adapters_and_head_the_model_is_the_pretrained_one(kind, dtype, method):
    model = build_tiny(kind).to(dtype).eval()
    expected = logits(model, IDS)
    as_trained(model, method)
    adapted = logits(model, IDS)
    with ls.disable_adapters(model, head=False):
        assert not torch.equal(logits(model, IDS), expected)  # the head is trained
    with ls.disable_adapters(model):
        found = logits(model, IDS)
        assert found.dtype == dtype
        assert torch.equal(found, expected)
        with ls.disable_adapters(model, head=True):
            assert torch.equal(logits(model, IDS), expected)
        assert torch.equal(logits(model, IDS), expected)
    assert torch.equal(logits(model, IDS), adapted)


def test_buffers_and_bare_parameters_of_a_head_are_the_original_ones():
    model = Normed().eval()
    expected = model(IDS)
    ls.inject(model, ls.LoRA())
    model.train()(IDS)  # moves the running means
    with torch.no_grad():
        model.temperature.fill_(3.0)
    model.eval()
    with ls.disable_adapters(model, head=True):
        assert torch.equal(model(IDS), expected)
    assert not torch.equal(model(IDS), expected)


def test_a_module_that_is_trained_whole_is_original_under_all_its_names():
    model = build_tiny(LlamaForCausalLM, tie_word_embeddings=True).eval()
    expected = logits(model, IDS)
    ls.inject(model, ls.LoRA(["q_proj"], train_head=["lm_head"]))
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with ls.disable_adapters(model, head=True):
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(logits(model, IDS), expected)
    assert not torch.equal(logits(model, IDS), expected)


def test_a_reference_in_a_loss_leaves_gradients_and_optimizer_alone():
    def step(with_reference: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = build_tiny(BertForSequenceClassification).eval()
        ls.inject(model, ls.LoRA(["query"]))
        for _, adapter in ls.adapters_in(model):
            nn.init.ones_(adapter.lora_B_t)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.1)
        for _ in range(2):
            output = model(IDS, labels=torch.tensor([0, 1]))
            if with_reference:
                with ls.disable_adapters(model, head=True):
                    reference = model(IDS).logits
                assert not reference.requires_grad  # nothing of it is trained
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach().clone() for p in trained]

    assert all(torch.equal(a, b) for a, b in zip(step(True), step(False), strict=True))


@pytest.mark.parametrize(
    "made_of",
    [copy.deepcopy, lambda model: _pickled(model), lambda model: model.compile(backend="eager") or model],
    ids=["copied", "pickled", "compiled"],
)
def test_copies_know_the_original_too(made_of):
    model = build_tiny(BertForSequenceClassification).eval()
    expected = logits(model, IDS)
    model = made_of(as_trained(model))
    with ls.disable_adapters(model, head=True):
        torch.testing.assert_close(logits(model, IDS), expected, rtol=0, atol=0)


def test_no_state_holds_the_original_and_a_loaded_one_does_not_change_it():
    model = build_tiny(BertForSequenceClassification).eval()
    expected, plain = logits(model, IDS), set(model.state_dict())
    resumed = copy.deepcopy(model)
    as_trained(model)
    ls.inject(resumed, SORA)
    added = {f"{name}.{part}" for name, _ in ls.adapters_in(model) for part in ("lora_A", "lora_B_t", "gate")}
    assert {name.replace(".base.", ".") for name in model.state_dict()} - added == plain
    resumed.load_state_dict(model.state_dict())
    assert torch.equal(logits(resumed, IDS), logits(model, IDS))
    with ls.disable_adapters(resumed, head=True):
        assert torch.equal(logits(resumed, IDS), expected)


def test_what_was_unfrozen_later_has_no_original():
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.LoRA(["query"]))
    model.bert.pooler.requires_grad_(True)
    message = r"'bert.pooler.dense.bias', .* were frozen when the adapters were injected.*Name their modules"
    with pytest.raises(UsageError, match=message), ls.disable_adapters(model, head=True):
        pass
    with pytest.raises(UsageError, match=message):
        ls.unload(model)
    assert any(True for _ in ls.adapters_in(model))


def test_adapters_that_took_from_the_weights_leave_no_pretrained_model():
    model = build_tiny(BertForSequenceClassification)
    ls.inject(model, ls.LoRA(["query"], rank=2, init_weights="pissa"))
    for use in (lambda: ls.disable_adapters(model, head=True).__enter__(), lambda: ls.unload(model)):
        with pytest.raises(UsageError, match=r"'lora_ga'\), which are no longer the pretrained ones"):
            use()


def test_an_adapter_of_a_bank_sends_to_the_plain_backbone(tmp_path):
    ls.export_peft(as_trained(build_tiny(BertForSequenceClassification)), tmp_path / "lora")
    bank = ls.AdapterBank(build_tiny(BertForSequenceClassification).eval())
    expected = logits(bank.model, IDS)
    bank.add("own", tmp_path / "lora")
    bank.use("own")
    message = r"is not kept in it. For the plain backbone use the bank's using\(None\)"
    with pytest.raises(UsageError, match=message), ls.disable_adapters(bank.model, head=True):
        pass
    with bank.using(None):
        assert torch.equal(logits(bank.model, IDS), expected)


# unload.


@by_method
@pytest.mark.parametrize(
    "make",
    [
        lambda: build_tiny(BertForSequenceClassification),
        lambda: build_tiny(BertForSequenceClassification).to(torch.bfloat16),
        lambda: build_tiny(GPT2LMHeadModel),
        Normed,
        mixtral,
    ],
    ids=["bert", "bfloat16", "gpt2", "own", "experts"],
)
def test_unload_gives_the_model_back_bit_for_bit(make, method):
    model = make().eval()
    before, kinds = state(model), [type(m) for m in model.modules()]
    as_trained(model, method)
    assert ls.unload(model) is model
    require_same_bits(model, before)
    assert [type(m) for m in model.modules()] == kinds
    assert not any(m._forward_pre_hooks for m in model.modules())
    ls.inject(model, method)  # as into any plain model


def test_there_must_be_something_to_unload():
    with pytest.raises(UsageError, match="BertForSequenceClassification holds no adapter to unload"):
        ls.unload(build_tiny(BertForSequenceClassification))


@pytest.mark.parametrize("use", [ls.unload, ls.merge])
def test_what_is_switched_off_is_not_taken_out(use):
    model = build_tiny(BertForSequenceClassification)
    plain = state(model)
    as_trained(model)
    before = state(model)
    message = rf"switched off at \['bert.* more. Call {use.__name__} outside of disable_adapters"
    with ls.disable_adapters(model), pytest.raises(UsageError, match=message):
        use(model)
    require_same_bits(model, before)
    ls.unload(model)
    require_same_bits(model, plain)


@pytest.mark.parametrize("use", [ls.unload, ls.merge])
def test_rows_of_tokens_that_are_switched_off_are_not_taken_out(use):
    model = as_trained(build_tiny(LlamaForCausalLM), ls.RoseLoRA(["q_proj"], rank=2))
    train_rows(model, [64])
    model.get_input_embeddings().enabled = False
    with pytest.raises(UsageError, match=rf"\['model.embed_tokens'\]. Call {use.__name__} outside"):
        use(model)
    assert isinstance(model.get_input_embeddings(), TokenRows)


# merge(keep=True), unmerge.


@by_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "make",
    [lambda: build_tiny(BertForSequenceClassification), lambda: build_tiny(GPT2LMHeadModel), mixtral],
    ids=["bert", "gpt2", "experts"],
)
def test_unmerge_puts_every_bit_back(make, dtype, method):
    model = make().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[::7] = -0.0  # equals 0.0, with another bit
    as_trained(model, method)
    before, expected = state(model), logits(model, IDS)
    adapters = dict(ls.adapters_in(model))
    merged = ls.merge(model, keep=True)
    assert not any(True for _ in ls.adapters_in(merged))
    assert not any(torch.equal(a.weight, before[f"{n}.base.weight"]) for n, a in adapters.items() if _has_rank(a))
    model.train()
    again = ls.unmerge(model)
    model.eval()
    assert list(again) == list(adapters)
    assert all(again[name] is adapter for name, adapter in adapters.items())
    require_same_bits(model, before)
    assert torch.equal(logits(model, IDS), expected)


def test_a_copy_of_a_merged_model_can_be_unmerged():
    model = as_trained(build_tiny(BertForSequenceClassification))
    before = state(model)
    ls.merge(model, keep=True)
    for copied in (copy.deepcopy(model), _pickled(model)):
        ls.unmerge(copied)
        require_same_bits(copied, before)
    assert not any(True for _ in ls.adapters_in(model))


def test_a_sparse_adapter_keeps_its_support_and_no_more():
    model = build_tiny(LlamaForCausalLM, hidden_size=256, num_hidden_layers=1)
    as_trained(model, ls.RoseLoRA(["q_proj"], rank=1, density=0.02))
    whole = model.model.layers[0].self_attn.q_proj.base.weight.nbytes
    ls.merge(model, keep=True)
    (layer,) = [m for m in model.modules() if "_lit_sparse_merged" in vars(m)]
    kept = vars(layer)["_lit_sparse_merged"].weights["weight"]
    assert kept.values.numel() == 25  # 5 entries of A times 5 of B
    assert kept.values.nbytes + kept.indices.nbytes < whole / 100


def test_a_merged_model_is_saved_with_nothing_of_ours(tmp_path):
    model = as_trained(build_tiny(BertForSequenceClassification))
    expected = logits(model, IDS)
    ls.merge(model, keep=True)
    model.save_pretrained(tmp_path)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path)
    assert set(loaded.state_dict()) == set(build_tiny(BertForSequenceClassification).state_dict())
    torch.testing.assert_close(logits(loaded, IDS), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_unmerged_says_so():
    model = as_trained(build_tiny(BertForSequenceClassification))
    with pytest.raises(UsageError, match=r"holds nothing to unmerge: only merge\(model, keep=True\) keeps"):
        ls.unmerge(model)
    ls.merge(model, keep=True)
    model.to(torch.float16)
    with pytest.raises(UsageError, match=r"are torch.float16 and were torch.float32 when they were merged"):
        ls.unmerge(model)
    model.float()
    ls.inject(model, ls.LoRA())
    with pytest.raises(UsageError, match=r"holds adapters again since it was merged. Call unload\(model\) first."):
        ls.unmerge(model)


def test_a_second_merge_is_not_kept_beside_the_first():
    model = as_trained(build_tiny(BertForSequenceClassification))
    before = state(model)
    ls.merge(model, keep=True)
    merged = state(model)
    as_trained(model, ls.RoseLoRA(["query"], rank=2))
    second, expected = dict(ls.adapters_in(model)), state(model)
    with pytest.raises(UsageError, match=r"was merged with keep before, and only one merge can be undone. Call unload"):
        ls.merge(model, keep=True)
    assert dict(ls.adapters_in(model)) == second
    require_same_bits(model, expected)
    ls.unload(model)
    require_same_bits(model, merged)
    ls.unmerge(model)
    require_same_bits(model, before)


def test_a_second_merge_without_keep_gives_up_the_first():
    model = as_trained(build_tiny(BertForSequenceClassification))
    ls.merge(model, keep=True)
    as_trained(model, ls.RoseLoRA(["query"], rank=2))
    ls.merge(model)
    merged = state(model)
    with pytest.raises(UsageError, match=r"holds nothing to unmerge: .* and a later merge\(model\) gives them up"):
        ls.unmerge(model)
    require_same_bits(model, merged)
    assert not any(name.startswith("_lit_sparse") for module in model.modules() for name in vars(module))


def test_a_plain_merge_keeps_nothing():
    model = ls.merge(as_trained(build_tiny(BertForSequenceClassification)))
    assert not any(name.startswith("_lit_sparse") for module in model.modules() for name in vars(module))


def _has_rank(adapter) -> bool:
    return hasattr(adapter, "base") and bool(adapter.delta_weight().any())


def _bits(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy(force=True).tobytes()


def _pickled(model):
    torch.save(model, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)
