"""Compiled blocks: one set of graphs for all blocks, and one more for all numbers of ranks."""

import copy
from typing import Any

import pytest
import torch
from every_method import METHODS
from torch import nn
from torch._dynamo.utils import counters
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.adapters.compaction import shrink

LAYERS, RANK = 4, 16


@pytest.fixture(autouse=True)
def _fresh() -> Any:
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(force_parameter_static_shapes=True, recompile_limit=8):
        yield
    torch._dynamo.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def llama(**config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(vocab_size=30, pad_token_id=0, **sizes, **config)).train()


def bert(**config: Any) -> nn.Module:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return BertForSequenceClassification(BertConfig(vocab_size=30, **sizes, **config)).train()


def batch(rows: int = 2, tokens: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 30, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "use_cache": False}


def adapted(model: nn.Module, method: ls.SparseMethod) -> nn.Module:
    torch.manual_seed(0)
    ls.inject(model, method)
    for _, adapter in ls.adapters_in(model):
        nn.init.normal_(adapter.lora_B_t, std=0.1)
    return model


def loss_and_gradients(model: nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return {"loss": loss.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def kill(model: nn.Module, round_: int) -> None:
    """Leave 0, 1, 2 … ranks alive, another number in every layer."""
    for number, (_, adapter) in enumerate(ls.adapters_in(model)):
        with torch.no_grad():
            adapter.gate[max(0, (5 * number) % (RANK - 1) - 2 * round_) :] = 0


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_blocks_share_their_graphs_and_every_number_of_ranks_does(checkpointing: bool) -> None:
    model = adapted(llama(), ls.SoRA(rank=RANK, sparsity_weight=1.0))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    eager = copy.deepcopy(model)
    ls.compile_blocks(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(loss_and_gradients(model, **batch()), loss_and_gradients(eager, **batch()))
    at_first = 1 if checkpointing else 2  # else the input of the first block has no gradient
    assert graphs() == at_first
    for round_ in range(3):
        for each in (model, eager):
            kill(each, round_)
            ls.compact(each)
        ranks = {adapter.rank for _, adapter in ls.adapters_in(model)}
        assert min(ranks) == 2
        assert len(ranks) > 1
        assert min(adapter.rank for _, adapter in ls.adapters_in(eager)) < 2
        found, wanted = loss_and_gradients(model, **batch()), loss_and_gradients(eager, **batch())
        torch.testing.assert_close(found["loss"], wanted["loss"])
        assert graphs() == 2 * at_first, (
            "the graphs were compiled once more, with the ranks as variables, and never again"
        )
    assert not counters["graph_break"]


@pytest.mark.slow
def test_evaluation_and_other_lengths_have_graphs_of_their_own_which_are_kept() -> None:
    model = adapted(llama(), ls.SoRA(rank=RANK, sparsity_weight=1.0))
    ls.compile_blocks(model, backend="eager")
    seen = []
    for round_ in range(3):
        for tokens in (5, 6, 7):
            loss_and_gradients(model, **batch(tokens=tokens))
        model.eval()
        with torch.no_grad():
            model(**batch())
        model.train()
        kill(model, round_)
        ls.compact(model)
        seen.append(graphs())
    assert seen[2] == seen[1] <= 2 * seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(METHODS) - {"LoRA, GoRA", "LoRA, LoRA-GA"}))  # A and B of another start
@pytest.mark.filterwarnings("ignore")
def test_every_method_is_one_graph_in_all_steps(method: str) -> None:
    chosen = METHODS[method](rank=4)
    model = adapted(llama(), chosen)
    ls.compile_blocks(model, backend="eager", fullgraph=True)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, chosen, lr=0.02), lr=0.02)
    steps = ls.SparseSteps(chosen, model, optimizer, 10)
    for _ in range(10):
        model(**batch()).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"mode": "reduce-overhead", "dynamic": False}])
def test_the_compilers_numbers_are_those_of_the_eager_model_dropout_included(options: dict[str, Any]) -> None:
    model = adapted(bert(), ls.SoRA(rank=RANK, sparsity_weight=1.0, dropout=0.1))
    eager = copy.deepcopy(model)
    ls.compile_blocks(model, **options)
    inputs = {**batch(), "labels": torch.tensor([0, 1])}
    inputs.pop("use_cache")
    found, wanted = loss_and_gradients(model, **inputs), loss_and_gradients(eager, **inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    for each in (model, eager):
        kill(each, round_=0)
    ls.compact(model)
    found, wanted = loss_and_gradients(model, **inputs), loss_and_gradients(eager, **inputs)
    alike = {name: gradient for name, gradient in wanted.items() if gradient.shape == found[name].shape}
    assert {"loss", "classifier.weight"} < set(alike)
    torch.testing.assert_close({name: found[name] for name in alike}, alike, rtol=1e-4, atol=1e-6)
    assert not counters["graph_break"]


def test_a_model_that_is_loaded_with_fewer_ranks_has_them_as_variables() -> None:
    model = adapted(llama(), ls.SoRA(rank=RANK, sparsity_weight=1.0))
    ls.compile_blocks(model, backend="eager")
    for number, (_, adapter) in enumerate(ls.adapters_in(model)):
        shrink(adapter, 2 + number % 9)
    loss_and_gradients(model, **batch())
    assert graphs() == 2


def test_a_model_without_a_list_of_blocks_is_compiled_as_a_whole() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    ls.inject(net, ls.LoRA(["0"], rank=2, train_head=False))
    ls.compile_blocks(net, backend="eager")
    net(torch.ones(1, 4))
    assert graphs() == 1
    assert net._compiled_call_impl is not None


class Widening(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).relu()


class Stages(nn.Module):
    """Blocks of one class that cannot share a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(Widening(width) for width in range(2, 13))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


def test_more_than_the_eight_graphs_that_torch_allows() -> None:
    net = Stages()
    ls.inject(net, ls.LoRA(rank=2, train_head=False))
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        ls.compile_blocks(net, backend="eager")
        net(torch.ones(1, 2))
        assert torch._dynamo.config.recompile_limit > 8
    assert graphs() == len(net.stages)
