"""GoRA's start against slow sums over entries and explicit projections, and what is refused."""

import math
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls
from lit_sparse.functional import allotted_ranks, compressed_gradient
from lit_sparse.methods.start import Start

GAMMA = 0.3


def gora(targets: Any, **options: Any) -> ls.LoRA:
    return ls.LoRA(targets, **{"init_weights": "gora", "gora_gamma": GAMMA, "train_head": False, "rank": 4, **options})


class Net(nn.Module):
    """Layers of different sizes and importance."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(30, 40), nn.Linear(40, 12), nn.Linear(12, 20)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(8, 30), torch.randn(8, 20)) for _ in range(count)]


def loss_of(net: nn.Module) -> Any:
    return lambda batch: nn.functional.mse_loss(net(batch[0]), batch[1])


def plain_gradients(net: nn.Module, data: list[Any], loss: Any) -> dict[str, Tensor]:
    """The mean gradient of every weight, by training the whole model."""
    net.requires_grad_(True)
    sum(loss(batch) for batch in data).div(len(data)).backward()
    found = {name: parameter.grad.double() for name, parameter in net.named_parameters()}
    net.requires_grad_(False)
    net.zero_grad()
    return found


def projected(matrix: Tensor, rows: Tensor) -> Tensor:
    """``matrix`` projected onto the span of ``rows``, by an orthonormal basis of it."""
    basis = torch.linalg.qr(rows.double().t()).Q
    return matrix.double() @ basis @ basis.t()


# The equations.


@pytest.mark.parametrize("use_rslora", [True, False])
def test_ranks_and_weights_follow_the_equations(use_rslora: bool) -> None:
    net, data = Net(), batches(3)
    gradients = plain_gradients(net, data, loss_of(net))
    weights = {name: getattr(net, name).weight.detach().clone() for name in ("first", "second", "third")}

    importance = {}
    for name, weight in weights.items():
        total = 0.0
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                total += abs(float(weight[i, j]) * float(gradients[f"{name}.weight"][i, j]))
        importance[name] = total / (weight.shape[0] * weight.shape[1])  # Eq. 5
    budget = sum(4 * math.sqrt(sum(weight.shape)) for weight in weights.values())
    expected = {}
    for name, weight in weights.items():
        share = importance[name] / sum(importance.values())
        rank = round(budget * share / math.sqrt(sum(weight.shape)))
        expected[name] = min(max(rank, 2), 16, *weight.shape)
    assert len(set(expected.values())) == 3  # neither all at a limit nor all alike

    method = gora(["first", "second", "third"], use_rslora=use_rslora, alpha=16)
    ls.inject(net, method)
    assert ls.start_from_batches(net, method, data, loss_of(net)) == expected
    for name, adapter in ls.adapters_in(net):
        rank, width = expected[name], adapter.in_features
        assert (adapter.rank, adapter.max_rank) == (rank, rank)
        assert adapter.scale == pytest.approx(16 / (math.sqrt(rank) if use_rslora else rank))
        if use_rslora:  # Eqs. 9 and 10, with the inverse written out
            A = adapter.lora_A.detach().double()
            xi = GAMMA * math.sqrt(width) / 16
            B = -xi * gradients[f"{name}.weight"] @ A.t() @ torch.linalg.inv(A @ A.t())
            torch.testing.assert_close(adapter.lora_B.detach().double(), B, rtol=1e-4, atol=1e-7)
        step = -GAMMA * math.sqrt(width / rank) * projected(gradients[f"{name}.weight"], adapter.lora_A.detach())
        torch.testing.assert_close(adapter.delta_weight().double(), step, rtol=1e-4, atol=1e-7)
        assert torch.equal(adapter.weight, weights[name])
        assert adapter.weight.grad is None
        assert not adapter.weight.requires_grad
        assert all(p.requires_grad for p in adapter.parameters(recurse=False))
        assert method.mismatch(adapter) is None


def test_the_start_has_the_size_of_the_gradient_and_lowers_the_loss() -> None:
    net = nn.Linear(400, 50)
    G = torch.randn(50, 400, dtype=torch.float64)
    sizes = []
    for rank, scale in ((2, 8.0), (16, 0.5)):
        A = torch.empty(rank, 400, dtype=torch.float64)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        sizes.append(float((scale * compressed_gradient(A, G, scale, GAMMA).t() @ A).norm() / G.norm()))
    assert sizes == pytest.approx([GAMMA, GAMMA], rel=0.2)

    net, data = Net(), batches(2)
    before = sum(loss_of(net)(batch) for batch in data)
    method = gora(["first", "second", "third"], gora_gamma=0.01)
    ls.inject(net, method)
    ls.start_from_batches(net, method, data, loss_of(net))
    assert sum(loss_of(net)(batch) for batch in data) < before


def test_ranks_by_hand() -> None:
    # b = 8 · (2 + 2 + 4) = 64; shares 1/2, 1/8, 3/8
    assert allotted_ranks([4.0, 1.0, 3.0], [2.0, 2.0, 4.0], [8, 8, 8], [99, 99, 99]) == [16, 4, 6]
    assert allotted_ranks([1.0, 0.0], [1.0, 1.0], [3, 3], [99, 99]) == [6, 2]  # half, rounded up
    assert allotted_ranks([9.0, 0.0, 0.0], [1.0, 1.0, 1.0], [8, 8, 8], [99, 99, 99]) == [24, 4, 4]
    assert allotted_ranks([9.0] + 9 * [0.0], 10 * [1.0], 10 * [8], 10 * [99])[0] == 32  # at most four times
    assert allotted_ranks([9.0, 0.0], [1.0, 1.0], [8, 8], [5, 3]) == [5, 3]


class Words(nn.Module):
    """An embedding, a convolution and a layer that stores its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.conv = nn.Conv2d(1, 4, (2, 3))
        self.out = Conv1D(5, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(self.conv(self.embed(ids).unsqueeze(1)).mean((2, 3)))


def test_embeddings_convolutions_and_transposed_weights() -> None:
    net, ids = Words(), torch.randint(0, 11, (8, 7))
    loss = lambda batch: net(batch).square().sum()  # noqa: E731
    gradients = plain_gradients(net, [ids], loss)
    method = gora(["embed", "conv", "out"], rank=2)
    ls.inject(net, method)
    ls.start_from_batches(net, method, [ids], loss)
    for name, matrix in (("embed", gradients["embed.weight"].t()), ("out", gradients["out.weight"].t())):
        adapter = dict(ls.adapters_in(net))[name]
        step = -GAMMA * math.sqrt(adapter.in_features / adapter.rank) * projected(matrix, adapter.lora_A.detach())
        torch.testing.assert_close(adapter.delta_weight().t().double(), step, rtol=1e-4, atol=1e-6)
    adapter = dict(ls.adapters_in(net))["conv"]
    step = -GAMMA * math.sqrt(6 / adapter.rank) * projected(gradients["conv.weight"].flatten(1), adapter.lora_A)
    torch.testing.assert_close(adapter.delta_weight().flatten(1).double(), step, rtol=1e-4, atol=1e-6)


def test_experts_share_a_rank_and_start_each_from_its_own_gradient() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    ids = torch.randint(5, 60, (2, 12))
    gradients = plain_gradients(model, [ids], lambda batch: model(batch, labels=batch).loss)
    method = gora(["gate_up_proj", "down_proj"], rank=2)
    adapters = ls.inject(model, method)
    ranks = ls.start_from_batches(model, method, [{"input_ids": ids, "labels": ids}])
    importances = [
        float((adapter.weight.double() * gradients[name]).abs().mean()) * adapter.copies
        for name, adapter in adapters.items()
    ]
    units = [a.copies * math.sqrt(a.in_features + a.out_features) for a in adapters.values()]
    assert list(ranks.values()) == allotted_ranks(importances, units, [2] * len(units), [99] * len(units))
    for name, adapter in adapters.items():
        for own, rows, matrix in zip(
            adapter.delta_weight(), adapter.lora_A.detach().split(adapter.rank), gradients[name], strict=True
        ):
            step = -GAMMA * math.sqrt(adapter.in_features / adapter.rank) * projected(matrix, rows)
            torch.testing.assert_close(own.double(), step, rtol=1e-3, atol=1e-7)


# In a loop of one's own.


def test_gated_ranks_train_on_from_the_start() -> None:
    net, data = Net(), batches(2)
    method = ls.SoRA(
        ["first", "second", "third"], rank=4, budget=0.5, begin=0, end=3, train_head=False, init_weights="gora",
        score="sensitivity", overrides={"third": {"rank": 6}},
    )  # fmt: skip
    ls.inject(net, method)
    kept = loss_of(net)(data[0])  # a graph through parameters of the old shapes
    ranks = ls.start_from_batches(net, method, data, loss_of(net))
    assert len(set(ranks.values())) > 1
    optimizer = torch.optim.AdamW(ls.parameter_groups(net, method), lr=1e-2)
    steps = ls.SparseSteps(method, net, optimizer, total_steps=5)
    for batch in 2 * data:
        loss_of(net)(batch).backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    steps.finish()
    adapters = dict(ls.adapters_in(net))
    dense = sum(ranks[name] * (a.in_features + a.out_features) for name, a in adapters.items())
    held = sum(int(a.gate.count_nonzero()) * (a.in_features + a.out_features) for a in adapters.values())
    assert 0.3 * dense < held <= 0.5 * dense
    del kept


def test_only_the_first_batches_are_read() -> None:
    net, read = Net(), []
    method = gora(["first"], start_batches=2)
    ls.inject(net, method)

    def served() -> Any:
        for batch in batches(5):
            read.append(batch)
            yield batch

    ls.start_from_batches(net, method, served(), loss_of(net))
    assert len(read) == 2


def test_what_is_refused() -> None:
    net, data = Net(), batches(1)
    method = gora(["first", "second"])
    with pytest.raises(ls.UsageError, match="Net has no new adapters"):
        ls.start_from_batches(net, method, data, loss_of(net))
    ls.inject(net, method)
    with pytest.raises(
        ls.UsageError, match=r"is for init_weights 'gora', 'lora_ga' and 'eva', .* LoRA\(.*starts without batches"
    ):
        ls.start_from_batches(net, ls.LoRA(), data, loss_of(net))
    with pytest.raises(ls.UsageError, match="There are no training batches to start from"):
        ls.start_from_batches(net, method, [], loss_of(net))
    for factor in (0.0, math.nan):
        with pytest.raises(ls.UsageError, match="are not finite, or all are zero"):
            ls.start_from_batches(net, method, data, lambda batch, f=factor: f * loss_of(net)(batch))
    optimizer = torch.optim.SGD(ls.parameter_groups(net, method), lr=0.1)
    with pytest.raises(ls.UsageError, match=r"A and B are still those of LoRA.*call lit_sparse\.start_from_batches"):
        ls.SparseSteps(method, net, optimizer, total_steps=3)
    ls.start_from_batches(net, method, data, loss_of(net))
    ls.SparseSteps(method, net, optimizer, total_steps=3)
    with pytest.raises(ls.UsageError, match="has no new adapters"):
        ls.start_from_batches(net, method, data, loss_of(net))


@pytest.mark.parametrize(("start", "source"), [("pissa", "singular vectors"), ("gora", "gradient")])
def test_a_quantized_weight_is_refused(start: Any, source: str) -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    net[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ls.UsageError, match=f"starts from the {source} of the frozen weight; that of '0' is quantized"):
        ls.inject(net, ls.LoRA(["0"], rank=2, init_weights=start))


def test_arguments() -> None:
    with pytest.raises(ls.UsageError, match="init_weights 'gora' is for gates of 1: set gate_init to 'ones'"):
        ls.SoRA(threshold=0.1, init_weights="gora")
    ls.SoRA(threshold=0.1, init_weights="gora", gate_init="ones")
    with pytest.raises(ls.UsageError, match="start_batches must be at least 1; got 0"):
        ls.LoRA(start_batches=0)
    with pytest.raises(ls.UsageError, match="gora_gamma must be above 0; got 0"):
        ls.SoRA(budget=0.5, gora_gamma=0.0)
    assert issubclass(ls.LoRA, Start)
