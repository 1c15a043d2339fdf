"""EVA's start against a dense SVD of all inputs and against PEFT's own, and what a run makes of it."""

import copy
import csv
import functools
import io
import math
import sys
from typing import Any

import lightning as L
import peft
import pytest
import torch
from architectures import ARCHITECTURES
from backbones import save_tiny_bert
from peft.tuners.lora.eva import initialize_lora_eva_weights
from peft.utils.incremental_pca import IncrementalPCA
from programs import launch
from programs import run as run_program
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lit_sparse as ls
from lit_sparse.functional import eva as eva_file
from lit_sparse.functional import explained_ranks

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def eva(targets: Any, **options: Any) -> ls.LoRA:
    return ls.LoRA(targets, **{"init_weights": "eva", "train_head": False, "rank": 4, **options})


class Net(nn.Module):
    """Two layers with the same input, and layers of other sizes behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.mid, self.last = (nn.Linear(*s) for s in ((20, 24), (20, 24), (24, 12), (12, 9)))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(4 * (self.query(x) + self.key(x)))
        return self.last(self.dropout(torch.tanh(3 * self.mid(hidden))))


NAMES = ["query", "key", "mid", "last"]


def batches(count: int, rows: int = 64) -> list[Tensor]:
    """Rows around a mean, along directions of which each is shorter than the one before."""
    return [torch.randn(rows, 20) * 0.6 ** torch.arange(20) + 0.3 for _ in range(count)]


def started(net: nn.Module, method: ls.SparseMethod, data: list[Any]) -> dict[str, Any]:
    ls.inject(net, method)
    ls.start_from_batches(net, method, data, net)
    return dict(ls.adapters_in(net))


def dense(net: nn.Module, data: list[Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """By one SVD of all inputs of each layer: shares of variance, components, and the inputs less their mean."""
    rows: dict[str, list[Tensor]] = {name: [] for name in NAMES}
    net = copy.deepcopy(net).eval()
    for name in NAMES:
        getattr(net, name).register_forward_pre_hook(lambda _, args, name=name: rows[name].append(args[0].detach()))
    for batch in data:
        net(batch)
    found = {}
    for name, parts in rows.items():
        inputs = torch.cat(parts).double()
        inputs = inputs - inputs.mean(0)
        _, values, vectors = torch.linalg.svd(inputs, full_matrices=False)
        found[name] = values.square() / values.square().sum(), vectors, inputs
    return found


def slow_ranks(shares: list[list[float]], most: list[int], budget: int) -> list[int]:
    """One rank after the other, each to the layer whose next component explains most."""
    ranks = [1] * len(shares)
    while sum(ranks) < budget:
        following = [s[r] if r < m else -math.inf for s, r, m in zip(shares, ranks, most, strict=True)]
        ranks[following.index(max(following))] += 1
    return ranks


def aligned(rows: Tensor, others: Tensor) -> Tensor:
    """|cosine| of each row with the same row of the other."""
    return nn.functional.cosine_similarity(rows.double(), others.double()).abs()


# The mathematics.


def test_ranks_by_hand_and_by_one_rank_after_the_other() -> None:
    assert explained_ranks([torch.tensor([0.5, 0.4, 0.1]), torch.tensor([0.3, 0.2, 0.2])], 4) == [2, 2]
    assert explained_ranks([torch.tensor([0.2, 0.2]), torch.tensor([0.2, 0.2])], 3) == [2, 1]  # the earlier layer
    assert explained_ranks([torch.tensor([0.6, 0.4]), torch.tensor([0.01, 0.0])], 3) == [2, 1]  # one for every layer
    shares = [torch.rand(size).sort(descending=True).values * scale for size, scale in ((6, 1.0), (9, 0.3), (4, 0.8))]
    for budget in range(3, 20):
        expected = slow_ranks([s.tolist() for s in shares], [6, 9, 4], budget)
        assert explained_ranks(shares, budget) == expected
        assert sum(expected) == budget


@pytest.mark.parametrize("rho", [1.0, 2.0, 3.0])
def test_components_and_ranks_are_those_of_a_dense_svd(rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva_file, "TAU", 2.0)  # nothing has converged before all batches are seen
    net, data = Net(), batches(6)
    reference = dense(net, data)
    outputs = net.eval()(data[0]).detach()
    overrides = {"mid": {"rank": 3}}
    most = [min(round(r * rho), *limits) for r, *limits in ((4, 20, 24), (4, 20, 24), (3, 24, 12), (4, 12, 9))]
    ranks = slow_ranks([reference[name][0].tolist() for name in NAMES], most, 4 + 4 + 3 + 4)
    adapters = started(net, eva(NAMES, overrides=overrides, eva_rho=rho, alpha=6), data)
    assert [adapter.rank for adapter in adapters.values()] == ranks
    assert ranks == [4, 4, 3, 4] if rho == 1 else len(set(ranks)) > 2
    for name, adapter in adapters.items():
        A = adapter.lora_A.detach()
        assert adapter.max_rank == len(A)
        shares, vectors, inputs = reference[name]
        assert aligned(A[:3], vectors[:3]).min() > 0.9999
        explained = (inputs @ A.double().mT).square().sum() / inputs.square().sum()
        assert 0.997 * shares[: len(A)].sum() < explained < shares[: len(A)].sum() + 1e-6  # no rows explain more
        torch.testing.assert_close(A @ A.mT, torch.eye(len(A)), atol=1e-5, rtol=0)
        assert adapter.scale == pytest.approx(6 / (3 if name == "mid" else 4))  # as before
        assert not adapter.lora_B_t.any()
    torch.testing.assert_close(net.eval()(data[0]), outputs)


def test_the_start_stops_when_components_have_converged_and_shares_equal_inputs(monkeypatch) -> None:
    fits: list[int] = []
    partial_fit = IncrementalPCA.partial_fit

    def counted(self: Any, rows: Tensor, *args: Any) -> Any:
        fits.append(id(self))
        return partial_fit(self, rows, *args)

    monkeypatch.setattr(IncrementalPCA, "partial_fit", counted)
    read = []

    def served() -> Any:
        for batch in batches(64):
            read.append(batch)
            yield batch

    net = Net()
    adapters = started(net, eva(NAMES), served())
    assert 2 < len(read) < 20
    assert len(set(fits)) == 3  # of four layers
    short = min(adapters["query"].rank, adapters["key"].rank)
    assert torch.equal(adapters["query"].lora_A[:short], adapters["key"].lora_A[:short])
    assert not torch.equal(adapters["mid"].lora_A[0, :20], adapters["key"].lora_A[0])


def test_small_batches_wait_until_they_are_enough() -> None:
    data = batches(4)
    whole = started(Net(), eva(["query"], start_batches=4), data)["query"].lora_A
    thin = [part for batch in data for part in batch.split(7)]  # fewer rows than the eight components
    parts = started(Net(), eva(["query"], start_batches=len(thin)), thin)["query"].lora_A
    assert aligned(whole, parts).min() > 0.98


def test_layers_with_one_input_have_limits_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eva_file, "TAU", 2.0)
    net, data, set_ranks = Net(), batches(4), {"query": {"rank": 1}, "mid": {"rank": 3}}
    shares = [share.tolist() for share, *_ in dense(net, data).values()]
    for rho, most in ((1.0, [1, 4, 3, 4]), (1.6, [2, 6, 5, 6]), (3.0, [3, 12, 9, 9])):
        adapters = started(copy.deepcopy(net), eva(NAMES, overrides=set_ranks, eva_rho=rho), data)
        ranks = [adapter.rank for adapter in adapters.values()]
        assert ranks == slow_ranks(shares, most, 12)
        assert rho == 3 or ranks[0] < ranks[1]
        shared = adapters["key"].lora_A[: ranks[0]]
        assert torch.equal(adapters["query"].lora_A, shared)


# PEFT's own.


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes))


def texts(count: int, rows: int = 8) -> list[dict[str, Tensor]]:
    """Padded rows, whose first three tokens are a prompt."""
    found = []
    for seed in range(count):
        ids = torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(seed)) ** 2 // 64
        mask = torch.ones_like(ids)
        mask[::2, 12:] = 0
        labels = torch.where(mask.bool(), ids, -100)
        labels[:, :3] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_starts_alike(rho: float, use_rslora: bool) -> None:
    ranks = {"o_proj": 3, "down_proj": 5}
    config = peft.LoraConfig(
        target_modules=LINEAR, r=4, lora_alpha=12, rank_pattern=ranks, use_rslora=use_rslora,
        init_lora_weights="eva", eva_config=peft.EvaConfig(rho=rho),
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config)
    initialize_lora_eva_weights(theirs, texts(64), show_progress_bar=False)
    overrides: Any = {name: {"rank": rank} for name, rank in ranks.items()}
    model, method = llama(), eva(LINEAR, alpha=12, overrides=overrides, eva_rho=rho, use_rslora=use_rslora)
    ls.inject(model, method)
    given = ls.start_from_batches(model, method, texts(64))
    assert sum(given.values()) == 2 * (5 * 4 + 3 + 5)
    assert len(set(given.values())) > 2
    for name, adapter in ls.adapters_in(model):
        layer = theirs.get_submodule(f"base_model.model.{name}")
        expected = layer.lora_A["default"].weight.detach()
        assert adapter.rank == len(expected) == given[name]
        assert aligned(adapter.lora_A.detach(), expected).min() > 1 - 1e-6
        if not use_rslora:  # there, PEFT scales the numerator by the rank, not by its root
            assert adapter.scale == pytest.approx(layer.scaling["default"])


# What the inputs are.


def test_padding_and_prompts_are_left_out() -> None:
    data = texts(4)
    found = []
    for filler in (1, 2):
        changed = [{**b, "input_ids": b["input_ids"].masked_fill(b["attention_mask"] == 0, filler)} for b in data]
        model = llama()
        method = eva(LINEAR, start_batches=4)
        ls.inject(model, method)
        ls.start_from_batches(model, method, changed)
        found.append({name: adapter.lora_A.detach() for name, adapter in ls.adapters_in(model)})
    for name, rows in found[0].items():
        torch.testing.assert_close(rows, found[1][name], atol=1e-5, rtol=0)


def test_batches_without_positions_are_named() -> None:
    model, method = llama(), eva(["q_proj", "down_proj"])
    ls.inject(model, method)
    data = [{**batch, "labels": torch.full_like(batch["labels"], -100)} for batch in texts(2)]
    with pytest.raises(ls.UsageError, match=r"The layers \['model.*\] had no inputs in 2 batches.* labels of -100"):
        ls.start_from_batches(model, method, data)


def test_dropout_is_off_and_modes_and_gradients_stay() -> None:
    net, data = Net().train(), batches(3)
    net.last.eval()
    other = copy.deepcopy(net).eval()
    adapters, quiet = (started(n, eva(NAMES, start_batches=3), data) for n in (net, other))
    assert torch.equal(adapters["last"].lora_A, quiet["last"].lora_A)
    assert (net.training, net.mid.training, net.last.training) == (True, True, False)
    assert all(p.grad is None for p in net.parameters())
    assert all(adapter.enabled and not adapter._forward_pre_hooks for adapter in adapters.values())


def test_compiled_blocks_start_alike() -> None:
    found = []
    for compiled in (False, True):
        model, method = llama(), eva(LINEAR, start_batches=4)
        ls.inject(model, method)
        if compiled:
            ls.compile_blocks(model, backend="eager")
        ls.start_from_batches(model, method, texts(4))
        found.append({name: adapter.lora_A.detach() for name, adapter in ls.adapters_in(model)})
    assert all(torch.equal(rows, found[1][name]) for name, rows in found[0].items())
    torch._dynamo.reset()


def test_a_quantized_layer_starts() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    net = nn.Sequential(nn.Linear(20, 8))
    torchao.quantize_(net, torchao.Int8WeightOnlyConfig())
    adapter = started(net, eva(["0"]), batches(3))["0"]
    torch.testing.assert_close(adapter.lora_A @ adapter.lora_A.mT, torch.eye(4), atol=1e-5, rtol=0)


# What is refused.


def test_arguments_and_layers() -> None:
    wrong: Any = {0.5: r"at least 1; got 0\.5", math.inf: "finite and at least 1; got inf", "2": "a number; got '2'"}
    for rho, message in wrong.items():
        with pytest.raises(ls.UsageError, match=f"eva_rho must be {message}"):
            ls.LoRA(eva_rho=rho)
    with pytest.raises(ls.UsageError, match="init_weights 'eva' is for gates of 1: set gate_init to 'ones'"):
        ls.SoRA(threshold=0.1, init_weights="eva")
    ls.SoRA(budget=0.5, init_weights="eva")
    net = nn.Sequential(nn.Embedding(5, 8), nn.Conv2d(1, 2, 1))
    for name, kind in (("0", "Embedding"), ("1", "Conv2d")):
        with pytest.raises(
            ls.UsageError, match=f"inputs of linear layers; '{name}' is not linear \\({kind}\\). Leave it out"
        ):
            ls.inject(net, eva([name]))
    experts = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    with pytest.raises(ls.UsageError, match=r"'model.layers.0.mlp.experts.down_proj' is not linear \(MixtralExperts\)"):
        ls.inject(experts, eva(["down_proj"]))


class Idle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(20, 20)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "There are no training batches to start from: init_weights 'eva' needs at least one"),
        ([torch.full((16, 20), math.nan)], "inputs of 'query' are not finite: init_weights 'eva' cannot start"),
        ([torch.ones(16, 20)], "The inputs of 'query' are all equal, and have no principal components"),
        (
            [torch.randn(5, 20)],
            r"'query' had 5 inputs in 1 batch, but init_weights 'eva' needs 8, rank times eva_rho\. Raise "
            r"start_batches or the batch size, lower rank or eva_rho, or leave the layer out \(exclude_modules\)",
        ),
        ([torch.randn(16, 20)], r"The layers \['unused'\] had no inputs in 1 batch, .*exclude_modules"),
    ],
)
def test_batches_from_which_nothing_can_start(data: list[Tensor], message: str) -> None:
    net, names = Idle(), ["query", "unused"] if "unused" in message else ["query"]
    method = eva(names)
    ls.inject(net, method)
    with pytest.raises(ls.UsageError, match=message):
        ls.start_from_batches(net, method, data, net)
    assert not method.has_started([adapter for _, adapter in ls.adapters_in(net)])


def test_a_start_is_taken_once_and_needed() -> None:
    net, method = Net(), eva(NAMES)
    ls.inject(net, method)
    optimizer = torch.optim.SGD(ls.parameter_groups(net, method), lr=0.1)
    with pytest.raises(ls.UsageError, match="init_weights is 'eva', but A and B are still those of LoRA"):
        ls.SparseSteps(method, net, optimizer, total_steps=3)
    ls.start_from_batches(net, method, batches(2), net)
    ls.SparseSteps(method, net, optimizer, total_steps=3)
    with pytest.raises(ls.UsageError, match="Net has no new adapters"):
        ls.start_from_batches(net, method, batches(2), net)


def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.utils.incremental_pca", None)
    net, method = Net(), eva(NAMES)
    ls.inject(net, method)
    with pytest.raises(ls.UsageError, match=r"init_weights 'eva' needs PEFT: pip install \"lit-sparse\[peft\]\""):
        ls.start_from_batches(net, method, batches(2), net)


@pytest.mark.parametrize("alpha", [None, 6])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_net_of_ones_own_resumes_with_the_overrides_of_its_adapters(alpha: Any, use_rslora: bool) -> None:
    options: Any = {"alpha": alpha, "use_rslora": use_rslora}
    net, data = Net().eval(), batches(3)
    fresh = copy.deepcopy(net)
    adapters = started(net, eva(NAMES, overrides={"mid": {"rank": 3}}, **options), data)
    assert len({adapter.rank for adapter in adapters.values()}) > 2
    for adapter in adapters.values():
        nn.init.normal_(adapter.lora_B_t)
    saved = {name: dict(adapter.overrides) for name, adapter in ls.adapters_in(net) if adapter.overrides}
    method = eva(NAMES, overrides=saved, **options)
    ls.inject(fresh, method)
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(data[0]), net(data[0]))
    ls.SparseSteps(method, fresh, torch.optim.SGD(ls.parameter_groups(fresh, method), lr=0.1), total_steps=3)


# Several processes.

ROUTED = """
import torch
from torch import nn


class Routed(nn.Module):
    "Two layers for some rows and one for others."

    def __init__(self):
        super().__init__()
        self.left, self.right, self.also_right = nn.Linear(20, 24), nn.Linear(20, 24), nn.Linear(20, 24)

    def forward(self, x):
        thin = x[x[:, 0] <= 0] * 0.5 ** torch.arange(20)
        for rows, layers in ((x[x[:, 0] > 0], [self.right, self.also_right]), (thin, [self.left])):
            if len(rows):
                [layer(rows) for layer in layers]
"""

SHARED = f"""{ROUTED}
from torch import distributed
import lit_sparse as ls

distributed.init_process_group("gloo")
rank = distributed.get_rank()
torch.manual_seed(0)
net = Routed()
data = [torch.randn(64, 20) * 0.6 ** torch.arange(20) for _ in range(3)]
method = ls.LoRA(["left", "right", "also_right"], rank=4, init_weights="eva", train_head=False)
ls.inject(net, method)
# Other layers, other numbers of rows, and one batch more in the first process.
data = [batch[batch[:, 0].argsort()] for batch in data]
own = [batch[:24] if rank == 0 else batch[24:] for batch in data[: 3 - rank]]
ls.start_from_batches(net, method, own, net)
torch.save({{name: adapter.lora_A.detach() for name, adapter in ls.adapters_in(net)}}, f"found_{{rank}}.pt")
"""


@pytest.mark.slow
def test_processes_with_unequal_batches_start_from_all_of_them() -> None:
    done = launch(2, ["-c", SHARED])
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(f"found_{rank}.pt") for rank in range(2))
    assert all(torch.equal(rows, second[name]) for name, rows in first.items())
    torch.manual_seed(0)
    made: dict[str, Any] = {"__name__": "routed"}
    exec(ROUTED, made)  # noqa: S102
    net = made["Routed"]()
    data = [torch.randn(64, 20) * 0.6 ** torch.arange(20) for _ in range(2)]
    alone = started(net, eva(["left", "right", "also_right"]), data)
    assert {len(rows) for rows in first.values()} != {4}
    for name, adapter in alone.items():
        torch.testing.assert_close(first[name], adapter.lora_A.detach(), atol=1e-4, rtol=0)


# Runs.


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


ROWS = [{"input_ids": (torch.arange(6) * (i % 7 + 1) + i) % 40 + 5, "labels": torch.tensor(i % 2)} for i in range(24)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run(
    backbone: Any, method: Any = None, epochs: int = 2, ckpt_path: Any = None, lr: float = 1e-2, **options: Any
) -> Any:
    L.seed_everything(2, verbose=False)
    module = ls.SequenceClassification(
        backbone,
        method or ls.LoRA(rank=4, init_weights="eva", start_batches=2),
        num_labels=2,
        optimizer=functools.partial(torch.optim.AdamW, lr=lr),
    )
    trainer = L.Trainer(**{**QUIET, "enable_checkpointing": False, "max_epochs": epochs, **options})
    trainer.fit(module, DataLoader(ROWS, batch_size=8), ckpt_path=ckpt_path)
    return module, trainer


class SaveAt(L.Callback):
    def __init__(self, step: int, path: Any) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module.eval()(input_ids=torch.stack([row["input_ids"] for row in ROWS])).logits


def test_a_resumed_run_ends_bit_for_bit_as_if_uninterrupted(bert, tmp_path):
    straight, _ = run(bert, callbacks=[SaveAt(3, tmp_path / "first.ckpt")])
    ranks = {name: adapter.max_rank for name, adapter in ls.adapters_in(straight)}
    assert len(set(ranks.values())) > 2
    assert sum(ranks.values()) == 4 * len(ranks)
    assert torch.load(tmp_path / "first.ckpt", weights_only=True)["lit_sparse"]["ranks"] == ranks
    resumed, trainer = run(bert, ckpt_path=str(tmp_path / "first.ckpt"))
    own = dict(resumed.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in straight.named_parameters())
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = ls.SequenceClassification.load_from_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(logits(loaded), logits(straight))


def test_a_run_that_is_resumed_before_b_has_moved_keeps_its_start(bert, tmp_path):
    """With a learning rate of 0 at the first step, as a warm-up has."""
    method = ls.LoRA(rank=4, init_weights="eva", start_batches=1)
    one, trainer = run(bert, method, lr=0.0, max_steps=1)
    trainer.save_checkpoint(tmp_path / "zero.ckpt")
    assert not any(adapter.lora_B_t.any() for _, adapter in ls.adapters_in(one))
    saved = {name: adapter.lora_A.clone() for name, adapter in ls.adapters_in(one)}
    other, _ = run(bert, method, ckpt_path=str(tmp_path / "zero.ckpt"), lr=0.0, max_steps=2)
    assert all(torch.equal(adapter.lora_A, saved[name]) for name, adapter in ls.adapters_in(other))


def test_gates_are_pruned_from_the_start_on_and_compacted_runs_load(bert, tmp_path):
    method = ls.SoRA(rank=4, budget=0.3, begin=0, end=2, init_weights="eva", start_batches=1, score="sensitivity")
    module, trainer = run(bert, method, epochs=3, callbacks=[ls.CompactRanks(every_n_steps=2)])
    assert any(adapter.rank < adapter.max_rank for _, adapter in ls.adapters_in(module))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    loaded = ls.SequenceClassification.load_from_checkpoint(tmp_path / "small.ckpt")
    assert torch.equal(logits(loaded), logits(module))


@pytest.mark.slow
def test_the_command_line_fits_and_exports_to_peft(tmp_path):
    save_tiny_bert(tmp_path / "bert")
    for split, count in (("train", 48), ("validation", 8)):
        table = io.StringIO()
        rows = [
            ("good film " * (i % 5 + 1), "yes") if i % 2 else ("bad one " * (i % 3 + 1), "no") for i in range(count)
        ]
        csv.writer(table).writerows([("text", "label"), *rows])
        (tmp_path / f"{split}.csv").write_text(table.getvalue())
    words = ["fit", "--model", "SequenceClassification", "--model.backbone", "bert", "--model.method", "LoRA"]
    words += ["--model.method.init_weights", "eva", "--model.method.rank", "4", "--model.method.start_batches", "2"]
    words += ["--data", "TextClassificationData", "--data.path", ".", "--data.batch_size", "16"]
    words += ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "2", "--trainer.logger", "false"]
    words += ["--trainer.callbacks", "SparseCheckpoint", "--trainer.callbacks.dirpath", "kept"]

    done, wrong = (run_program(["-m", "lit_sparse", *words, *more]) for more in ((), ("--model.method.eva_rho", "0.5")))
    assert done.returncode == 0, done.stderr[-3000:]
    assert wrong.returncode != 0
    assert "eva_rho must be at least 1; got 0.5" in wrong.stderr
    done = run_program(["-m", "lit_sparse", "export", "--ckpt_path", "kept/last.ckpt", "--output", "peft"])
    assert done.returncode == 0, done.stderr[-3000:]
    trained = ls.SequenceClassification.load_from_checkpoint("kept/last.ckpt").eval()
    assert len({adapter.max_rank for _, adapter in ls.adapters_in(trained)}) > 1
    found = ls.from_pretrained("peft")
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    with torch.no_grad():
        torch.testing.assert_close(found.model(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-5, rtol=0)
