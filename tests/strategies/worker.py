"""Trains tiny models in as many processes as torchrun starts: ``worker.py RUNS``, a file with a list of runs."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import lit_sparse as ls
from lit_sparse.adapters.naming import clean_name
from lit_sparse.data.rows import RowData
from lit_sparse.data.sampling import RowSampler
from lit_sparse.modules.backbone import load_backbone

GLOBAL_BATCH = 8
METHODS: dict[str, Any] = {
    "sora": lambda **o: ls.SoRA(rank=4, threshold=0.01, **o),
    "refit": lambda **o: ls.SoRA(rank=4, threshold=0.03, refit=0.4, **o),
    "roselora": lambda **o: ls.RoseLoRA(rank=4, density=0.2, begin=5, end=30, **o),
    "changed": lambda **o: ls.RoseLoRA(rank=4, changed=0.1, begin=5, end=30, **o),
    "budget": lambda **o: ls.SoRA(rank=4, budget=0.4, begin=5, end=30, **o),
    "budget_norm": lambda **o: ls.SoRA(rank=4, budget=0.4, score="norm", begin=5, end=30, **o),
    "budget_sensitivity": lambda **o: ls.SoRA(rank=4, budget=0.4, score="sensitivity", begin=5, end=30, **o),
    "hard_concrete": lambda **o: ls.HardConcreteLoRA(rank=4, budget=0.4, begin=2, end=30, **o),
    "gora": lambda **o: ls.LoRA(rank=4, layers=[0, 1], init_weights="gora", start_batches=3, gora_gamma=1.0, **o),
    "lora_ga": lambda **o: ls.LoRA(rank=4, layers=[0, 1], init_weights="lora_ga", start_batches=3, **o),
    "eva": lambda **o: ls.LoRA(rank=4, layers=[0, 1], init_weights="eva", start_batches=2, **o),
    "gated": lambda **o: ls.GatedRoseLoRA(rank=4, threshold=0.01, density=0.2, begin=5, end=30, **o),
    "shira": lambda dropout, **o: ls.SHiRA(changed=0.1, mask="random", **o),
    "lift": lambda dropout, **o: ls.LIFT(changed=0.1, filter_rank=4, **o),
    "lift_moving": lambda dropout, **o: ls.LIFT(changed=0.1, filter_rank=4, update_every=3, **o),
    "shira_snip": lambda dropout, **o: ls.SHiRA(changed=0.1, mask="snip", start_batches=3, **o),
    "spiel": lambda dropout, **o: ls.SpIEL(changed=0.1, update_every=5, window=3, replaced=0.5, **o),
}
STRATEGIES: dict[str, Any] = {
    "ddp": lambda: "ddp",
    "fsdp": ls.SparseFSDPStrategy,
    "fsdp2": ls.SparseFSDP2Strategy,
    "fsdp2_offload": lambda: ls.SparseFSDP2Strategy(cpu_offload=True),
}


class OtherRows(L.LightningDataModule):
    """What is not trained on."""

    def val_dataloader(self) -> DataLoader[Any]:
        tokens = torch.randint(2, 64, (6, 8), generator=torch.Generator().manual_seed(2))
        return DataLoader([{"input_ids": row} for row in tokens], batch_size=4)  # type: ignore[arg-type]


@torch.no_grad()
def drift(module: ls.SparseModule, batches: Iterable[Any], _: Any) -> dict[str, float]:
    """How far the scores are from those of the pretrained model, in the mean over the batches."""
    found = []
    for batch in batches:
        scores = module(**batch).logits
        with ls.disable_adapters(module):
            found.append(float((scores - module(**batch).logits).square().mean()))
    return {"loss": sum(found) / len(found)}


class InOrder(RowData):
    """Deals the rows of each global batch out in turn, whatever the number of processes."""

    def __init__(self, rows: int, batch: int) -> None:
        super().__init__(batch_size=batch)
        self.rows = rows

    def _prepare(self, stage: str) -> dict[str, list[Dataset]]:
        tokens = torch.randint(2, 64, (self.rows, 8), generator=torch.Generator().manual_seed(1))
        rows = {"input_ids": tokens.tolist(), "labels": (tokens[:, 0] > 32).long().tolist()}
        return {"train": [Dataset.from_dict(rows)]}

    def _collator(self, role: str) -> Any:
        return lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in rows[0]}

    def _train_sampler(self, rows: Dataset, shard: dict[str, Any]) -> RowSampler:
        return RowSampler(rows, **shard, shuffle=False)


class ForCausalLM(ls.SparseModule):
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        return super().training_step({"input_ids": batch["input_ids"], "labels": batch["input_ids"]}, batch_idx)


class ForPairs(ls.PreferenceLM):
    """Prefers rows to the same rows in reverse."""

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        pairs = torch.stack([batch["input_ids"], batch["input_ids"].flip(1)], dim=1)
        labels = pairs.clone()
        labels[..., :3] = -100
        return {"input_ids": pairs, "labels": labels}


class OwnModule(L.LightningModule):
    """A user's module, with a head beside the backbone."""

    def __init__(self, method: ls.SparseMethod, dropout: float) -> None:
        super().__init__()
        self.method = method
        self.encoder = BertModel(bert_config(dropout), add_pooling_layer=False)
        ls.inject(self.encoder, method)
        self.head = torch.nn.Linear(32, 2)

    def configure_callbacks(self) -> list[L.Callback]:
        return [ls.Sparsify(self.method)]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        states = self.encoder(batch["input_ids"]).last_hidden_state
        return torch.nn.functional.cross_entropy(self.head(states.mean(1)), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(ls.parameter_groups(self, self.method), lr=1e-3)


class SameDraws(L.Callback):
    """Random numbers of training begin alike with one process and with several, for which Lightning seeds anew."""

    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 0:
            torch.manual_seed(0)


class SaveAt(L.Callback):
    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Traffic(TorchDispatchMode):
    """Counts what collectives send, by name: calls and bytes of the tensors given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            tensors = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
            size = sum(t.numel() * t.element_size() for t in tensors)
            self.calls.setdefault(func._schema.name.removeprefix("c10d::"), []).append(size)
        return func(*args, **(kwargs or {}))


class CountTraffic(L.Callback):
    """Writes down, for every step, what is sent from its first batch's start to its last batch's end."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.steps: list[dict[str, list[int]]] = []

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        self.traffic = Traffic()
        self.traffic.__enter__()

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.traffic.__exit__(None, None, None)
        self.steps.append(self.traffic.calls)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
            tensors = sum(1 for p in module.parameters() if p.requires_grad)
            Path(self.path).write_text(json.dumps({"trained": trained, "tensors": tensors, "steps": self.steps}))


def bert_config(dropout: float) -> BertConfig:
    return BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def module_of(
    arch: str, method: str, dropout: float, recompute: bool, compiled: bool | dict[str, Any]
) -> ls.SparseModule | OwnModule:
    if arch in ("llama", "pairs", "rows"):
        config: Any = LlamaConfig(
            vocab_size=512 if arch == "rows" else 64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            attention_dropout=dropout,
        )
        made = METHODS[method](dropout=dropout, train_head=["lm_head"] if arch == "pairs" else True)
        kind: Any = {"llama": ForCausalLM, "pairs": ForPairs, "rows": ls.CausalLM}[arch]
        return kind(LlamaForCausalLM(config), made, gradient_checkpointing=recompute, compile=compiled)
    if arch == "own":
        return OwnModule(METHODS[method](dropout=dropout), dropout)
    return ls.SparseModule(BertForSequenceClassification(bert_config(dropout)), METHODS[method](dropout=dropout))


def packed_module(folder: str, quantization: dict[str, Any], method: str, recompute: bool) -> ls.SparseModule:
    """The model of a folder, loaded with a ``quantization_config``."""
    model = load_backbone(folder, AutoModelForCausalLM, quantization_config=quantization)
    return ForCausalLM(model, METHODS[method](), gradient_checkpointing=recompute)


def packed_rows(rows: str, tokenizer: str, batch: int) -> ls.InstructionData:
    """Rows of a file, in sequences that processes deal out as one process takes them."""
    return ls.InstructionData(
        data_files={"train": rows},
        tokenizer=tokenizer,
        template="{question}",
        max_length=32,
        packing=True,
        length_grouped=False,
        batch_size=batch,
    )


def main(run: dict[str, Any]) -> None:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps, accumulate = run.get("steps", 50), run.get("accumulate", 1)
    L.seed_everything(0)
    if "quantization" in run:
        module: Any = packed_module(run["arch"], run["quantization"], run["method"], run["recompute"])
    else:
        chosen = run.get("dropout", 0.0), run.get("recompute", False), run.get("compile", False)
        module = module_of(run["arch"], run["method"], *chosen)
    starts = ("gora", "lora_ga", "eva", "shira_snip")  # in the run
    if isinstance(module, ls.SparseModule) and run["method"] not in starts:
        module.configure_model()  # before Lightning seeds anew, as it does with processes alone: the same start for all
    callbacks: list[Any] = [SameDraws()]
    if "save" in run:
        callbacks.append(SaveAt(run["save_at"], run["save"]))
    if "traffic" in run:
        callbacks.append(CountTraffic(run["traffic"]))
    if "tolerance" in run:
        callbacks.append(ls.ForgettingCap(OtherRows(), run["tolerance"], measure=drift))
    if "compact_every" in run:
        callbacks.append(ls.CompactRanks(run["compact_every"]))
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=STRATEGIES[run["strategy"]]() if processes > 1 else "auto",
        max_epochs=1,
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=0.5,
        precision=run.get("precision", "32-true"),
        limit_val_batches=0,
        callbacks=callbacks,
        logger=CSVLogger(run["logs"]) if "logs" in run else False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    batch = GLOBAL_BATCH // accumulate // processes
    data = packed_rows(run["rows"], run["tokenizer"], batch) if "rows" in run else InOrder(GLOBAL_BATCH * steps, batch)
    trainer.fit(module, datamodule=data, ckpt_path=run.get("resume"))
    assert trainer.global_step == steps
    if "tolerance" in run:
        Path(f"{run['tag']}_{trainer.global_rank}.json").write_text(
            json.dumps([callbacks[-1].after, callbacks[-1].scale])
        )
    state = {clean_name(name): p.detach() for name, p in module.named_parameters() if p.requires_grad}
    low_rank = [(name, a) for name, a in ls.adapters_in(module) if isinstance(a, ls.LowRankAdapter)]
    computed = [(name, adapter) for name, adapter in low_rank if adapter.gate_function is not None]
    state |= {f"{name}.effective_gate": adapter.effective_gate().detach() for name, adapter in computed}
    state |= {f"{n}.{own}": b for n, a in ls.adapters_in(module) for own, b in a.named_buffers(recurse=False)}
    torch.save(state, f"{run['tag']}_{trainer.global_rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for wanted in json.loads(Path(sys.argv[1]).read_text()):
        main(wanted)
