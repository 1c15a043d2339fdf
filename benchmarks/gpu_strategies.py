"""Train a tiny model in one process under a strategy, and print its losses: the part "strategies" of gpu.py runs it.

Run:  python benchmarks/gpu_strategies.py auto|ddp|fsdp|fsdp2 cuda|cpu

With ddp, fsdp and fsdp2 the process starts a group of one: NCCL on a GPU, gloo on a CPU.
"""

import json
import sys
import warnings
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForSequenceClassification
from variants import make_batch

import lit_sparse as ls

STRATEGIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "ddp": lambda: "ddp",
    "fsdp": ls.SparseFSDPStrategy,
    "fsdp2": ls.SparseFSDP2Strategy,
}
STEPS = 8


class Module(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # Gates, a threshold and masks.
        self.method = ls.GatedRoseLoRA(rank=4, threshold=0.01, density=0.3, begin=2, end=5)
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        self.model = LlamaForSequenceClassification(LlamaConfig(**shape, num_labels=2, pad_token_id=0, use_cache=False))
        ls.inject(self.model, self.method)
        self.told: dict[str, Any] = {"losses": []}

    def configure_callbacks(self) -> list[L.Callback]:
        return [ls.Sparsify(self.method)]

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.model(**batch).loss
        self.told["losses"].append(float(loss.detach()))
        return loss

    def on_train_end(self) -> None:
        group = torch.distributed.is_initialized()
        self.told["backend"] = torch.distributed.get_backend() if group else "none"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ls.parameter_groups(self, self.method), lr=0.01)


def main(strategy: str, device: str) -> None:
    warnings.simplefilter("ignore")
    L.seed_everything(0)
    module = Module()
    batch = make_batch(4 * STEPS, 16)
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4 * STEPS)]
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        strategy=STRATEGIES[strategy](),
        max_epochs=1,
        use_distributed_sampler=False,  # which would shuffle
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(rows, batch_size=4))
    print(json.dumps(module.told))


if __name__ == "__main__":
    main(*sys.argv[1:])
