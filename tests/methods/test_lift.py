"""lit_sparse.LIFT: the entries that are largest in the rank-reduced weight, chosen once or anew, against numpy."""

import numpy as np
import pytest
import torch
from backbones import build_tiny
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import BertForSequenceClassification

import lit_sparse as ls

IDS = torch.randint(5, 60, (24, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids[:, 0] % 2} for ids in IDS.split(4)]


def model_of():
    torch.manual_seed(0)
    return build_tiny(BertForSequenceClassification).eval()


def principal(weight, rank, count):
    """The places of the largest entries of the rank-reduced weight, by the paper's definition in float64."""
    left, values, right = np.linalg.svd(weight.astype(np.float64), full_matrices=False)
    reduced = sum(values[k] * np.outer(left[:, k], right[k]) for k in range(min(rank, len(values))))
    return np.sort(np.argsort(-np.abs(reduced).ravel(), kind="stable")[:count])


@pytest.mark.parametrize("rank", [1, 5, 128])
def test_the_entries_are_those_of_the_paper(rank):
    adapters = ls.inject(model_of(), ls.LIFT(changed=0.1, filter_rank=rank))
    for adapter in adapters.values():
        weight = adapter.base.weight.detach().numpy()
        expected = principal(weight, rank, int(0.1 * weight.size))
        assert np.array_equal(adapter.indices.numpy(), expected)
    whole = ls.inject(model_of(), ls.SHiRA(changed=0.1))
    same = all(torch.equal(whole[name].indices, adapter.indices) for name, adapter in adapters.items())
    assert same == (rank == 128)  # no entry of the plain weight is larger once nothing is left out


class Reference:
    """A dense weight, its mask, and Adam's averages, all as numpy arrays: chosen anew every few steps."""

    def __init__(self, adapter, rank, every):
        self.frozen = adapter.base.weight.detach().numpy().astype(np.float64)
        self.rank, self.every, self.count = rank, every, adapter.size
        self.change, self.first, self.second = (np.zeros(self.frozen.size) for _ in range(3))
        self.places = principal(self.frozen, rank, self.count)

    def step(self, gradient, index, total, lr):
        kept = np.zeros(self.frozen.size, bool)
        kept[self.places] = True
        gradient = np.where(kept, gradient.ravel(), 0)
        self.first = np.where(kept, 0.9 * self.first + 0.1 * gradient, 0)
        self.second = np.where(kept, 0.999 * self.second + 0.001 * gradient**2, 0)
        step = self.first / (1 - 0.9**index) / (np.sqrt(self.second / (1 - 0.999**index)) + 1e-8)
        self.change = np.where(kept, self.change - lr * step, 0)
        if index % self.every == 0 and index != total:
            weight = self.frozen + self.change.reshape(self.frozen.shape)
            self.places = principal(weight, self.rank, self.count)
            kept = np.zeros(self.frozen.size, bool)
            kept[self.places] = True
            self.change, self.first, self.second = (
                np.where(kept, x, 0) for x in (self.change, self.first, self.second)
            )


def test_entries_are_chosen_anew_and_take_their_averages_along():
    method, total, lr = ls.LIFT(changed=0.1, filter_rank=3, update_every=2, train_head=False), len(BATCHES), 0.05
    model = model_of().double()
    adapters = ls.inject(model, method)
    before = {name: adapter.indices.clone() for name, adapter in adapters.items()}
    references = {name: Reference(adapter, 3, 2) for name, adapter in adapters.items()}
    optimizer = torch.optim.Adam(ls.parameter_groups(model, method), lr=lr)
    steps = ls.SparseSteps(method, model, optimizer, total)
    for index, batch in enumerate(BATCHES, 1):
        dense = model_of().double()
        for name, adapter in adapters.items():
            with torch.no_grad():
                dense.get_submodule(name).weight.add_(adapter.delta_weight())
        dense(**batch).loss.backward()
        model(**batch).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
        for name, reference in references.items():
            reference.step(dense.get_submodule(name).weight.grad.numpy(), index, total, lr)
            found = adapters[name]
            assert np.array_equal(found.indices.numpy(), reference.places), (index, name)
            expected = reference.change.reshape(reference.frozen.shape)
            np.testing.assert_allclose(found.delta_weight().numpy(), expected, rtol=1e-6, atol=1e-9)
            average = optimizer.state[found.values]["exp_avg"].numpy()
            np.testing.assert_allclose(average, reference.first[reference.places], rtol=1e-6, atol=1e-12)
    moved = [not torch.equal(before[name], adapter.indices) for name, adapter in adapters.items()]
    assert any(moved)
    assert method.settled_after(total) == total - 2
    assert ls.LIFT().settled_after(total) == 0


def test_weights_outside_of_the_last_choice_keep_every_bit():
    method, model = ls.LIFT(changed=0.05, filter_rank=3, update_every=1, train_head=False), model_of()
    adapters = ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=0.05)
    steps = ls.SparseSteps(method, model, optimizer, None)
    for batch in BATCHES:
        model(**batch).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    plain, merged = model_of(), ls.merge(model)
    for name, adapter in adapters.items():
        pair = (m.get_submodule(name).weight.detach().flatten().view(torch.int32) for m in (plain, merged))
        changed = torch.ne(*pair).nonzero().flatten()
        assert 0 < len(changed) <= adapter.size
        assert set(changed.tolist()) <= set(adapter.indices.tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"filter_rank": 0}, "filter_rank must be at least 1"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"changed": 0.0}, "changed must be above 0"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ls.UsageError, match=message):
        ls.LIFT(**arguments)


def fit(method, optimizer=torch.optim.AdamW, **options):
    module = ls.SequenceClassification(model_of(), method, optimizer=lambda groups: optimizer(groups, lr=0.01))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    rows = [{"input_ids": ids, "labels": ids[0] % 2} for ids in IDS]
    Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **options).fit(
        module, torch.utils.data.DataLoader(rows, batch_size=4)
    )
    return module


def test_an_average_of_moving_entries_is_refused():
    with pytest.raises(ls.UsageError, match="WeightAveraging would average changes of different entries, which LIFT"):
        fit(ls.LIFT(update_every=2), callbacks=[EMAWeightAveraging(decay=0.5)])
    fit(ls.LIFT(), callbacks=[EMAWeightAveraging(decay=0.5)])


def test_an_optimizer_whose_averages_cannot_move_is_refused():
    with pytest.raises(ls.UsageError, match=r"Entries cannot move while .* trains: it keeps 'exp_avg_sq' of shape"):
        fit(ls.LIFT(update_every=2), optimizer=Blockwise)


class Blockwise(torch.optim.Optimizer):
    """Keeps one number for several entries."""

    def __init__(self, groups, lr):
        super().__init__(groups, {"lr": lr})

    def step(self, closure=None):
        loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["exp_avg_sq"] = torch.zeros(-(-parameter.numel() // 4))
        return loss
