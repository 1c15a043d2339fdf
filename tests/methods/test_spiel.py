"""lit_sparse.SpIEL: the entries that are trained, dropped and grown, against dense gradients and weights."""

import copy
import functools
import math
import pickle

import pytest
import torch
from backbones import build_tiny
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from transformers import AlbertForSequenceClassification, BertForSequenceClassification, GPT2ForSequenceClassification

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


@pytest.mark.parametrize(
    ("kind", "parts", "way"),
    [
        (BertForSequenceClassification, 1, "fused"),
        (BertForSequenceClassification, 1, "hooked"),
        pytest.param(BertForSequenceClassification, 1, "compiled", marks=pytest.mark.slow),
        (GPT2ForSequenceClassification, 2, "fused"),
        (AlbertForSequenceClassification, 2, "fused"),  # whose layers are called several times in a pass
    ],
)
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


def loop_of(method, total, optimizer=torch.optim.AdamW):
    model = model_of()
    adapters = ls.inject(model, method)
    made = optimizer(ls.parameter_groups(model, method), lr=0.02)
    return model, adapters, made, ls.SparseSteps(method, model, made, total)


def test_weights_outside_of_the_last_choice_keep_every_bit():
    method = ls.SpIEL(changed=0.05, update_every=2, window=1, replaced=0.8, train_head=False)
    model, adapters, optimizer, steps = loop_of(method, len(BATCHES))
    for batch in BATCHES:
        model(**batch).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    steps.finish()
    plain, merged = model_of(), ls.merge(model)
    for name, adapter in adapters.items():
        pair = (m.get_submodule(name).weight.detach().flatten().view(torch.int32) for m in (plain, merged))
        changed = torch.ne(*pair).nonzero().flatten()
        assert 0 < len(changed) <= adapter.size
        assert set(changed.tolist()) <= set(adapter.indices.tolist())


@pytest.mark.parametrize("saved", range(6))
@pytest.mark.parametrize("order", [("steps", "model", "optimizer"), ("optimizer", "model", "steps")])
def test_a_loop_goes_on_from_any_step_bit_for_bit(saved, order):
    """After a step, and after half of the next one. Gradients of steps 1 and 2, and of 4 and 5, are summed."""
    method, total = ls.SpIEL(changed=0.1, update_every=3, window=2, replaced=0.5), len(BATCHES) // 2

    def train(parts, begin, end):
        for number in range(begin, end):
            (parts["model"](**BATCHES[number]).loss / 2).backward()
            if number % 2:
                parts["steps"].observe()
                parts["optimizer"].step()
                parts["optimizer"].zero_grad()

    def parts_of():
        torch.manual_seed(saved)
        model, _, optimizer, steps = loop_of(method, total)
        return {"model": model, "optimizer": optimizer, "steps": steps}

    for batches in (2 * saved, 2 * saved + 1):
        parts, rest = parts_of(), parts_of()
        train(parts, 0, batches)
        states = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
        gradients = {name: copy.deepcopy(p.grad) for name, p in parts["model"].named_parameters()}
        train(parts, batches, len(BATCHES))
        for name in order:
            rest[name].load_state_dict(states[name])
        for name, parameter in rest["model"].named_parameters():
            parameter.grad = gradients[name]
        train(rest, batches, len(BATCHES))
        expected = parts["model"].state_dict()
        for name, value in rest["model"].state_dict().items():
            assert torch.equal(value, expected[name]), (batches, name)


@pytest.mark.parametrize("recompute", [None, True, False], ids=["kept", "reentrant", "not reentrant"])
def test_the_gradient_of_a_whole_weight_is_shown_and_not_kept(recompute):
    model = model_of()
    adapters = ls.inject(model, ls.SHiRA(changed=0.1))
    if recompute is not None:
        model.gradient_checkpointing_enable({"use_reentrant": recompute})
        model.enable_input_require_grads()
        model.train()
        model.config.update({"hidden_dropout_prob": 0.0})
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    shown = {name: [] for name in adapters}
    for name, adapter in adapters.items():
        adapter.watch(lambda gradient, _, own=shown[name]: own.append(gradient))
    for batch in BATCHES[:2]:
        model(**batch).loss.backward()
        expected = dense_gradients(model, adapters, batch, 1, BertForSequenceClassification)
        for name, adapter in adapters.items():
            (gradient,) = shown[name]
            assert gradient.shape == adapter.base.weight.shape
            torch.testing.assert_close(gradient.flatten().double(), expected[name], rtol=1e-4, atol=1e-7)
            own = adapter.values.grad
            torch.testing.assert_close(gradient.flatten()[adapter.indices.long()], own, rtol=1e-5, atol=1e-9)
            adapter.values.grad = None
            shown[name].clear()
            assert adapter._probe.grad is None
            assert adapter._probe.untyped_storage().nbytes() == 4  # and no zeros of the weight's size
    for adapter in adapters.values():
        adapter.watch(None)
    model(**BATCHES[0]).loss.backward()
    assert not any(shown.values())


def test_a_copy_is_not_watched():
    model, adapters, _, _ = loop_of(ls.SpIEL(), len(BATCHES))
    assert all(adapter.watcher is not None for adapter in adapters.values())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert all(adapter.watcher is None for _, adapter in ls.adapters_in(copied))
        with torch.no_grad():
            assert torch.equal(copied(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
        copied(**BATCHES[0]).loss.backward()


def test_a_step_that_a_gradient_scaler_skips_leaves_no_trace():
    found = {}
    for bad in (frozenset(), frozenset({1, 3})):  # before the step at which candidates are chosen, and after one
        method = ls.SpIEL(changed=0.1, update_every=4, window=1, replaced=0.5, train_head=False)
        torch.manual_seed(1)
        model, adapters, optimizer, steps = loop_of(method, len(BATCHES))
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for index, batch in enumerate(BATCHES, 1):
            for factor in (math.inf, 1.0) if index in bad else (1.0,):
                scaler.scale(model(**batch).loss * factor).backward()
                scaler.unscale_(optimizer)
                steps.observe()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        assert steps.steps_taken == len(BATCHES)
        found[bool(bad)] = {name: (a.indices.clone(), a.values.detach().clone()) for name, a in adapters.items()}
    for name, (indices, values) in found[False].items():
        assert torch.equal(indices, found[True][name][0])
        torch.testing.assert_close(values, found[True][name][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["fused", "hooked", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_batch_that_is_discarded_leaves_no_trace(parts, way):
    """Before the pass that chooses candidates (steps 1 and 4) and after it (step 5), also if gradients accumulate."""
    found = []
    for discarded in ({}, {0: math.nan}, {3: math.inf}, {4: -1e3}):
        method = ls.SpIEL(changed=0.1, update_every=3, window=2, replaced=0.5, train_head=False)
        torch.manual_seed(1)
        model, adapters, optimizer, steps = loop_of(method, len(BATCHES) // parts)
        if way == "hooked":
            for adapter in adapters.values():
                adapter.base.register_forward_hook(lambda *_: None)
        if way == "compiled":
            ls.compile_blocks(model, backend="aot_eager", fullgraph=True)
        for index in range(len(BATCHES) // parts):
            if index in discarded:
                for batch in BATCHES[-parts:]:
                    (model(**batch).loss * discarded[index]).backward()
                optimizer.zero_grad()
            for batch in BATCHES[index * parts : (index + 1) * parts]:
                (model(**batch).loss / parts).backward()
            steps.observe()
            optimizer.step()
            optimizer.zero_grad()
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found[1:]), name


class Skipping(LightningModule):
    """Manual optimization that leaves out batches after their backward pass."""

    def __init__(self, bad):
        super().__init__()
        torch.manual_seed(1)
        self.automatic_optimization, self.bad = False, bad
        self.method = ls.SpIEL(changed=0.1, update_every=3, window=2, replaced=0.5, train_head=False)
        self.model = model_of()
        ls.inject(self.model, self.method)

    def training_step(self, batch, batch_idx):
        for factor in (math.inf, 1.0) if batch_idx in self.bad else (1.0,):
            self.optimizers().zero_grad()
            loss = self.model(**batch).loss * factor
            self.manual_backward(loss)
            if loss.isfinite():
                self.optimizers().step()

    def configure_optimizers(self):
        return torch.optim.AdamW(ls.parameter_groups(self.model, self.method), lr=0.02)


def test_a_batch_that_manual_optimization_discards_leaves_no_trace():
    found = []
    for bad in ((), (1, 3, 6)):
        module = Skipping(bad)
        trainer = Trainer(
            accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            callbacks=[ls.Sparsify(module.method)],
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(BATCHES, batch_size=None))
        found.append(module.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_layers_that_are_frozen_or_not_reached_keep_their_entries():
    method = ls.SpIEL(changed=0.1, update_every=2, window=2, train_head=False)
    model, adapters, optimizer, steps = loop_of(method, len(BATCHES))
    frozen, idle = "bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"
    adapters[frozen].values.requires_grad_(False)
    steps.release()
    steps = ls.SparseSteps(method, model, optimizer, len(BATCHES))
    before = {name: adapter.indices.clone() for name, adapter in adapters.items()}
    adapters[idle].enabled = False
    for batch in BATCHES:
        model(**batch).loss.backward()
        steps.observe()
        optimizer.step()
        optimizer.zero_grad()
    same = {name for name, adapter in adapters.items() if torch.equal(adapter.indices, before[name])}
    assert same == {frozen, idle}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"changed": 0.0}, "changed must be above 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"update_every": 0}, "update_every must be at least 1"),
        ({"update_every": 8, "window": 9}, "update_every must be at least window; got 8 and 9"),
        ({"replaced": 1.1}, "replaced must be"),
        ({"overrides": {"query": {"window": 2}}}, r"SpIEL can set \['changed'\]"),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises(ls.UsageError, match=message):
        ls.SpIEL(**arguments)


def test_runs_without_an_end_or_without_a_choice_are_told():
    with pytest.raises(ls.UsageError, match="SpIEL replaces fewer entries the nearer the end is, but this run has no"):
        loop_of(ls.SpIEL(), None)
    with pytest.warns(UserWarning, match="first chooses entries after 5 steps, and this run has 5: it trains entries"):
        loop_of(ls.SpIEL(), 5)
    assert [ls.SpIEL().settled_after(total) for total in (1, 5, 6, 25, 26)] == [0, 0, 5, 5, 25]


def test_an_average_of_moving_entries_is_refused():
    module = ls.SequenceClassification(model_of(), ls.SpIEL(), optimizer=functools.partial(torch.optim.AdamW, lr=0.01))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=[EMAWeightAveraging(decay=0.5)], **quiet)
    rows = [{"input_ids": ids, "labels": ids[0] % 2} for ids in IDS]
    with pytest.raises(ls.UsageError, match="WeightAveraging would average changes of different entries, which SpIEL"):
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4))
