"""Train with lit_sparse, predict without it: the merged folder in transformers, the same adapters in PEFT.

Run:  python examples/predict_with_transformers.py
"""

import copy
import importlib.util
import tempfile
from functools import partial
from pathlib import Path

import lightning as L
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification

import lit_sparse as ls


def answers(model, tokens):
    """What a pipeline does between tokenizer and label: logits, and the class with the largest."""
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens).logits
    return logits, [model.config.id2label[int(number)] for number in logits.argmax(1)]


def main() -> None:
    L.seed_everything(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    backbone = BertForSequenceClassification(config)  # or from_pretrained
    kind = torch.arange(256) % 2
    tokens = torch.randint(2, 33, (256, 12)) + 31 * kind[:, None]  # two kinds of text, each with words of its own
    rows = [{"input_ids": row, "labels": label} for row, label in zip(tokens, kind, strict=True)]
    method = ls.SoRA(["query", "value"], rank=8, sparsity_weight=0.9, gate_lr=3e-2)
    module = ls.SparseModule(copy.deepcopy(backbone), method, optimizer=partial(torch.optim.AdamW, lr=1e-2))
    trainer = L.Trainer(max_epochs=10, logger=False, enable_checkpointing=False)
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=16))
    expected, labels = answers(module.model, tokens)
    right = sum(label == f"LABEL_{number}" for label, number in zip(labels, kind.tolist(), strict=True))
    print(f"lit_sparse: accuracy {right / len(labels):.2f}")
    with tempfile.TemporaryDirectory() as folder:
        lora, merged = Path(folder) / "lora", Path(folder) / "merged"
        print(ls.export_peft(module.model, lora))
        print(ls.export_merged(module.model, merged))  # last: it merges the model in place

        logits, found = answers(AutoModelForSequenceClassification.from_pretrained(merged), tokens)
        print(f"transformers: same answers {found == labels}, difference {(logits - expected).abs().max():.0e}")
        if importlib.util.find_spec("peft") is None:
            print("PEFT: not installed, skipped")
            return
        from peft import PeftModel

        logits, found = answers(PeftModel.from_pretrained(backbone, lora), tokens)
        print(f"PEFT: same answers {found == labels}, difference {(logits - expected).abs().max():.0e}")


if __name__ == "__main__":
    main()
