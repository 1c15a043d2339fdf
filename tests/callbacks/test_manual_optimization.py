"""Manual optimization with two optimizers takes the steps of automatic optimization with one, bit for bit."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lit_sparse as ls

BATCHES, WIDTH, LR = 24, 12, 3e-2
METHODS = {
    "sora": lambda: ls.SoRA(["0", "2"], rank=4, threshold=0.04, l1_weight=0.1),
    "roselora": lambda: ls.RoseLoRA(["0", "2"], rank=4, density=0.3, begin=2, end=9),
}


class Automatic(pl.LightningModule):
    """Two adapted layers and a head, trained with one learning rate by one optimizer."""

    def __init__(self, method: ls.SparseMethod) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.net = nn.Sequential(nn.Linear(WIDTH, 20), nn.Tanh(), nn.Linear(20, 8))
        ls.inject(self.net, method)
        self.head = nn.Linear(8, 3)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self.head(self.net(batch[0])), batch[1])

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=LR)


class Manual(Automatic):
    """The same, with an optimizer for the adapters and one for the head."""

    def __init__(self, method: ls.SparseMethod, accumulate: int) -> None:
        super().__init__(method)
        self.automatic_optimization = False
        self.accumulate = accumulate

    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.manual_backward(self.loss(batch) / self.accumulate)
        if (batch_idx + 1) % self.accumulate == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        adapters = [p for p in self.net.parameters() if p.requires_grad]
        return [torch.optim.Adam(self.head.parameters(), lr=LR), torch.optim.Adam(adapters, lr=LR)]


def fit(module: pl.LightningModule, method: ls.SparseMethod, **options: Any) -> ls.Sparsify:
    x = torch.randn(BATCHES * 8, WIDTH, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(x, x[:, :3] * x[:, 3:6]), batch_size=8)
    sparsify = ls.Sparsify(method)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_model_summary": False, **quiet, **options}
    pl.Trainer(callbacks=[sparsify], **options).fit(module, data)
    return sparsify


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", METHODS)
def test_manual_equals_automatic(kind: str, accumulate: int, precision: str) -> None:
    method = METHODS[kind]()
    automatic = Automatic(method)
    fit(automatic, method, precision=precision, accumulate_grad_batches=accumulate)
    method = METHODS[kind]()
    manual = Manual(method, accumulate)
    assert fit(manual, method, precision=precision).steps_taken == BATCHES // accumulate
    own = manual.state_dict()
    for name, value in automatic.state_dict().items():
        assert torch.equal(own[name], value), name
    pruned = "lora_A" if kind == "roselora" else "gate"
    entries = torch.cat([value.flatten() for name, value in own.items() if name.endswith(pruned)])
    assert 0 < int((entries == 0).sum()) < entries.numel()
