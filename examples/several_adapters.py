"""Several adapters on one backbone in memory, each from a run of its own, switched by name for inference.

Run:  python examples/several_adapters.py
"""

import copy
import tempfile
from functools import partial
from pathlib import Path

import lightning as L
import torch
from transformers import BertConfig, BertForSequenceClassification

import lit_sparse as ls


def train(backbone, method: ls.SparseMethod, tokens, labels, path: Path) -> None:
    """One run on one task; its checkpoint holds adapters and head only."""
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, labels, strict=True)]
    module = ls.SparseModule(copy.deepcopy(backbone), method, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = L.Trainer(max_epochs=8, logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))
    trainer.save_checkpoint(path)


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    backbone = BertForSequenceClassification(config)  # or from_pretrained
    kind = torch.arange(256) % 4
    tokens = torch.randint(2, 17, (256, 12)) + 15 * kind[:, None]  # four kinds of text, each with words of its own
    tasks = {"upper": (kind >= 2).long(), "inner": ((kind == 1) | (kind == 2)).long()}
    methods = {
        "upper": ls.SoRA(["query", "value"], rank=8, sparsity_weight=0.9, gate_lr=3e-2),
        "inner": ls.RoseLoRA(rank=4, density=0.2),
    }
    bank = ls.AdapterBank(backbone)
    with tempfile.TemporaryDirectory() as folder:
        for name, labels in tasks.items():
            path = Path(folder) / f"{name}.ckpt"
            train(backbone, methods[name], tokens, labels, path)
            bank.add(name, path)  # or a folder in PEFT's format

    backbone.eval()
    for name, labels in tasks.items():
        with bank.using(name), torch.no_grad():
            found = backbone(tokens).logits.argmax(1)
        print(f"{name}: accuracy {(found == labels).float().mean():.2f}")
    with bank.rows(["upper", "inner"] * 128), torch.no_grad():  # every other row through the same adapter
        found = backbone(tokens).logits.argmax(1)
    mixed = torch.stack(list(tasks.values()), 1)[torch.arange(256), torch.arange(256) % 2]
    print(f"in one batch: accuracy {(found == mixed).float().mean():.2f}")


if __name__ == "__main__":
    main()
