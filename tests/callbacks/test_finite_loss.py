"""FiniteLoss stops a run at the step whose loss is no number, and keeps good checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lit_sparse as ls
from lit_sparse.errors import TrainingError

BAD = 13  # the batch, counted from 0 over all epochs, whose loss is NaN


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.batches = 0

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.layer(batch).square().mean()
        self.batches += 1
        return loss * float("nan") if self.batches == BAD + 1 else loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class AsOnAnAccelerator(ls.FiniteLoss):
    """Takes the way on which the loss stays on the device; the device is a CPU."""

    @staticmethod
    def _reading_is_free(loss: Tensor) -> bool:
        return False


def run(folder: Path, guard: ls.FiniteLoss, **options: Any) -> tuple[Module, pl.Trainer, str]:
    module = Module()
    checkpoints = ModelCheckpoint(folder, save_last=True, every_n_train_steps=5, save_top_k=-1)
    trainer = pl.Trainer(
        callbacks=[guard, checkpoints],
        max_epochs=4,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        **options,
    )
    with pytest.raises(TrainingError) as caught:
        trainer.fit(module, DataLoader(torch.ones(64, 3), batch_size=8))
    return module, trainer, str(caught.value)


def weights(file: Path) -> Tensor:
    return torch.load(file, weights_only=True)["state_dict"]["layer.weight"]


def test_on_a_cpu_the_weights_stay_good(tmp_path: Path) -> None:
    module, trainer, message = run(tmp_path, ls.FiniteLoss())
    assert f"became nan at optimizer step {BAD} (epoch 1)" in message
    assert str(tmp_path / "last.ckpt") in message
    assert trainer.global_step == BAD
    assert torch.isfinite(module.layer.weight).all()


@pytest.mark.parametrize("every", [2, 1000])
def test_on_an_accelerator_the_first_bad_step_is_named_and_no_bad_checkpoint_written(
    tmp_path: Path, every: int
) -> None:
    module, trainer, message = run(tmp_path, AsOnAnAccelerator(), log_every_n_steps=every)
    assert f"became not finite at optimizer step {BAD} (epoch 1)" in message
    # Found at the next round of logs or the next checkpoint, whichever comes first.
    assert trainer.global_step == (14 if every == 2 else 15)
    assert not torch.isfinite(module.layer.weight).all()
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        assert torch.isfinite(weights(file)).all(), file


def test_without_a_checkpoint_it_says_so() -> None:
    trainer = pl.Trainer(
        callbacks=[ls.FiniteLoss()], max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        trainer.fit(Module(), DataLoader(torch.ones(64, 3), batch_size=4))
