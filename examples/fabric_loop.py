"""A training loop of your own in Lightning Fabric: `SparseSteps` does what `Sparsify` does under the Trainer.

Run:  python examples/fabric_loop.py
"""

import torch
from lightning.fabric import Fabric
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls

EPOCHS = 6


def main() -> None:
    fabric = Fabric(accelerator="cpu")
    fabric.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    model = BertForSequenceClassification(config)
    method = ls.SoRA(["query", "value"], rank=8, threshold=8e-3)
    ls.inject(model, method)
    optimizer = torch.optim.AdamW(ls.parameter_groups(model, method), lr=1e-2)
    rows = [{"input_ids": row, "labels": (row[1] > 32).long()} for row in torch.randint(2, 64, (512, 12))]
    model, optimizer = fabric.setup(model, optimizer)
    loader = fabric.setup_dataloaders(torch.utils.data.DataLoader(rows, batch_size=16))

    steps = ls.SparseSteps(method, model, optimizer, total_steps=EPOCHS * len(loader))
    for _ in range(EPOCHS):
        for batch in loader:
            fabric.backward(model(**batch).loss)
            steps.observe()  # when gradients are complete, and before they are clipped
            fabric.clip_gradients(model, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
    steps.finish()
    # To go on later: fabric.save(path, {"model": model, "optimizer": optimizer, "steps": steps}), and fabric.load.

    for name, adapter in ls.adapters_in(model.module):
        fabric.print(f"{name}: {int((adapter.gate != 0).sum())} of {adapter.rank} ranks remain")


if __name__ == "__main__":
    main()
