"""LoRA-GA's start against eigenvectors of GGᵀ and the best approximation of G, and what a run makes of it."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from architectures import ARCHITECTURES
from backbones import save_tiny_bert
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

import lit_sparse as ls
from lit_sparse.functional import gradient_factors
from lit_sparse.methods.start import Start
from lit_sparse.serving.from_checkpoint import export_checkpoint

GAMMA = 2.0


def lora_ga(targets: Any, **options: Any) -> ls.LoRA:
    given = {"init_weights": "lora_ga", "lora_ga_gamma": GAMMA, "train_head": False, "rank": 3, "alpha": 12, **options}
    return ls.LoRA(targets, **given)


def top(matrix: Tensor, count: int) -> Tensor:
    """Eigenvectors of a symmetric matrix by power iteration, one after the other: largest eigenvalues first."""
    found: list[Tensor] = []
    for _ in range(count):
        vector = torch.ones(len(matrix), dtype=matrix.dtype) + torch.arange(len(matrix)) / 7
        for _ in range(3000):
            vector = matrix @ vector
            for other in found:
                vector = vector - (vector @ other) * other
            vector = vector / vector.norm()
        found.append(vector)
    return torch.stack(found)


def gradient_with(values: list[float], rows: int = 8, columns: int = 10) -> Tensor:
    """A matrix with these singular values."""
    left = torch.linalg.qr(torch.randn(rows, len(values), dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(values), dtype=torch.float64)).Q
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right.mT


def test_the_factors_are_the_singular_vectors_that_the_algorithm_names() -> None:
    G = gradient_with([9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    A, B_t = gradient_factors(G, 3, GAMMA)
    size = 8**0.25 / GAMMA**0.5
    right, left = top(G.mT @ G, 3), top(G @ G.mT, 6)[3:]
    for rows, vectors in ((A, right), (B_t, left)):
        torch.testing.assert_close(
            (rows @ vectors.mT).abs(), size * torch.eye(3, dtype=torch.float64), atol=1e-6, rtol=0
        )


def test_the_first_step_is_the_nearest_to_one_of_full_fine_tuning() -> None:
    """A step changes BA by multiples of G AᵀA + B Bᵀ G, of rank 2r; none of that rank is nearer to G."""
    G = gradient_with([9.0, 7.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    A, B_t = gradient_factors(G, 2, GAMMA)
    step = (G @ A.mT @ A + B_t.mT @ B_t @ G) / (8**0.5 / GAMMA)
    left = top(G @ G.mT, 4)
    torch.testing.assert_close(step, left.mT @ left @ G, atol=1e-6, rtol=0)


class Words(nn.Module):
    """An embedding, a convolution, a layer that stores its weight transposed, and a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8, padding_idx=0)
        self.conv = nn.Conv2d(1, 6, (2, 5))
        self.turned, self.out = Conv1D(9, 6), nn.Linear(9, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.turned(self.conv(self.embed(ids).unsqueeze(1)).mean((2, 3)))))


IDS = torch.arange(56).view(8, 7) % 11


def test_every_kind_of_layer_computes_what_it_did() -> None:
    net = Words()
    loss = lambda batch: net(batch).square().sum()  # noqa: E731
    before = {name: layer.weight.detach().clone() for name, layer in net.named_children()}
    outputs = net(IDS).detach()
    net.requires_grad_(True)
    loss(IDS).backward()
    gradients = {name: layer.weight.grad.clone() for name, layer in net.named_children()}
    net.zero_grad()
    method = lora_ga(["embed", "conv", "turned", "out"])
    ls.inject(net, method)
    assert ls.start_from_batches(net, method, [IDS], loss) == {"embed": 3, "conv": 3, "turned": 3, "out": 3}
    torch.testing.assert_close(net(IDS), outputs, atol=1e-5, rtol=1e-5)
    for name, adapter in ls.adapters_in(net):
        torch.testing.assert_close(adapter.weight + adapter.delta_weight(), before[name], atol=1e-6, rtol=1e-6)
        A, B_t = gradient_factors(adapter._as_matrix(gradients[name]).reshape(adapter.out_features, -1), 3, GAMMA)
        assert float(adapter.delta_weight().norm()) == pytest.approx(float(4 * (B_t.mT @ A).norm()), rel=1e-3)
        assert adapter.took_from_weight
        assert not adapter.weight.requires_grad
        assert adapter.weight.grad is None


def test_experts_start_each_from_its_own_gradient() -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Mixtral").build()
    ids = torch.randint(5, 60, (2, 12))
    with torch.no_grad():
        outputs = model(ids).logits
    method = lora_ga(["gate_up_proj", "down_proj"], rank=2)
    adapters = ls.inject(model, method)
    ls.start_from_batches(model, method, [{"input_ids": ids, "labels": ids}])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, outputs, atol=1e-4, rtol=1e-4)
    for adapter in adapters.values():
        rows = adapter.lora_A.detach().view(adapter.copies, adapter.rank, -1)
        size = adapter.out_features**0.5 / GAMMA
        torch.testing.assert_close(rows @ rows.mT, (size * torch.eye(2)).expand(adapter.copies, 2, 2))


# Runs.


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


ROWS = [{"input_ids": torch.arange(5, 11) + i, "labels": torch.tensor(i % 2)} for i in range(24)]
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}


def run(backbone: Any, method: Any = None, epochs: int = 2, ckpt_path: Any = None, **options: Any) -> Any:
    L.seed_everything(2, verbose=False)
    module = ls.SequenceClassification(
        backbone,
        method or lora_ga("all-linear", rank=2, layers=[0, 1], start_batches=2),
        num_labels=2,
        optimizer=functools.partial(torch.optim.AdamW, lr=1e-2),
    )
    trainer = L.Trainer(**{**QUIET, "enable_checkpointing": False, "max_epochs": epochs, **options})
    trainer.fit(module, DataLoader(ROWS, batch_size=8), ckpt_path=ckpt_path)
    return module, trainer


def logits(module: Any) -> Tensor:
    with torch.no_grad():
        return module.eval()(input_ids=torch.stack([row["input_ids"] for row in ROWS])).logits


def test_a_resumed_run_ends_bit_for_bit_as_if_uninterrupted(bert, tmp_path):
    class SaveAt(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:  # the end of an epoch, for the loader keeps no place
                trainer.save_checkpoint(tmp_path / "first.ckpt")

    straight, _ = run(bert, callbacks=[SaveAt()])
    resumed, trainer = run(bert, ckpt_path=str(tmp_path / "first.ckpt"))
    own = dict(resumed.named_parameters())
    assert all(torch.equal(value, own[name]) for name, value in straight.named_parameters())  # the frozen ones too
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    loaded = ls.SequenceClassification.load_from_checkpoint(tmp_path / "end.ckpt")
    assert torch.equal(logits(loaded), logits(straight))
    trainer.fit(resumed, DataLoader(ROWS, batch_size=8), ckpt_path=str(tmp_path / "end.ckpt"))  # the same module again


def test_a_module_that_took_another_start_loads_no_checkpoint(bert, tmp_path):
    """Its frozen weights are not those of the checkpoint's run."""
    _, trainer = run(bert, epochs=1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    other, trainer = run(bert, lora_ga("all-linear", rank=2, layers=[0, 1], start_batches=1), epochs=1)
    rows = DataLoader(ROWS, batch_size=8)
    with pytest.raises(ls.UsageError, match=r"the start of another run of LoRA-GA, the first at .*new module"):
        trainer.validate(other, rows, ckpt_path=str(tmp_path / "one.ckpt"), verbose=False)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    trainer.validate(other, rows, ckpt_path=str(tmp_path / "two.ckpt"), verbose=False)
    _, trainer = run(bert, lora_ga("all-linear", rank=2, layers=[0, 1], init_weights="lora"), epochs=1)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ls.UsageError, match="gave up the start of another run of LoRA-GA"):
        trainer.validate(other, rows, ckpt_path=str(tmp_path / "plain.ckpt"), verbose=False)


def test_only_merged_models_are_exported(bert, tmp_path, capsys):
    module, trainer = run(bert, callbacks=[ls.SparseCheckpoint(str(tmp_path))], enable_checkpointing=True)
    assert "--format merged" in capsys.readouterr().out
    trainer.save_checkpoint(tmp_path / "end.ckpt")
    with pytest.raises(ls.UsageError, match="would only fit the changed ones"):
        export_checkpoint(str(tmp_path / "end.ckpt"), str(tmp_path / "peft"))
    export_checkpoint(str(tmp_path / "end.ckpt"), str(tmp_path / "merged"), format="merged")
    merged = type(module.model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        found = merged(input_ids=torch.stack([row["input_ids"] for row in ROWS])).logits
    torch.testing.assert_close(found, logits(module), atol=1e-5, rtol=1e-5)


def test_a_pruned_and_compacted_run_loads(bert, tmp_path):
    method = ls.SoRA(rank=4, budget=0.3, begin=0, end=2, init_weights="lora_ga", start_batches=1)
    module, trainer = run(bert, method, epochs=3, callbacks=[ls.CompactRanks(every_n_steps=2)])
    assert any(adapter.rank < adapter.max_rank for _, adapter in ls.adapters_in(module))
    trainer.save_checkpoint(tmp_path / "small.ckpt")
    loaded = ls.SequenceClassification.load_from_checkpoint(tmp_path / "small.ckpt")
    assert torch.equal(logits(loaded), logits(module))


def test_what_is_refused(bert) -> None:
    net = Words()
    method = lora_ga(["out"])
    ls.inject(net, method)
    with pytest.raises(
        ls.UsageError, match=r"'lora_ga' with rank 4 needs 8 singular values; the weight of 'conv'.*has 6"
    ):
        ls.inject(Words(), lora_ga(["conv"], rank=4))
    with pytest.raises(ls.UsageError, match="lora_ga_gamma must be above 0; got 0"):
        ls.LoRA(lora_ga_gamma=0.0)
    optimizer = torch.optim.SGD(ls.parameter_groups(net, method), lr=0.1)
    with pytest.raises(ls.UsageError, match="init_weights is 'lora_ga', but A and B are still those of LoRA"):
        ls.SparseSteps(method, net, optimizer, total_steps=3)
    module, _ = run(bert)
    with pytest.raises(ls.UsageError, match="no longer the pretrained ones"), ls.disable_adapters(module):
        pass
    with pytest.raises(ls.UsageError, match="truncation would cut what belongs to the weights"):
        ls.truncate(module, budget=0.5)
    assert issubclass(ls.LoRA, Start)
