"""What keeps processes equal, in two real ones."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import launch
from torch import nn

import lit_sparse as ls
from lit_sparse.strategies.replicas import average_gradients, broadcast_from_first

SCRIPT = """
import gc
import json
import os
import lightning as L
import torch
from torch import distributed, nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
import lit_sparse as ls
from lit_sparse.strategies.replicas import average_gradients, broadcast_from_first

torch.set_num_threads(1)
distributed.init_process_group("gloo")
rank = distributed.get_rank()
told = {}

# Gradients: in both processes, in the second alone, in none, and of another dtype.
shapes = [((2, 3), torch.float32), ((4,), torch.float32), ((3,), torch.float32), ((2,), torch.float64)]
parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape, dtype in shapes]
parameters[0].grad = torch.full((2, 3), float(rank))
parameters[1].grad = torch.arange(4.0) if rank else None
parameters[3].grad = torch.tensor([1.0, 2.0 + rank], dtype=torch.float64)
average_gradients(parameters)
told["gradients"] = [None if p.grad is None else p.grad.tolist() for p in parameters]

tensors = [torch.full((2,), float(rank)), torch.arange(3) + 10 * rank]
broadcast_from_first(tensors)
told["broadcast"] = [tensor.tolist() for tensor in tensors]


class Diverge(L.Callback):
    def on_before_zero_grad(self, trainer, module, optimizer):
        if trainer.global_step == 4 and trainer.global_rank == 1:
            next(a for name, a in ls.adapters_in(module) if "1.attention.output" in name).lora_A.data[0, 0] += 1e-6


def error_of(callbacks, strategy="ddp", seed=0):
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    module = ls.SparseModule(BertForSequenceClassification(config), ls.SoRA(rank=2, threshold=0.01))
    rows = [{"input_ids": torch.arange(2, 8), "labels": torch.tensor(i % 2)} for i in range(32)]
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    try:
        trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=2))
    except (ls.TrainingError, ls.UsageError) as error:
        return f"{type(error).__name__}: {error}"
    return None


told["diverged"] = error_of([ls.VerifyReplicas(2), Diverge()])
told["agreed"] = error_of([ls.VerifyReplicas(2)])
told["other weights"] = error_of([], ls.SparseFSDP2Strategy(), seed=rank)
told["no such block"] = error_of([], ls.SparseFSDPStrategy(auto_wrap=["LlamaDecoderLayer"]))
told["offload"] = error_of([], ls.SparseFSDPStrategy(cpu_offload=True))


def allocated():
    "Bytes of this process alone, those not counted that files are mapped to."
    line = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


class Look(L.Callback):
    def on_fit_start(self, trainer, module):
        told["held"].append((allocated() - before) / size)
        # What a block gathers is what it was loaded with.
        told["dtypes"].append(sorted({str(p.dtype) for p in module.parameters() if not p.requires_grad}))


if rank == 0:
    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=4000, hidden_size=1024, intermediate_size=4096, num_hidden_layers=8, num_attention_heads=8
    )
    LlamaForCausalLM(config).save_pretrained("large")
    torch.set_default_dtype(torch.float32)
distributed.barrier()
size = os.path.getsize("large/model.safetensors")
told["held"], told["dtypes"] = [], []
for strategy in (ls.SparseFSDPStrategy(), ls.SparseFSDP2Strategy()):
    before = allocated()
    module = ls.SparseModule("large", ls.SoRA(rank=1, threshold=0.01), backbone_args={"dtype": "bfloat16"})
    rows = [{"input_ids": torch.arange(4), "labels": torch.arange(4)}] * 2
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=0, callbacks=[Look()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(rows))
    del module, trainer
    gc.collect()
distributed.barrier()
open(f"told_{rank}.json", "w").write(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("replicas")
    (folder / "script.py").write_text(SCRIPT)
    done = launch(2, ["script.py"], cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"told_{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
def test_two_processes_are_kept_equal_or_stopped(told: list[dict[str, Any]]) -> None:
    for process in told:
        both, second_alone, none, other_dtype = process["gradients"]
        assert both == [[0.5] * 3] * 2
        assert second_alone == [0.0, 0.5, 1.0, 1.5]
        assert none is None
        assert other_dtype == [1.0, 2.5]
        assert process["broadcast"] == [[0.0, 0.0], [0, 1, 2]]
        assert process["agreed"] is None
        layer = "model.bert.encoder.layer.1.attention.output.dense"
        found = f"TrainingError: At step 6, lora_A of '{layer}' in process 1 differ from those in process 0"
        assert process["diverged"].startswith(found)
        assert "The processes hold different frozen weights" in process["other weights"]
        assert "has no classes ['LlamaDecoderLayer']" in process["no such block"]
        assert "On CPUs the shards are in host memory already" in process["offload"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_a_process_holds_its_share_of_the_weights_alone(told: list[dict[str, Any]]) -> None:
    for process in told:
        assert all(0.2 < share < 0.7 for share in process["held"]), process["held"]
        assert process["dtypes"] == [["torch.bfloat16"]] * 2


def test_a_single_process_is_left_alone() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter])
    broadcast_from_first([parameter])
    assert parameter.grad.tolist() == [1, 1]
    with pytest.raises(ls.UsageError, match="every_n_steps must be at least 1; got 0"):
        ls.VerifyReplicas(0)
