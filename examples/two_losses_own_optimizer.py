"""Two losses, the second against the model as it was before training; and an optimizer of your own.

Run:  python examples/two_losses_own_optimizer.py
"""

from functools import partial

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


class Lion(torch.optim.Optimizer):
    """Steps of the size of the learning rate in the direction of the momentum's sign (Chen et al. 2023)."""

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure):
        loss = closure()  # Lightning always gives one, and it enables gradients itself
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                direction = momentum.lerp(p.grad, 1 - group["betas"][0]).sign_()
                p.sub_(group["lr"] * direction)
                momentum.lerp_(p.grad, 1 - group["betas"][1])
        return loss


class StayClose(ls.SparseModule):
    """Learns the labels, while the hidden states stay near those of the pretrained model."""

    def training_step(self, batch, batch_idx):
        output = self(**batch, output_hidden_states=True)
        with torch.no_grad(), ls.disable_adapters(self.model):
            before = self(**batch, output_hidden_states=True).hidden_states[-1]
        drift = torch.nn.functional.mse_loss(output.hidden_states[-1], before)
        self.log_dict({"train_loss": output.loss, "drift": drift}, prog_bar=True)
        return output.loss + 0.1 * drift


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    labels = torch.arange(256) % 2
    tokens = torch.randint(2, 34, (256, 12)) + 30 * labels[:, None]  # one label has larger tokens than the other
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    method = ls.SoRA(rank=8, sparsity_weight=0.9, gate_lr=5e-2)
    module = StayClose(BertForSequenceClassification(config), method, optimizer=partial(Lion, lr=1e-3))
    trainer = L.Trainer(max_epochs=8, logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))
    print(", ".join(f"{name} {trainer.callback_metrics[name]:.2f}" for name in ("train_loss", "drift")))


if __name__ == "__main__":
    main()
