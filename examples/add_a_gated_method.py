"""A method whose gates are computed from a trained parameter, with a penalty in the loss: hard-concrete gates.

Run:  python examples/add_a_gated_method.py
"""

from dataclasses import dataclass

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


@dataclass(eq=False, repr=False, kw_only=True)
class HardConcreteLoRA(ls.SparseMethod):
    """Ranks with hard-concrete gates (Louizos et al. 2018, arXiv:1712.01312), drawn at random in training.

    Args:
        penalty_weight: λ, the weight of the expected share of open gates in the loss.
        gate_lr: Learning rate of log α.
    """

    gated = True
    penalty_weight: float = 1.0
    gate_lr: float = 0.1

    def adapt(self, layer, overrides) -> ls.LowRankAdapter:
        adapter = super().adapt(layer, overrides)
        torch.nn.init.constant_(adapter.gate, 2.0)  # log α: open at first
        return adapter

    def parameter_groups(self, adapters) -> list[dict]:
        return [{"params": [a.gate for a in adapters], "lr": self.gate_lr, "weight_decay": 0.0}]

    def effective_gate(self, gate, training) -> torch.Tensor:  # Eqs. (10)-(13), β = 2/3, γ = -0.1, ζ = 1.1
        noise = torch.rand_like(gate).clamp(1e-6, 1 - 1e-6).logit() if training else 0.0
        soft = ((noise + gate) / (2 / 3 if training else 1.0)).sigmoid()
        return (soft * 1.2 - 0.1).clamp(0, 1)

    def penalty(self, adapters) -> torch.Tensor:  # Eq. (12): β · log(-γ/ζ) = -1.6
        return self.penalty_weight * (torch.cat([a.gate for a in adapters]) + 1.6).sigmoid().mean()


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    tokens = torch.randint(2, 64, (256, 12))
    rows = [{"input_ids": row, "labels": (row[1] > row[2]).long()} for row in tokens]
    module = ls.SparseModule(BertForSequenceClassification(config), HardConcreteLoRA())
    L.Trainer(max_epochs=4, logger=False, enable_checkpointing=False).fit(
        module, torch.utils.data.DataLoader(rows, batch_size=16)
    )


if __name__ == "__main__":
    main()
