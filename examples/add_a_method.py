"""A sparse method of your own is one class: magnitude pruning of the entries of A and B, here.

Run:  python examples/add_a_method.py
"""

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


class MagnitudeLoRA(ls.SparseMethod):
    """Keep the largest entries of each row of A and column of B, a share that shrinks to `density`."""

    def __init__(self, target_modules: str | list[str] = "all-linear", rank: int = 8, density: float = 0.1) -> None:
        super().__init__(
            target_modules, rank, alpha=rank, dropout=0, layers=None, exclude_modules=None, train_head=True
        )
        self.density = density

    def after_step(self, adapters, step, observed) -> None:
        share = ls.functional.cubic_density(step.index, step.total, self.density, begin=0.1, end=0.8)
        for adapter in adapters:
            for matrix in (adapter.lora_A, adapter.lora_B_t):  # both hold one rank per row
                matrix.mul_(ls.functional.top_fraction_mask(matrix.abs(), share, dim=1))


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    tokens = torch.randint(2, 64, (256, 12))
    rows = [{"input_ids": row, "labels": (row[1] > row[2]).long()} for row in tokens]

    module = ls.SparseModule(BertForSequenceClassification(config), MagnitudeLoRA())
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))

    kept = [int((adapter.lora_A != 0).sum(1).max()) for _, adapter in ls.adapters_in(module)]
    print(f"entries kept in each row of A: {sorted(set(kept))}")


if __name__ == "__main__":
    main()
