"""Runs of the Trainer as on a GPU: no batch waits for it but where it may, and the numbers are those of the CPU.

See fake_gpu.py; tests/test_gpu.py has the methods and kinds of layers.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from backbones import build_tiny
from fake_gpu import CPU, GPU, Wait, fake_gpu
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, distributed
from torch.utils.data import DataLoader
from transformers import (
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
    ViTForImageClassification,
)

import lit_sparse as ls
from lit_sparse.strategies.replicas import average_gradients, broadcast_from_first

pytestmark = pytest.mark.slow

BOUNDARIES = {
    "update_train_step_metrics": "loggers get numbers at log_every_n_steps",
    "_log_loss": "the progress bar gets one at log_every_n_steps",
    "monitor.py:after_step": "SparsityMonitor logs at log_every_n_steps",
    "require_finite": "FiniteLoss reads at log_every_n_steps whether a loss was bad",
    "cut": "a budget cuts singular values, at most 33 times in a run",
    "cost_of_each": "the costs of ranks go to the device at the first choice, and after a compaction",
    "_owners": "the layer of every rank goes to the device at the first choice, and after a compaction",
    "compaction.py:_keep": "CompactRanks removes ranks when they stay",
    "compaction.py:_compact": "CompactRanks checks all ranks at its interval",
    "require_rows_apart": "the first packed batch is compared with its rows one by one",
    "_ignore_bidirectional_mask_sdpa": "transformers asks in every forward whether a batch has padding",
    "_ignore_causal_mask_sdpa": "transformers asks in every forward whether a batch has padding",
    "find_packed_sequence_indices": "transformers asks in every forward whether rows are packed",
}
"""What may wait within a batch of training, and why; docs/gpu.md has the list."""

READ_IN_VALIDATION = {"QuestionAnswering", "SequenceClassification"}
"""For answers and for Matthews' correlation, every batch of a validation is waited for; for all else, their end."""


class FakeAccelerator(Accelerator):
    def setup_device(self, device: torch.device) -> None: ...

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [GPU]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "fake_gpu"


def drawn(*shape: int, high: int = 60) -> Tensor:
    return torch.randint(5, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def texts(labels: Callable[[Tensor], Tensor], *shape: int) -> dict[str, Any]:
    ids = drawn(*shape)
    mask = torch.ones_like(ids)
    mask[0, ..., -2:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels(ids)}


def questions() -> dict[str, Any]:
    batch = texts(lambda ids: ids, 4, 8)
    del batch["labels"]
    offsets = torch.arange(8).repeat(4, 1).unsqueeze(2) + torch.tensor([0, 1])
    return {
        **batch,
        **{"start_positions": torch.tensor([1, 2, 3, 1]), "end_positions": torch.tensor([2, 3, 3, 2])},
        **{"offsets": offsets, "null_positions": torch.zeros(4, dtype=torch.long), "row": torch.arange(2)},
        **{"question": torch.tensor([0, 0, 1, 1]), "id": ["a", "b"], "context": ["abcdefgh"] * 2},
        "answers": [["bc"], ["d"]],
    }


def packed() -> dict[str, Any]:
    ids = drawn(1, 12)
    return {"input_ids": ids, "labels": ids, "position_ids": torch.cat([torch.arange(5), torch.arange(7)])[None]}


TASKS: dict[str, tuple[Callable[..., pl.LightningModule], type, Callable[[], dict[str, Any]]]] = {
    "SequenceClassification": (
        functools.partial(ls.SequenceClassification, num_labels=2, metrics=["accuracy", "f1", "matthews"]),
        BertForSequenceClassification,
        lambda: texts(lambda ids: ids[:, 1] % 2, 4, 8),
    ),
    "TokenClassification": (
        functools.partial(ls.TokenClassification, num_labels=2, label_names=["O", "B-X"]),
        BertForTokenClassification,
        lambda: texts(lambda ids: ids % 2, 4, 8),
    ),
    "QuestionAnswering": (ls.QuestionAnswering, BertForQuestionAnswering, questions),
    "MultipleChoice": (
        functools.partial(ls.MultipleChoice, num_labels=3),
        BertForMultipleChoice,
        lambda: texts(lambda ids: ids[:, 0, 1] % 3, 4, 3, 8),
    ),
    "MaskedLM": (ls.MaskedLM, BertForMaskedLM, lambda: texts(lambda ids: ids.where(ids % 3 == 0, -100), 4, 8)),
    "CausalLM": (ls.CausalLM, LlamaForCausalLM, lambda: texts(lambda ids: ids, 4, 8)),
    "CausalLM, packed": (ls.CausalLM, LlamaForCausalLM, packed),
    "PreferenceLM": (ls.PreferenceLM, LlamaForCausalLM, lambda: texts(lambda ids: ids, 2, 2, 8)),
    "Seq2SeqLM": (ls.Seq2SeqLM, T5ForConditionalGeneration, lambda: texts(lambda ids: ids, 4, 8)),
    "ImageClassification": (
        functools.partial(ls.ImageClassification, num_labels=2),
        ViTForImageClassification,
        lambda: {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.arange(4) % 2},
    ),
}


def run(module: pl.LightningModule, batch: dict[str, Any], on_gpu: bool, **options: Any) -> pl.Trainer:
    """Two epochs of six batches, with validation and everything that may be written."""
    device = {"accelerator": FakeAccelerator(), "strategy": SingleDeviceStrategy(device=GPU)}
    trainer = pl.Trainer(
        max_epochs=2,
        log_every_n_steps=4,
        gradient_clip_val=1.0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=CSVLogger("."),
        num_sanity_val_steps=0,
        **(device if on_gpu else {"accelerator": "cpu"}),
        **options,
    )
    torch.manual_seed(0)
    trainer.fit(module, DataLoader([batch] * 6, batch_size=None), DataLoader([batch], batch_size=None))
    return trainer


def module_of(task: str, method: ls.SparseMethod, **options: Any) -> pl.LightningModule:
    make, backbone, _ = TASKS[task]
    return make(build_tiny(backbone), method, optimizer=functools.partial(torch.optim.AdamW, lr=0.02), **options)


def in_batches(waits: list[Wait]) -> list[Wait]:
    """Those in batches of training, the callbacks' part of them and the optimizer's included."""
    return [wait for wait in waits if wait.under({"training_epoch_loop.py:advance"})]


def unexpected(waits: list[Wait]) -> list[str]:
    return [str(wait) for wait in in_batches(waits) if not wait.under(BOUNDARIES)]


def require_same(module: pl.LightningModule, alike: pl.LightningModule, close: float = 1e-5) -> None:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    for name, parameter in alike.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(trained[name], parameter, rtol=close, atol=close, msg=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("task", TASKS)
def test_no_batch_waits_for_the_gpu(task: str) -> None:
    method = functools.partial(ls.SoRA, rank=2, budget=0.5, begin=4, end=4)
    batch = TASKS[task][2]()
    with fake_gpu() as gpu:
        module = module_of(task, method())
        run(module, batch, on_gpu=True, callbacks=[ls.CompactRanks(5)])
        assert unexpected(gpu.waits) == []
        evaluating = [w for w in gpu.waits if w.under({"evaluation_loop.py:_evaluation_step"})]
        assert any(not wait.under(BOUNDARIES) for wait in evaluating) == (task in READ_IN_VALIDATION)
        assert {p.device for p in module.parameters()} == {CPU}  # where Lightning moves it at the end
    alike = module_of(task, method())
    run(alike, batch, on_gpu=False, callbacks=[ls.CompactRanks(5)])
    require_same(module, alike)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_is_that_of_the_device(precision: str) -> None:
    """Autocast is asked for by the type of the device."""
    task, method = "SequenceClassification", functools.partial(ls.GatedRoseLoRA, rank=2, threshold=0.01, density=0.5)
    batch = TASKS[task][2]()
    with fake_gpu() as gpu:
        module = module_of(task, method())
        run(module, batch, on_gpu=True, precision=precision)
        assert unexpected(gpu.waits) == []
    alike, single = module_of(task, method()), module_of(task, method())
    run(alike, batch, on_gpu=False, precision=precision)
    require_same(module, alike)
    run(single, batch, on_gpu=False)
    with pytest.raises(AssertionError):
        require_same(module, single)


@pytest.mark.filterwarnings("ignore")
def test_a_scaler_waits_once_per_step_for_what_it_skips() -> None:
    """torch's, which has to know whether to skip; the method asks a fused optimizer for the same."""
    scaler = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu"))
    with fake_gpu() as gpu:
        module = module_of("SequenceClassification", ls.SoRA(rank=2, threshold=0.01))
        run(module, TASKS["SequenceClassification"][2](), on_gpu=True, plugins=[scaler])
        waits = [wait for wait in in_batches(gpu.waits) if not wait.under(BOUNDARIES)]
        assert {wait.what for wait in waits} == {"_local_scalar_dense"}
        assert len(waits) <= 2 * 12


class Others(pl.LightningDataModule):
    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader([TASKS["SequenceClassification"][2]()], batch_size=None)


@pytest.mark.filterwarnings("ignore")
def test_callbacks_wait_at_their_intervals_alone(one_process: None) -> None:
    """With every callback of the library that this module can have, in a process group of NCCL's rules."""
    others: list[pl.Callback] = [
        ls.ForgettingProbe(Others()),
        ls.VerifyReplicas(4),
        ls.SparseCheckpoint(monitor="val_loss"),
    ]
    stages = ls.ThresholdStages(0.01, 0.02, 2, "val_loss", first_epochs=1, epochs=1, mode="min")
    with fake_gpu() as gpu:
        module = module_of("SequenceClassification", ls.SoRA(rank=2, threshold=0.01))
        run(module, TASKS["SequenceClassification"][2](), on_gpu=True, callbacks=[*others, stages])
        assert unexpected([w for w in gpu.waits if not w.under({"replicas.py:_compare"})]) == []
        assert any(wait.under({"replicas.py:_compare"}) for wait in in_batches(gpu.waits))
        assert any(wait.under({"forgetting.py:_measured"}) for wait in gpu.waits)


def test_collectives_of_replicated_adapters_are_on_the_device(one_process: None) -> None:
    with fake_gpu() as gpu:
        parameters = [torch.nn.Parameter(torch.randn(3, n, device="cuda")) for n in (2, 4)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        average_gradients(parameters)
        broadcast_from_first(parameters)
        assert gpu.waits == []
        parameters[0].grad = None
        average_gradients(parameters)  # which asks what the other processes have
        assert 1 <= len(gpu.waits) <= 2
        assert {parameter.device for parameter in parameters} == {GPU}


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group whose collectives take what NCCL takes: tensors of the GPU, in its dtypes."""

    def checked(collective: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensor: Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
            assert group is not None or (tensor.device == GPU and tensor.dtype != torch.int16)
            return collective(tensor, *args, group=group, **kwargs)

        return run

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(distributed, name, checked(getattr(distributed, name)))
    yield
    distributed.destroy_process_group()
