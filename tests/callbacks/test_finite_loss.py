"""FiniteLoss stops a run at the step whose loss is no number, and keeps good checkpoints."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
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


class BadGradient(Module):
    """The loss of batch ``BAD`` is finite, its gradient is NaN: that of the square root of 0."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        output = self.layer(batch)
        self.batches += 1
        extra = (output * 0).abs().sum().sqrt() if self.batches == BAD + 1 else 0.0
        return output.square().mean() + extra


class AsOnAnAccelerator(ls.FiniteLoss):
    """Takes the way on which the loss stays on the device; the device is a CPU."""

    @staticmethod
    def _reading_is_free(loss: Tensor) -> bool:
        return False


def run(
    folder: Path, guard: ls.FiniteLoss, kind: type[Module] = Module, weights_only: bool = False, **options: Any
) -> tuple[Module, pl.Trainer, str]:
    module = kind()
    checkpoints = ModelCheckpoint(
        folder,
        save_last=True,
        every_n_train_steps=5,
        save_top_k=-1,
        save_on_exception=True,
        save_weights_only=weights_only,
    )
    trainer = pl.Trainer(
        callbacks=[guard, checkpoints, OnExceptionCheckpoint(folder, "exception")],
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


@pytest.mark.parametrize(("kind", "what"), [(Module, "The training loss"), (BadGradient, "A gradient")])
def test_on_a_cpu_the_weights_stay_good(tmp_path: Path, kind: type[Module], what: str) -> None:
    module, trainer, message = run(tmp_path, ls.FiniteLoss(), kind)
    assert f"{what} became NaN or infinite at optimizer step {BAD} (epoch 1)" in message
    assert str(tmp_path / "last.ckpt") in message
    assert trainer.global_step == BAD
    assert torch.isfinite(module.layer.weight).all()


@pytest.mark.parametrize(("kind", "what"), [(Module, "The training loss"), (BadGradient, "A gradient")])
@pytest.mark.parametrize("every", [2, 1000])
def test_on_an_accelerator_the_first_bad_step_is_named_and_no_bad_checkpoint_written(
    tmp_path: Path, every: int, kind: type[Module], what: str
) -> None:
    module, trainer, message = run(tmp_path, AsOnAnAccelerator(), kind, log_every_n_steps=every)
    assert f"{what} became NaN or infinite at optimizer step {BAD} (epoch 1)" in message
    # Found at the next round of logs or the next checkpoint, whichever comes first.
    assert trainer.global_step == (14 if every == 2 else 15)
    assert not torch.isfinite(module.layer.weight).all()
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        assert torch.isfinite(weights(file)).all(), file


def test_no_save_of_weights_only_follows_a_bad_step(tmp_path: Path) -> None:
    """Callbacks are not told of such saves."""
    _, trainer, _ = run(tmp_path, AsOnAnAccelerator(), BadGradient, weights_only=True, log_every_n_steps=1000)
    assert trainer.global_step == BAD + 1
    files = list(tmp_path.glob("*.ckpt"))
    assert files
    for file in files:
        assert torch.isfinite(weights(file)).all(), file


def test_every_save_is_refused_after_a_bad_step(tmp_path: Path) -> None:
    _, trainer, message = run(tmp_path, ls.FiniteLoss(), BadGradient)
    with pytest.raises(TrainingError) as again:
        trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert str(again.value) == message
    assert sorted(file.stem for file in tmp_path.glob("*.ckpt")) == ["epoch=0-step=5", "epoch=1-step=10", "last"]


def test_a_run_resumes_from_the_last_good_checkpoint(tmp_path: Path) -> None:
    run(tmp_path, ls.FiniteLoss(), BadGradient)
    module = Module()
    module.batches = BAD + 1  # past the bad one
    trainer = pl.Trainer(callbacks=[ls.FiniteLoss()], max_epochs=4, logger=False, accelerator="cpu")
    trainer.fit(module, DataLoader(torch.ones(64, 3), batch_size=8), ckpt_path=tmp_path / "last.ckpt")
    assert trainer.global_step == 32
    assert torch.isfinite(module.layer.weight).all()


class InfiniteGradient(Module):
    """One gradient of batch ``BAD`` is infinite."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.batches += 1
        return self.layer(batch).square().mean()

    def on_after_backward(self) -> None:
        if self.batches == BAD + 1:
            self.layer.weight.grad[0, 0] = float("inf")


@pytest.mark.parametrize("guard", [ls.FiniteLoss, AsOnAnAccelerator])
def test_an_infinite_gradient_that_is_clipped_by_value_is_no_reason_to_stop(guard: type[ls.FiniteLoss]) -> None:
    options = {"max_epochs": 4, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    loader = DataLoader(torch.ones(64, 3), batch_size=8)
    module = InfiniteGradient()
    clip = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}
    pl.Trainer(callbacks=[guard()], **clip, **options).fit(module, loader)
    assert torch.isfinite(module.layer.weight).all()
    with pytest.raises(TrainingError, match=f"A gradient became NaN or infinite at optimizer step {BAD}"):
        pl.Trainer(callbacks=[guard()], gradient_clip_val=1.0, **options).fit(InfiniteGradient(), loader)
    with pytest.raises(TrainingError, match=f"A gradient became NaN or infinite at optimizer step {BAD}"):
        pl.Trainer(callbacks=[guard()], **clip, **options).fit(BadGradient(), loader)


class HalfLoss(Module):
    """The loss is a float16 that overflows when it is scaled; NaN from batch ``BAD`` on if ``bad``."""

    bad = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return (loss if self.bad or self.batches != BAD + 1 else self.layer(batch).square().mean()).half() + 1


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_is_no_reason_to_stop(fused: bool, bad: bool) -> None:
    class Scaled(HalfLoss):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=0.01, fused=fused)

    module, scaler = Scaled(), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    module.bad = bad
    trainer = pl.Trainer(
        callbacks=[ls.FiniteLoss()],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
        max_epochs=4,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    loader = DataLoader(torch.ones(64, 3), batch_size=8)
    if bad:
        with pytest.raises(TrainingError, match="The training loss became NaN"):
            trainer.fit(module, loader)
    else:
        trainer.fit(module, loader)
        assert scaler.get_scale() < 2.0**17  # halved at each step it skipped
    assert torch.isfinite(module.layer.weight).all()


def test_without_a_checkpoint_it_says_so() -> None:
    trainer = pl.Trainer(
        callbacks=[ls.FiniteLoss()], max_epochs=2, logger=False, enable_checkpointing=False, accelerator="cpu"
    )
    with pytest.raises(TrainingError, match="no checkpoint was written yet"):
        trainer.fit(Module(), DataLoader(torch.ones(64, 3), batch_size=4))
