"""A sparse method of your own is one class: here each layer keeps its ranks of largest magnitude.

Run:  python examples/add_a_method.py
"""

from dataclasses import dataclass

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


@dataclass(eq=False, repr=False, kw_only=True)
class MagnitudeRanks(ls.SparseMethod):
    """Keep the ranks with the largest product of norms of A's row and B's column; their number shrinks in the run.

    Args:
        kept: Ranks that each layer keeps at the end.
    """

    kept: int = 2

    def after_step(self, adapters, step, observed) -> None:
        for adapter in adapters:
            final = self.kept / adapter.max_rank
            share = ls.functional.cubic_density(step.index, step.total, final, begin=0.1, end=0.8)
            magnitudes = adapter.lora_A.norm(dim=1) * adapter.lora_B_t.norm(dim=1)  # both hold one rank per row
            mask = ls.functional.top_fraction_mask(magnitudes, share, dim=0)
            adapter.lora_B_t.mul_(mask.unsqueeze(1))


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    tokens = torch.randint(2, 64, (256, 12))
    rows = [{"input_ids": row, "labels": (row[1] > row[2]).long()} for row in tokens]

    module = ls.SparseModule(BertForSequenceClassification(config), MagnitudeRanks())
    trainer = L.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))

    kept = [int((adapter.lora_B_t != 0).any(1).sum()) for _, adapter in ls.adapters_in(module)]
    print(f"ranks kept in each layer: {sorted(set(kept))}")


if __name__ == "__main__":
    main()
