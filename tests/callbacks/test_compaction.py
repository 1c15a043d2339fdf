"""lit_sparse.CompactRanks: ranks go while a model trains, and a run that was compacted goes on."""

import functools

import lightning as L
import pytest
import torch
from backbones import save_tiny_bert
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from torch.utils.data import DataLoader

import lit_sparse as ls

SORA = ls.SoRA(rank=4, sparsity_weight=4.0, gate_lr=0.05)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def rows(count=32):
    ids = torch.randint(5, 60, (count, 6), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(ids)], 4)


def trainer(*callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    keep = {"enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks)}
    return L.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, **keep, "max_epochs": 2, **options})


def classifier(bert, method=SORA):
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    return ls.SequenceClassification(bert, method, num_labels=2, optimizer=optimizer)


class Sizes(L.Callback):
    """Ranks held after every batch."""

    def __init__(self):
        self.ranks = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.ranks.append(sum(adapter.rank for _, adapter in ls.adapters_in(pl_module)))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_go_at_every_so_many_steps(accumulate, bert):
    module, sizes = classifier(bert), Sizes()
    run = trainer(ls.CompactRanks(4), sizes, accumulate_grad_batches=accumulate)
    run.fit(module, rows())
    changes = {step + 1 for step in range(1, 16) if sizes.ranks[step] != sizes.ranks[step - 1]}
    assert changes
    assert changes <= {4 * accumulate * n for n in range(1, 5)}
    assert sizes.ranks[0] == 13 * 4
    assert 0 < sizes.ranks[-1] < 13 * 4
    for _, adapter in ls.adapters_in(module):
        state = run.optimizers[0].state
        assert all(state[p]["exp_avg"].shape == p.shape for p in (adapter.lora_A, adapter.lora_B_t) if p in state)
    zero = float(run.callback_metrics["sparsity/zero_gates"])
    live = sum(int((adapter.gate != 0).sum()) for _, adapter in ls.adapters_in(module))
    assert zero == pytest.approx(1 - live / (13 * 4), abs=1e-6)


def test_a_compacted_checkpoint_loads_resumes_and_joins_a_bank(bert, tmp_path):
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=4, save_top_k=-1)
    whole = classifier(bert)
    trainer(ls.CompactRanks(4), keep).fit(whole, rows())
    file = tmp_path / "step=8.ckpt"
    saved = torch.load(file, weights_only=True)
    assert 0 < sum(saved["lit_sparse"]["ranks_left"].values()) < sum(saved["lit_sparse"]["ranks"].values())

    loaded = ls.SequenceClassification.load_from_checkpoint(file)
    ranks = {name: adapter.rank for name, adapter in ls.adapters_in(loaded)}
    assert ranks == saved["lit_sparse"]["ranks_left"]

    resumed = classifier(bert)
    trainer(ls.CompactRanks(4)).fit(resumed, rows(), ckpt_path=file)
    ends = [{name: p for name, p in module.named_parameters() if p.requires_grad} for module in (whole, resumed)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])

    backbone = classifier(bert)
    backbone.configure_model()
    bank = ls.AdapterBank(type(backbone.model).from_pretrained(bert))
    bank.add("compact", file)
    batch = next(iter(rows()))["input_ids"]
    with bank.using("compact"), torch.no_grad():
        found = bank.model.eval()(batch).logits
        torch.testing.assert_close(found, loaded.model.eval()(batch).logits, rtol=0, atol=1e-6)


CHOICES = {
    "budget": ls.SoRA(rank=4, budget=0.3, begin=2, end=8),
    "refit": ls.SoRA(rank=4, sparsity_weight=4.0, gate_lr=0.05, refit=8),
    "masks and refit": ls.GatedRoseLoRA(rank=4, sparsity_weight=4.0, gate_lr=0.05, refit=8, density=0.5, end=10),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:density", "ignore:.*pulls every gate")
@pytest.mark.parametrize("method", CHOICES.values(), ids=CHOICES)
def test_ranks_go_at_once_when_the_choice_stays_and_such_a_run_resumes(method, bert, tmp_path):
    keep, sizes = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1), Sizes()
    whole = classifier(bert, method)
    trainer(sizes, ls.CompactRanks(1000), keep, max_epochs=4).fit(whole, rows(16))  # sizes are noted before ranks go
    assert sizes.ranks[:8] == [13 * 4] * 8
    assert 0 < sizes.ranks[8] < 13 * 4
    assert sizes.ranks[8:] == sizes.ranks[8:9] * 8
    for step in (4, 8, 12):
        resumed = classifier(bert, method)
        trainer(ls.CompactRanks(1000), max_epochs=4).fit(resumed, rows(16), ckpt_path=tmp_path / f"step={step}.ckpt")
        ends = [{n: p for n, p in module.named_parameters() if p.requires_grad} for module in (whole, resumed)]
        assert ends[0].keys() == ends[1].keys()
        assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_checkpoint_of_fewer_ranks_that_was_not_compacted_is_refused(bert, tmp_path):
    run = trainer(max_epochs=1)
    run.fit(classifier(bert, ls.SoRA(rank=2, threshold=0.01)), rows())
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ls.UsageError, match="has rank 2 there and 4 here"):
        trainer().fit(classifier(bert, ls.SoRA(rank=4, threshold=0.01)), rows(), ckpt_path=tmp_path / "two.ckpt")


class RowsOfB(ls.SparseMethod):
    """Zeroes rows of Bᵀ, without gates, after the steps in ``DEAD``; in the first layer all of them from step 13 on."""

    DEAD = (range(5, 13), [10], range(9, 13), [])

    def __init__(self, target_modules="all-linear", rank=4, alpha=8.0):
        super().__init__(target_modules, rank=rank, alpha=alpha)

    def after_step(self, adapters, step, observed):
        for adapter in adapters:
            for row, steps in zip(adapter.lora_B_t, self.DEAD[4 - adapter.rank :], strict=True):
                row.mul_(step.index not in steps)
        if step.index >= 13:
            adapters[0].lora_B_t.zero_()


def test_ranks_go_without_gates_when_their_rows_stay_zero(bert, tmp_path):
    """Looks after 6, 12, 18 and 24 steps: rows go that are dead at two in a row."""
    whole, sizes = classifier(bert, RowsOfB(["query"])), Sizes()
    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    trainer(ls.CompactRanks(6), sizes, keep, max_epochs=3).fit(whole, rows())
    assert sizes.ranks == [8] * 11 + [6] * 6 + [5] * 6 + [3]

    resumed, sizes = classifier(bert, RowsOfB(["query"])), Sizes()
    run = trainer(ls.CompactRanks(6), sizes, max_epochs=3)
    run.fit(resumed, rows(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert sizes.ranks == [8] * 3 + [6] * 6 + [5] * 6 + [3]
    for (_, one), (_, other) in zip(ls.adapters_in(whole), ls.adapters_in(resumed), strict=True):
        assert torch.equal(one.lora_A, other.lora_A)


def test_an_adapter_that_has_learned_nothing_yet_stays_whole(bert):
    class Unreached(ls.SequenceClassification):
        """Leaves the loss of the first layer's adapter out until step 5."""

        def training_step(self, batch, batch_idx):
            adapter = next(a for _, a in ls.adapters_in(self))
            adapter.enabled = self.global_step >= 5
            return super().training_step(batch, batch_idx)

    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    module = Unreached(bert, RowsOfB(["query"]), num_labels=2, optimizer=optimizer)
    sizes = Sizes()
    trainer(ls.CompactRanks(2), sizes, max_epochs=1).fit(module, rows())
    assert sizes.ranks == [8] * 7 + [6]  # both lose their first row, dead at the looks after 6 and 8 steps


@pytest.mark.parametrize("kind", ["keeps", "logs", "returns"])
def test_a_module_may_keep_its_last_loss(bert, kind):
    class Keeps(ls.SequenceClassification):
        def training_step(self, batch, batch_idx):
            output = self(**batch)
            if kind == "keeps":
                self.kept = output.loss
            if kind == "logs":
                self.log("loss", output.loss, on_epoch=True)
            return {"loss": output.loss, "logits": output.logits} if kind == "returns" else output.loss

    sizes = Sizes()
    optimizer = functools.partial(torch.optim.AdamW, lr=0.01)
    trainer(ls.CompactRanks(4), sizes).fit(Keeps(bert, SORA, num_labels=2, optimizer=optimizer), rows())
    assert sizes.ranks[-1] < sizes.ranks[0]


def test_what_cannot_be_compacted_is_refused_before_training(bert):
    with pytest.raises(ls.UsageError, match="every_n_steps must be at least 1; got 0"):
        ls.CompactRanks(0)
    plain = L.LightningModule()
    plain.configure_optimizers = lambda: None
    with pytest.raises(ls.UsageError, match="LightningModule has no adapter to compact"):
        ls.CompactRanks(1).on_fit_start(trainer(), plain)
    module = ls.SequenceClassification(
        bert,
        SORA,
        num_labels=2,
        optimizer=lambda groups: torch.optim.LBFGS([p for group in groups for p in group["params"]]),
    )
    run = trainer(ls.CompactRanks(1))
    with pytest.raises(ls.UsageError, match="Ranks cannot be taken out while LBFGS trains"):
        run.fit(module, rows())
    assert run.global_step == 0
    with pytest.raises(ls.UsageError, match="changes the shapes that EMAWeightAveraging averages"):
        trainer(ls.CompactRanks(1), EMAWeightAveraging()).fit(classifier(bert), rows())
    module = classifier(bert)
    module.configure_model()
    with pytest.raises(ls.UsageError, match="does not work under DDP"):
        ls.CompactRanks(1).on_fit_start(trainer(strategy="ddp"), module)
