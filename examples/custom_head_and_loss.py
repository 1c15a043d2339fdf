"""A head and a loss of your own on an encoder: sub-class `SparseModule`, everything else stays as it is.

Run:  python examples/custom_head_and_loss.py
"""

import lightning as L
import torch
from torch import nn
from transformers import BertConfig, BertModel

import lit_sparse as ls


class MeanPooling(ls.SparseModule):
    """Averages the tokens' states, scores them by two layers, and asks for a margin between the scores."""

    def __init__(self, backbone, method: ls.SparseMethod, margin: float = 0.5) -> None:
        super().__init__(backbone, method)
        self.margin = margin
        self.head = None

    def configure_model(self) -> None:
        if self.model is None:  # the Trainer may ask twice
            super().configure_model()
            size = self.model.config.hidden_size
            self.head = nn.Sequential(nn.Linear(size, 16), nn.Tanh(), nn.Linear(16, 2))

    def forward(self, input_ids):
        return self.head(self.model(input_ids).last_hidden_state.mean(1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.multi_margin_loss(self(batch["input_ids"]), batch["labels"], margin=self.margin)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        right = self(batch["input_ids"]).argmax(1) == batch["labels"]
        self.log("val_accuracy", right.float().mean(), prog_bar=True)


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    labels = torch.arange(512) % 2
    tokens = torch.randint(2, 34, (512, 12)) + 30 * labels[:, None]  # one label has larger tokens than the other
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    train, val = (torch.utils.data.DataLoader(part, batch_size=16) for part in (rows[:384], rows[384:]))

    method = ls.RoseLoRA(rank=4, density=0.1)
    module = MeanPooling(BertModel(config), method)
    trainer = L.Trainer(max_epochs=8, logger=False, enable_checkpointing=False)
    trainer.fit(module, train, val)
    print(f"accuracy {trainer.callback_metrics['val_accuracy']:.2f}")


if __name__ == "__main__":
    main()
