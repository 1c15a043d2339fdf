"""A method whose gates are computed from a trained parameter, with a penalty in the loss: sigmoids that grow steeper.

Run:  python examples/add_a_gated_method.py
"""

from dataclasses import dataclass

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


@dataclass(eq=False, repr=False, kw_only=True)
class SteepeningLoRA(ls.SparseMethod):
    """Ranks with the gates σ(β s), 1 or 0 in evaluation (Savarese et al. 2020, arXiv:1912.04427).

    Args:
        penalty_weight: λ, the weight of the mean gate in the loss.
        steepness: β at the end of the run, which is 1 at the start. The parameter ``gate`` holds β s.
        gate_lr: Learning rate of the gates.
    """

    gated = True
    penalty_weight: float = 0.1
    steepness: float = 200.0
    gate_lr: float = 0.02

    def adapt(self, layer, overrides) -> ls.LowRankAdapter:
        adapter = super().adapt(layer, overrides)
        torch.nn.init.normal_(adapter.gate, 0.2, 0.1)  # half open, and not all alike
        return adapter

    def parameter_groups(self, adapters) -> list[dict]:
        return [{"params": [a.gate for a in adapters], "lr": self.gate_lr, "weight_decay": 0.0}]

    def effective_gate(self, gate, training) -> torch.Tensor:
        return gate.sigmoid() if training else (gate > 0).to(gate)

    def penalty(self, adapters) -> torch.Tensor:
        return self.penalty_weight * torch.cat([a.gate for a in adapters]).sigmoid().mean()

    def after_step(self, adapters, step, observed) -> None:
        torch._foreach_mul_([a.gate for a in adapters], self.steepness ** (1 / step.total))


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    rows = [{"input_ids": row, "labels": (row[1] > row[2]).long()} for row in torch.randint(2, 64, (256, 12))]
    module = ls.SparseModule(BertForSequenceClassification(config), SteepeningLoRA())
    L.Trainer(max_epochs=4, logger=False, enable_checkpointing=False).fit(
        module, torch.utils.data.DataLoader(rows, batch_size=16)
    )


if __name__ == "__main__":
    main()
