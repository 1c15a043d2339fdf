"""Manual optimization: two optimizers, of which one holds the adapters. `Sparsify` follows that one.

Run:  python examples/manual_optimization.py
"""

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


class TwoOptimizers(L.LightningModule):
    """The adapters take a step at every batch, the classifier at every second."""

    def __init__(self, method: ls.SparseMethod) -> None:
        super().__init__()
        self.automatic_optimization = False
        config = BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
        )
        self.model = BertForSequenceClassification(config)
        ls.inject(self.model, method)

    def training_step(self, batch, batch_idx):
        adapters, head = self.optimizers()  # step these, not the torch optimizers within
        loss = self.model(**batch).loss
        self.manual_backward(loss)
        adapters.step()
        adapters.zero_grad()
        if batch_idx % 2:
            head.step()
            head.zero_grad()
        self.log("train_loss", loss, prog_bar=True)

    def configure_optimizers(self):
        head = set(self.model.classifier.parameters())
        adapters = [p for p in self.model.parameters() if p.requires_grad and p not in head]
        return torch.optim.AdamW(adapters, lr=5e-3), torch.optim.SGD(head, lr=1e-2)


def main() -> None:
    L.seed_everything(0)
    rows = [{"input_ids": row, "labels": (row[1] > 32).long()} for row in torch.randint(2, 64, (256, 12))]
    method = ls.RoseLoRA(["query", "value"], rank=4, density=0.1)
    module = TwoOptimizers(method)
    trainer = L.Trainer(max_epochs=4, callbacks=[ls.Sparsify(method)], logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))

    kept = {int((adapter.lora_A != 0).sum(1).max()) for _, adapter in ls.adapters_in(module)}
    print(f"entries kept in each row of A: {sorted(kept)}")


if __name__ == "__main__":
    main()
