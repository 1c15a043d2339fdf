"""lit_sparse.SpIEL: the entries that are trained, dropped and grown, against dense gradients and weights."""

import math

import pytest
import torch
from backbones import build_tiny
from transformers import BertForSequenceClassification, GPT2ForSequenceClassification

import lit_sparse as ls

IDS = torch.randint(5, 60, (48, 6), generator=torch.Generator().manual_seed(0))
BATCHES = [{"input_ids": ids, "labels": ids[:, 0] % 2} for ids in IDS.split(4)]


def model_of(kind=BertForSequenceClassification):
    torch.manual_seed(0)
    return build_tiny(kind, **({"pad_token_id": 0} if kind is GPT2ForSequenceClassification else {})).eval()


def ranked(scores, count):
    """The places with the highest scores."""
    return sorted(range(len(scores)), key=lambda place: -float(scores[place]))[:count]


class Reference:
    """A dense change of one weight and Adam's averages of it, with sets of places: the paper's definition."""

    def __init__(self, adapter, method, total, lr):
        self.active = set(adapter.indices.tolist())
        self.method, self.total, self.lr, self.size = method, total, lr, adapter.size
        self.change, self.first, self.second = torch.zeros(3, adapter.base.weight.numel(), dtype=torch.float64)

    def step(self, gradients, index):
        """``gradients`` are those of each backward pass of the step."""
        method = self.method
        since_first_choice = max(0, math.ceil((index - method.window) / method.update_every))
        choice = method.window + since_first_choice * method.update_every
        if index == choice - method.window + 1:
            self.candidates, self.sums = ranked(gradients[0].abs(), self.size), torch.zeros_like(self.change)
        if index > choice - method.window:
            self.sums += sum(gradients)
        self._adam(sum(gradients), index)
        if index == choice and index < self.total:
            share = 1 if index == method.window else method.replaced * (1 - index / self.total)
            self._choose(math.floor(share * self.size + 1e-6))

    def _adam(self, gradient, index):
        kept = torch.zeros(len(gradient), dtype=torch.bool)
        kept[list(self.active)] = True
        self.first = torch.where(kept, 0.9 * self.first + 0.1 * gradient, 0)
        self.second = torch.where(kept, 0.999 * self.second + 0.001 * gradient**2, 0)
        step = self.first / (1 - 0.9**index) / ((self.second / (1 - 0.999**index)).sqrt() + 1e-8)
        self.change = torch.where(kept, self.change - self.lr * step, 0)

    def _choose(self, count):
        dropped = sorted(self.active, key=lambda place: abs(float(self.change[place])))[:count]
        left = self.active - set(dropped)
        possible = [place for place in self.candidates if place not in left]
        grown = sorted(possible, key=lambda place: -abs(float(self.sums[place])))[:count]
        again = [place for place in dropped if place not in grown][len(grown) - len(set(grown) & set(dropped)) :]
        self.active = left | set(grown) | set(again)  # again: for want of candidates
        assert len(self.active) == self.size
        for dense in (self.change, self.first, self.second):
            dense[[place for place in range(len(dense)) if place not in self.active]] = 0


def dense_gradients(model, adapters, batch, parts, kind):
    """The gradient of every whole weight, by plain autograd, with the changes of the adapters in the weights."""
    dense = model_of(kind).double()
    for name, adapter in adapters.items():
        with torch.no_grad():
            dense.get_submodule(name).weight.add_(adapter.delta_weight())
    dense.requires_grad_(True)
    (dense(**batch).loss / parts).backward()
    return {name: dense.get_submodule(name).weight.grad.flatten() for name in adapters}


@pytest.mark.parametrize("way", ["fused", "hooked", "compiled"])
@pytest.mark.parametrize(("kind", "parts"), [(BertForSequenceClassification, 1), (GPT2ForSequenceClassification, 2)])
def test_entries_are_dropped_and_grown_as_in_the_paper(kind, parts, way):
    method = ls.SpIEL(changed=0.1, update_every=4, window=2, replaced=0.5, train_head=False)
    total, lr = len(BATCHES) // parts, 0.02
    model = model_of(kind).double()
    adapters = ls.inject(model, method)
    for adapter in adapters.values():
        if way == "hooked":
            adapter.base.register_forward_hook(lambda *_: None)
    if way == "compiled":
        ls.compile_blocks(model, backend="aot_eager", fullgraph=True)
    before = {name: adapter.indices.clone() for name, adapter in adapters.items()}
    references = {name: Reference(adapter, method, total, lr) for name, adapter in adapters.items()}
    optimizer = torch.optim.Adam(ls.parameter_groups(model, method), lr=lr)
    steps = ls.SparseSteps(method, model, optimizer, total)
    watched = []
    for index in range(1, total + 1):
        seen = []
        for batch in BATCHES[(index - 1) * parts : index * parts]:
            seen.append(dense_gradients(model, adapters, batch, parts, kind))
            watched.append(adapters[next(iter(adapters))].watcher is not None)
            (model(**batch).loss / parts).backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
        for name, reference in references.items():
            reference.step([gradients[name] for gradients in seen], index)
            found = adapters[name]
            assert found.indices.tolist() == sorted(reference.active), (index, name)
            torch.testing.assert_close(found.delta_weight().flatten(), reference.change, rtol=1e-6, atol=1e-9)
            average = optimizer.state[found.values]["exp_avg"]
            torch.testing.assert_close(average, reference.first[found.indices.long()], rtol=1e-6, atol=1e-12)
    assert all(not torch.equal(before[name], adapter.indices) for name, adapter in adapters.items())
    last = total - 1 - (total - 1 - 2) % 4  # the choice after the last one would have come at the end or later
    assert watched[::parts] == [index <= last and index % 4 in (1, 2) for index in range(1, total + 1)]
    assert method.settled_after(total) == last
