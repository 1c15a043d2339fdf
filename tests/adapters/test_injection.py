"""lit_sparse.adapters.injection on whole models, as a user calls it."""

import copy

import pytest
import torch
from backbones import build_tiny
from torch import nn
from transformers import (
    AlbertForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    RobertaForSequenceClassification,
    T5ForConditionalGeneration,
)

import lit_sparse
from lit_sparse.adapters.injection import adapters_in, disable_adapters, inject
from lit_sparse.adapters.linear import LowRankLinear
from lit_sparse.errors import UsageError
from lit_sparse.methods.gated_roselora import GatedRoseLoRA
from lit_sparse.methods.lora import LoRA
from lit_sparse.methods.roselora import RoseLoRA
from lit_sparse.methods.sora import SoRA

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
METHODS = [LoRA(), SoRA(threshold=0.1), RoseLoRA(), GatedRoseLoRA(threshold=0.1)]


def bert(**config) -> BertForSequenceClassification:
    return build_tiny(BertForSequenceClassification, **config)


def make_trained(model: nn.Module) -> None:
    """Move every adapter away from its start, as training would."""
    with torch.no_grad():
        for _, adapter in adapters_in(model):
            adapter.lora_B_t.normal_()


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_everything_is_frozen_but_adapters_and_head(method):
    model = bert()
    adapters = inject(model, method)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    parts = ["lora_A", "lora_B_t", *(["gate"] if method.gated else [])]
    assert trained == {f"{name}.{part}" for name in adapters for part in parts} | {
        "classifier.weight",
        "classifier.bias",
    }


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize(
    "model_class",
    [BertForSequenceClassification, AlbertForSequenceClassification, GPT2LMHeadModel, LlamaForCausalLM],
)
def test_the_model_starts_where_it_was(model_class, method):
    model = build_tiny(model_class).eval()
    expected = model(IDS).logits
    inject(model, method)
    assert torch.equal(model(IDS).logits, expected)


def test_adapters_are_returned_and_found_in_the_models_order():
    model = bert()
    order = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    adapters = inject(model, LoRA(["value", "query", "dense"]))
    assert list(adapters) == [n for n in order if n.endswith(("query", "value", "dense"))]
    assert [(n, id(a)) for n, a in adapters_in(model)] == [(n, id(a)) for n, a in adapters.items()]
    assert all(model.get_submodule(name) is adapter for name, adapter in adapters.items())


def test_the_public_name_is_this_function():
    model = bert()
    assert list(lit_sparse.inject(model, lit_sparse.LoRA(layers=[0]))) == [n for n, _ in lit_sparse.adapters_in(model)]


def test_a_forward_is_the_model_with_its_weights_changed():
    model = bert().eval()
    reference = copy.deepcopy(model)
    adapters = inject(model, SoRA(threshold=0.1))
    make_trained(model)
    with torch.no_grad():
        for name, adapter in adapters.items():
            reference.get_submodule(name).weight.add_(adapter.delta_weight())
    torch.testing.assert_close(model(IDS).logits, reference(IDS).logits)


def test_injecting_twice_is_an_error():
    model = bert()
    inject(model, LoRA(["query"]))
    message = (
        r"BertForSequenceClassification already holds 2 adapters, the first at "
        r"'bert.encoder.layer.0.attention.self.query'. Inject once, into a freshly loaded model."
    )
    with pytest.raises(UsageError, match=message):
        inject(model, LoRA(["value"]))


def test_a_refused_injection_leaves_the_model_as_it_was():
    model = bert()
    for method in (LoRA(["quer"]), LoRA(train_head=["nothing"])):
        with pytest.raises(UsageError):
            inject(model, method)
    assert all(p.requires_grad for p in model.parameters())
    assert not list(adapters_in(model))
    inject(model, LoRA())


def test_the_head_can_stay_frozen():
    model = bert()
    adapters = inject(model, LoRA(train_head=False))
    assert not any(p.requires_grad for p in model.classifier.parameters())
    assert "classifier" not in adapters


def test_a_head_that_is_not_trained_can_be_adapted():
    model = bert()
    assert list(inject(model, LoRA(["classifier"], train_head=False))) == ["classifier"]
    with pytest.raises(UsageError, match="matches only the task head of BertForSequenceClassification"):
        inject(bert(), LoRA(["classifier"]))


def test_modules_named_as_head_are_trained_whole_and_not_adapted():
    model = bert()
    adapters = inject(model, LoRA(train_head=["classifier", "bert.pooler"]))
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n}
    assert trained == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert "bert.pooler.dense" not in adapters
    assert len(adapters) == 12


@pytest.mark.parametrize("name", ["clasifier", ""])
def test_an_unknown_head_is_an_error(name):
    message = (
        rf"train_head \['{name}'\] are no modules of BertForSequenceClassification, whose parts are "
        r"\['bert', 'dropout', 'classifier'\]. Give full names, or true"
    )
    with pytest.raises(UsageError, match=message):
        inject(bert(), LoRA(train_head=["classifier", name]))


class Shared(nn.Module):
    """One layer under three names, two of them in one parent."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.Linear(4, 4)
        self.first, self.second = layer, layer
        self.inner = nn.Sequential(nn.Tanh(), layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.second(self.first(x)))


def test_a_shared_layer_gets_one_adapter_everywhere():
    model, x = Shared(), torch.randn(3, 4)
    adapters = inject(model, LoRA(rank=2))
    assert list(adapters) == ["first"]
    assert model.first is model.second is model.inner[1] is adapters["first"]
    assert isinstance(model.first.base, nn.Linear)
    assert [n for n, _ in adapters_in(model)] == ["first"]
    make_trained(model)

    reference = Shared()
    with torch.no_grad():
        reference.first.weight.copy_(model.first.weight + model.first.delta_weight())
        reference.first.bias.copy_(model.first.bias)
    torch.testing.assert_close(model(x), reference(x))


def test_a_layer_called_many_times_gets_one_adapter_whose_gradients_add_up():
    model = build_tiny(AlbertForSequenceClassification, num_hidden_layers=3).eval()
    adapters = inject(model, LoRA(["query"]))
    assert list(adapters) == ["albert.encoder.albert_layer_groups.0.albert_layers.0.attention.query"]
    make_trained(model)
    (adapter,) = adapters.values()
    calls = []
    adapter.register_forward_hook(lambda module, args, output: calls.append(output.shape))
    # The same three layers without sharing: one gradient each.
    reference = copy.deepcopy(model)
    group = reference.albert.encoder.albert_layer_groups
    for _ in range(2):
        group.append(copy.deepcopy(group[0]))
    reference.albert.encoder.config.num_hidden_groups = 3
    model(IDS).logits.square().sum().backward()
    reference(IDS).logits.square().sum().backward()
    assert len(calls) == 6  # three of the reference, whose hooks were copied
    gradients = [a.lora_A.grad for _, a in adapters_in(reference)]
    assert len(gradients) == 3
    torch.testing.assert_close(adapter.lora_A.grad, sum(gradients))


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_the_mode_of_the_layers_they_replace(training):
    model = bert().train(training)
    adapters = inject(model, LoRA(dropout=0.5))
    assert {adapter.training for adapter in adapters.values()} == {training}
    assert {adapter.dropout.training for adapter in adapters.values()} == {training}
    model.train(not training)
    assert {adapter.dropout.training for adapter in adapters.values()} == {not training}


def test_a_part_in_evaluation_mode_stays_in_it():
    model = bert().train()
    model.bert.encoder.layer[0].eval()
    adapters = inject(model, LoRA(["query"], dropout=0.5))
    assert [adapter.dropout.training for adapter in adapters.values()] == [False, True]


def test_disabled_adapters_give_exactly_the_frozen_model():
    model = build_tiny(GPT2LMHeadModel).eval()
    expected = model(IDS).logits
    inject(model, SoRA(threshold=0.1))
    make_trained(model)
    adapted = model(IDS).logits
    assert not torch.allclose(adapted, expected)
    with disable_adapters(model):
        assert torch.equal(model(IDS).logits, expected)
        with disable_adapters(model):
            assert torch.equal(model(IDS).logits, expected)
        assert torch.equal(model(IDS).logits, expected)
    assert torch.equal(model(IDS).logits, adapted)


def test_adapters_come_back_after_an_exception():
    model = bert()
    inject(model, LoRA())

    def fail():
        with disable_adapters(model):
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    assert all(adapter.enabled for _, adapter in adapters_in(model))


def test_an_adapter_that_was_off_stays_off():
    model = bert()
    first, *rest = inject(model, LoRA()).values()
    first.enabled = False
    with disable_adapters(model):
        assert not any(adapter.enabled for _, adapter in adapters_in(model))
    assert not first.enabled
    assert all(adapter.enabled for adapter in rest)


def test_there_must_be_adapters_to_disable():
    message = r"BertForSequenceClassification holds no adapter to disable. Inject a method first."
    with pytest.raises(UsageError, match=message), disable_adapters(bert()):
        pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("feed_forward", ["relu", "gated-gelu"])
def test_t5_asks_its_layers_for_their_weight(dtype, feed_forward):
    """The feed-forward layer of T5 reads ``wo.weight.dtype``, which half-precision loading leaves at float32."""
    model = build_tiny(T5ForConditionalGeneration, feed_forward_proj=feed_forward).to(dtype).eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    model.requires_grad_(False)  # or PyTorch picks another kernel, with other roundings
    expected = model(IDS, labels=IDS).logits
    adapters = inject(model, LoRA())
    assert torch.equal(model(IDS, labels=IDS).logits, expected)
    model(IDS, labels=IDS).loss.backward()
    assert all(adapter.lora_B_t.grad.any() for adapter in adapters.values())
    assert "lm_head" not in adapters


def test_an_adapted_output_layer_leaves_the_embedding_alone():
    model = build_tiny(LlamaForCausalLM, tie_word_embeddings=False).eval()
    embedding = model.get_input_embeddings().weight
    before, expected = embedding.clone(), model(IDS).logits
    adapters = inject(model, LoRA(["lm_head"]))
    assert list(adapters) == ["lm_head"]
    assert not embedding.requires_grad
    assert torch.equal(model(IDS).logits, expected)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(embedding, before)
    assert not torch.allclose(model(IDS).logits, expected)
    assert model.generate(IDS[:1], max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize(
    ("target", "other"),
    [("lm_head", "model.embed_tokens"), ("model.embed_tokens", "lm_head")],
    ids=["head", "embedding"],
)
def test_a_layer_that_shares_its_weight_is_refused(target, other):
    model = build_tiny(LlamaForCausalLM, tie_word_embeddings=True)
    with pytest.raises(
        UsageError, match=rf"{target}.*, which shares its weight with '{other}', so that merging would change both"
    ):
        inject(model, LoRA([target]))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model = build_tiny(LlamaForCausalLM).train()
    adapters = inject(model, SoRA(threshold=0.1))
    make_trained(model)
    parameters = [p for a in adapters.values() for p in (a.lora_A, a.lora_B_t, a.gate)]
    model(IDS, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in parameters]
    model.zero_grad()
    # The second is the name that older releases of transformers know.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model(IDS, labels=IDS).loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_head_of_two_layers_is_trained_in_full():
    model = build_tiny(RobertaForSequenceClassification)
    inject(model, LoRA(["query"]))
    model(IDS, labels=torch.tensor([0, 1])).loss.backward()
    for layer in (model.classifier.dense, model.classifier.out_proj):
        assert layer.weight.grad.any()
        assert not isinstance(layer, LowRankLinear)


def test_an_encoder_within_an_own_module_is_adapted_alone():
    model = nn.ModuleDict({"encoder": build_tiny(BertModel), "out": nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 2))})
    adapters = inject(model, LoRA())
    assert len(adapters) == 13
    assert all(name.startswith("encoder.") for name in adapters)
    assert all(p.requires_grad for p in model["out"].parameters())
