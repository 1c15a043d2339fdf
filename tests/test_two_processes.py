"""Under DDP, two real processes take the steps of one with the same global batch, and agree on what is zero."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys
import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from transformers import BertConfig, BertForSequenceClassification
import lit_sparse as ls

METHODS = {
    "sora": lambda: ls.SoRA(rank=4, threshold=0.03),
    "roselora": lambda: ls.RoseLoRA(rank=4, density=0.2, begin=2, end=10),
}

class InOrder(L.LightningDataModule):
    "Deals the rows of each global batch of 8 out in turn; Lightning's own sampler would shuffle them."

    def train_dataloader(self):
        tokens = torch.randint(2, 64, (96, 8), generator=torch.Generator().manual_seed(1))
        rows = [{"input_ids": row, "labels": (row[0] > 32).long()} for row in tokens]
        ranks, rank = self.trainer.world_size, self.trainer.global_rank
        sampler = torch.utils.data.DistributedSampler(rows, ranks, rank, shuffle=False)
        return torch.utils.data.DataLoader(rows, batch_size=8 // ranks, sampler=sampler)


def main(kind, processes):
    L.seed_everything(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )
    module = ls.SparseModule(BertForSequenceClassification(config), METHODS[kind]())
    module.configure_model()  # before Lightning seeds anew, as it does under DDP alone: the same start for both
    trainer = L.Trainer(
        accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto", max_epochs=1,
        logger=CSVLogger(f"{kind}_{processes}"),
        enable_checkpointing=False, enable_progress_bar=False, gradient_clip_val=0.5,
        precision="64-true",  # Adam divides tiny gradients by their size, rounding errors and all
    )
    trainer.fit(module, datamodule=InOrder())
    weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    torch.save(weights, f"{kind}_{processes}_{trainer.global_rank}.pt")

if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sora", "roselora"])
def test_ddp_equals_one_process(tmp_path: Path, kind: str) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    for processes in (1, 2):
        command = [sys.executable, "train.py", kind, str(processes)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / f"{kind}_{processes}").rglob("sparsity.csv"))) == 1
    alone, first, second = (
        torch.load(tmp_path / f"{kind}_{run}.pt", weights_only=True) for run in ("1_0", "2_0", "2_1")
    )
    zeros = 0
    for name, weight in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], weight, rtol=1e-6, atol=1e-9)
        assert torch.equal(first[name] == 0, weight == 0), name
        zeros += int((weight == 0).sum())
    assert zeros > 0
