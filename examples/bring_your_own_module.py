"""Sparse adapters in a LightningModule of your own: `inject` and `Sparsify`, nothing else changes.

Run:  python examples/bring_your_own_module.py
"""

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


class MyModule(L.LightningModule):
    """A module as you may have it already: its own model, step and optimizer."""

    def __init__(self, method: ls.SparseMethod) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        self.model = BertForSequenceClassification(config)  # or YourModel.from_pretrained(...)
        self.method = method
        ls.inject(self.model, method)  # freezes it, but for the adapters and the classifier

    def training_step(self, batch, batch_idx):
        loss = self.model(input_ids=batch[0], labels=batch[1]).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW(ls.parameter_groups(self.model, self.method), lr=1e-2)


def main() -> None:
    L.seed_everything(0)
    tokens = torch.randint(2, 64, (512, 12))
    labels = (tokens[:, 1] > tokens[:, 2]).long()
    rows = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(tokens, labels), batch_size=16, shuffle=True)

    method = ls.SoRA(target_modules=["query", "value"], rank=8, threshold=5e-3)
    module = MyModule(method)
    trainer = L.Trainer(max_epochs=8, callbacks=[ls.Sparsify(method)], logger=False, enable_checkpointing=False)
    trainer.fit(module, rows)

    for name, adapter in ls.adapters_in(module):
        print(f"{name}: {int((adapter.gate != 0).sum())} of {adapter.rank} ranks remain")


if __name__ == "__main__":
    main()
