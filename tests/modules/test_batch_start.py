"""init_weights 'gora' in a module: once, when a run begins, and wherever its checkpoints go."""

import functools
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lit_sparse as ls
from lit_sparse.callbacks.batch_start import start_run

METHOD = ls.LoRA(rank=4, layers=[0, 1], init_weights="gora", start_batches=2, gora_gamma=1.0)


class Counting(ls.SequenceClassification):
    """Counts the batches that it computes a loss of."""

    seen = 0

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Any:
        self.seen += 1
        return {"loss": super().training_step(batch, batch_idx)}


def classifier(backbone: Any, method: ls.SparseMethod = METHOD, **options: Any) -> Counting:
    optimizer = functools.partial(torch.optim.SGD, lr=1e-3)
    return Counting(backbone, method, num_labels=2, optimizer=optimizer, **options)


def ranks_of(module: Any) -> dict[str, int]:
    return {name: adapter.max_rank for name, adapter in ls.adapters_in(module)}


def test_a_run_starts_once_and_a_resumed_run_does_not(tiny_bert, trainer, loader, tmp_path):
    first, run = classifier(tiny_bert), trainer(max_epochs=1)
    run.fit(first, loader(count=24))
    assert first.seen == 2 + 3
    ranks = ranks_of(first)
    assert len(set(ranks.values())) > 2
    assert all(2 <= rank <= 16 for rank in ranks.values())
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert torch.load(tmp_path / "half.ckpt", weights_only=True)["lit_sparse"]["ranks"] == ranks

    resumed = classifier(tiny_bert)
    trainer(max_epochs=2).fit(resumed, loader(count=24), ckpt_path=str(tmp_path / "half.ckpt"))
    assert resumed.seen == 3
    assert ranks_of(resumed) == ranks
    tested = classifier(tiny_bert)
    trainer().test(tested, loader(count=24), ckpt_path=str(tmp_path / "half.ckpt"))
    assert (tested.seen, ranks_of(tested)) == (0, ranks)


def test_a_compacted_run_loads(tiny_bert, trainer, loader, tmp_path):
    method = ls.SoRA(rank=4, budget=0.3, begin=0, end=4, init_weights="gora", start_batches=1)
    module = classifier(tiny_bert, method)
    run = trainer(max_epochs=3, callbacks=[ls.CompactRanks(every_n_steps=2)])
    run.fit(module, loader())
    assert any(adapter.rank < adapter.max_rank for _, adapter in ls.adapters_in(module))
    run.save_checkpoint(tmp_path / "small.ckpt")
    loaded = Counting.load_from_checkpoint(tmp_path / "small.ckpt")
    assert ranks_of(loaded) == ranks_of(module)
    batch = next(iter(loader()))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**batch).logits, module.eval()(**batch).logits)


def test_what_cannot_start_is_refused(tiny_bert, trainer, loader):
    manual = classifier(tiny_bert)
    manual.automatic_optimization = False
    with pytest.raises(ls.UsageError, match="training_step, which here steps the optimizer itself"):
        trainer(max_epochs=1).fit(manual, loader())
    with pytest.raises(ls.UsageError, match="EMAWeightAveraging has copied the adapters before"):
        trainer(max_epochs=1, callbacks=[EMAWeightAveraging()]).fit(classifier(tiny_bert), loader())
    with pytest.raises(ls.UsageError, match="start_from and init_weights 'gora' are two starts of the adapters"):
        trainer(max_epochs=1).fit(classifier(tiny_bert, start_from="folder"), loader())
    module = classifier(tiny_bert)
    module.configure_model()
    run = L.Trainer(accelerator="cpu", devices=2, strategy=ls.SparseFSDP2Strategy(), logger=False)
    with pytest.raises(ls.UsageError, match="gradients of whole weights, which FSDP shards"):
        start_run(run, module, METHOD)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_a_module_of_ones_own_starts_in_any_precision(precision):
    class Own(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Sequential(torch.nn.Linear(30, 40), torch.nn.Tanh(), torch.nn.Linear(40, 12))
            ls.inject(self.net, method)
            self.order = []

        def training_step(self, batch, batch_idx):
            self.log("loss", 1.0)
            self.order.append(float(batch[0].sum()))
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(ls.parameter_groups(self, method), lr=0.1)

    method = ls.LoRA(["0", "2"], rank=4, train_head=False, init_weights="gora", start_batches=2)
    module, rows = Own(), torch.utils.data.TensorDataset(torch.randn(24, 30))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = L.Trainer(accelerator="cpu", max_epochs=1, precision=precision, callbacks=[ls.Sparsify(method)], **quiet)
    data = torch.utils.data.DataLoader(rows, 8, num_workers=1, persistent_workers=True)
    run.fit(module, data)
    assert len(module.order) == 2 + 3
    assert module.order[2:4] == module.order[:2]  # the epoch begins at its first batch
    assert len(set(ranks_of(module).values())) == 2
    assert run.callback_metrics["loss"] == 1.0
