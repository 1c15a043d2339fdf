"""A net with every kind of layer, and ways to train it: a loop of one's own, and the Trainer."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_sparse as ls


class Net(nn.Module):
    """An embedding, a convolution and linear layers: ranks of four different costs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.convolution = nn.Conv2d(1, 5, 3, padding=1)
        self.up, self.down = nn.Linear(5 * 6, 24), nn.Linear(24, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.embedding(ids).unsqueeze(1)).relu().mean(2)
        return self.down(self.up(x.flatten(1)).tanh())


TARGETS = ["embedding", "convolution", "up", "down"]


def train(method: Any, model: nn.Module, loss: Any, steps: int, lr: float = 1e-2, after: Any = None) -> None:
    """Inject and train; ``after`` is called after every step with its number."""
    if not dict(ls.adapters_in(model)):
        ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=lr)
    sparse = ls.SparseSteps(method, model, optimizer, steps)
    for number in range(1, steps + 1):
        loss(model).backward()
        sparse.observe()
        optimizer.step()
        optimizer.zero_grad()
        if after is not None:
            after(number)
    sparse.finish()


def of_net(model: nn.Module) -> Tensor:
    ids = torch.randint(11, (8, 7))
    return nn.functional.cross_entropy(model(ids), ids.sum(1) % 3)


def rows() -> DataLoader:
    ids = torch.randint(11, (48, 7), generator=torch.Generator().manual_seed(3))
    return DataLoader(TensorDataset(ids, ids.sum(1) % 3), batch_size=8)


class Module(pl.LightningModule):
    def __init__(self, method: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.method = Net(), method
        ls.inject(self.net, method)

    def configure_callbacks(self) -> list[pl.Callback]:
        return [ls.Sparsify(self.method)]

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(ls.parameter_groups(self, self.method), lr=3e-2)


class SaveAfter(pl.Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == self.epoch - 1:
            trainer.save_checkpoint("middle.ckpt")


def fit(method: Any, *callbacks: pl.Callback, resume: str | None = None, **options: Any) -> Module:
    module = Module(method)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{"max_epochs": 4, **options}, **quiet)
    trainer.fit(module, rows(), ckpt_path=resume)
    return module
