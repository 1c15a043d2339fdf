"""effective_gate and penalty: what a method of one's own adds to the forward pass and to the loss."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import lit_sparse as ls


@dataclass(eq=False, repr=False, kw_only=True)
class Squared(ls.SparseMethod):
    """Gates that are squares, halved in training, with a penalty on A."""

    gated = True
    weight: float = 0.5

    def effective_gate(self, gate: Tensor, training: bool) -> Tensor:
        return gate.square() / (2 if training else 1)

    def penalty(self, adapters) -> Tensor:
        return self.weight * sum(adapter.lora_A.square().sum() for adapter in adapters)


def injected(layer: nn.Module, **arguments) -> tuple[nn.Sequential, ls.LowRankAdapter]:
    torch.manual_seed(0)
    model = nn.Sequential(layer)
    (adapter,) = ls.inject(model, Squared(["0"], rank=3, train_head=False, **arguments)).values()
    with torch.no_grad():
        adapter.lora_B_t.normal_()
    return model, adapter


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), torch.randn(7, 5)),
    "convolution": (lambda: nn.Conv2d(2, 4, 3), torch.randn(2, 2, 6, 6)),
    "grouped convolution": (lambda: nn.Conv2d(2, 4, 3, groups=2), torch.randn(2, 2, 6, 6)),
    "embedding": (lambda: nn.Embedding(9, 4), torch.randint(9, (7,))),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [False, True])
def test_every_kind_of_layer_computes_with_the_effective_gate(kind: str, training: bool) -> None:
    make, x = LAYERS[kind]
    model, adapter = injected(make())
    model.train(training)
    found = model(x)
    added = found - adapter.base(x)
    found.square().sum().backward()
    gradient = adapter.gate.grad.clone()
    square = adapter.gate.detach().square()
    adapter.gate_function = None
    with torch.no_grad():
        adapter.gate.copy_(square / 2 if training else square)
    torch.testing.assert_close(model(x) - adapter.base(x), added)
    adapter.gate.grad = None
    model(x).square().sum().backward()
    root = square.sqrt()
    torch.testing.assert_close(gradient.abs(), (adapter.gate.grad * root * (1 if training else 2)).abs())


def test_merging_and_exports_use_the_gate_of_evaluation() -> None:
    model, adapter = injected(nn.Linear(5, 4))
    x = torch.randn(2, 5)
    expected = model.eval()(x)
    model.train()
    torch.testing.assert_close(ls.merge(model)(x), expected)
    assert adapter.effective_gate().equal(adapter.gate.square())  # type: ignore[union-attr]


@pytest.mark.parametrize("before", [True, False])
def test_the_gradient_of_the_penalty_is_added_once_per_step(before: bool) -> None:
    model, adapter = injected(nn.Linear(5, 4))
    method = Squared(["0"], rank=3, train_head=False)
    optimizer = torch.optim.SGD(ls.parameter_groups(model, method), lr=1.0)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=1)
    own = torch.zeros_like(adapter.lora_A)
    if before:
        model(torch.randn(2, 5)).sum().backward()
        own = adapter.lora_A.grad.clone()
    A = adapter.lora_A.detach().clone()
    steps.observe()
    torch.testing.assert_close(adapter.lora_A.grad, own + A)  # d(0.5 · A²) = A
    optimizer.step()
    torch.testing.assert_close(adapter.lora_A.detach(), -own)


def test_a_frozen_parameter_takes_no_penalty() -> None:
    model, adapter = injected(nn.Linear(5, 4))
    method = Squared(["0"], rank=3, train_head=False)
    adapter.lora_A.requires_grad_(False)
    optimizer = torch.optim.SGD([adapter.lora_B_t, adapter.gate], lr=1.0)
    steps = ls.SparseSteps(method, model, optimizer, total_steps=1)
    steps.observe()
    assert adapter.lora_A.grad is None


def test_a_model_with_computed_gates_starts_from_a_lora(tmp_path) -> None:
    from backbones import build_tiny
    from trained import as_trained
    from transformers import BertForSequenceClassification

    plain = build_tiny(BertForSequenceClassification)
    ls.export_peft(as_trained(build_tiny(BertForSequenceClassification), ls.LoRA(["query"], rank=2)), tmp_path / "lora")
    reference = build_tiny(BertForSequenceClassification)
    ls.load_peft(reference, tmp_path / "lora")
    ls.inject(plain, Squared(["query"], rank=2, alpha=4))
    ls.load_peft(plain, tmp_path / "lora")
    ids = torch.randint(5, 60, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, reference.eval()(ids).logits, rtol=1e-4, atol=1e-5)
