"""Lightning's own callbacks: an averaged model that is as sparse as the model, and a stop when it is sparse enough.

Run:  python examples/with_lightning_callbacks.py
"""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, GradientAccumulationScheduler
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    rows = [{"input_ids": row, "labels": (row[1] > 32).long()} for row in torch.randint(2, 64, (256, 12))]
    data = torch.utils.data.DataLoader(rows, batch_size=8)

    callbacks = [
        # Where the model has a zero, its average has one: validation, checkpoints and the end of fit are sparse.
        EMAWeightAveraging(decay=0.95),
        # Everything that SparsityMonitor logs can be watched.
        EarlyStopping("sparsity/zero_gates", mode="max", stopping_threshold=0.3, check_on_train_epoch_end=True),
        # Schedules over shares of the run count the steps that are really taken.
        GradientAccumulationScheduler({1: 2}),
    ]
    method = ls.SoRA(["query", "value"], rank=8, threshold=6e-3)
    module = ls.SparseModule(BertForSequenceClassification(config), method, lr_schedule="constant", warmup=0)
    trainer = L.Trainer(max_epochs=20, callbacks=callbacks, logger=False, enable_checkpointing=False)
    trainer.fit(module, data, data)

    gates = torch.cat([adapter.gate for _, adapter in ls.adapters_in(module)])
    print(f"after {trainer.current_epoch} epochs {(gates == 0).float().mean():.0%} of the gates are zero")


if __name__ == "__main__":
    main()
