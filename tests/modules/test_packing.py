"""Packed rows in lit_sparse.CausalLM: the loss and gradients of rows that are not packed, or a refusal."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch
from backbones import build_tiny, save_tiny_llama
from lightning.pytorch.callbacks import Callback
from transformers import (
    BloomForCausalLM,
    Gemma3ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTForCausalLM,
    Qwen2ForCausalLM,
)

import lit_sparse as ls
from lit_sparse.data.causal import packed
from lit_sparse.data.padding import PadRows
from lit_sparse.modules.packing import as_model_inputs

SMALL = {"num_key_value_heads": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
APART = [
    (LlamaForCausalLM, SMALL),
    (Qwen2ForCausalLM, SMALL),
    (Gemma3ForCausalLM, {**SMALL, "head_dim": 8, "sliding_window": 4}),
    (GPT2LMHeadModel, NO_DROPOUT),
]
TOGETHER = [(BloomForCausalLM, {}), (OPTForCausalLM, {"ffn_dim": 64, "word_embed_proj_dim": 32})]


def rows(count=9):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(5, 60, (3 + n % 5,), generator=generator).tolist() for n in range(count)]
    return {"input_ids": ids, "labels": [[-100, *row[1:]] if n % 2 else row for n, row in enumerate(ids)]}


def batches(max_length=12):
    """The same rows, one in each sequence and packed."""

    def collated(columns):
        columns = {name: values for name, values in columns.items() if name != "length"}
        table = zip(*columns.values(), strict=True)
        return PadRows(0)([dict(zip(columns, row, strict=True)) for row in table])

    apart, together = collated(rows()), collated(packed(rows(), max_length))
    assert len(together["input_ids"]) < len(apart["input_ids"])
    return apart, together


def module(model_class, config, **more):
    made = ls.CausalLM(build_tiny(model_class, **config, **more), ls.SoRA(rank=4, threshold=1e-3))
    made.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return made


def loss_and_gradients(made, batch):
    loss = made(**batch).loss
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])
    made.zero_grad()
    return loss.detach(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("model_class", "config"), APART)
def test_packed_rows_have_the_loss_and_gradients_of_rows_apart(model_class, config, attention):
    made = module(model_class, config, attn_implementation=attention)
    apart, together = batches()
    loss, gradients = loss_and_gradients(made, apart)
    packed_loss, packed_gradients = loss_and_gradients(made, together)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(packed_gradients, gradients, rtol=1e-4, atol=1e-5)
    assert gradients.abs().max() > 1e-2
    assert made.model.training


def test_for_flash_attention_all_sequences_become_one():
    """Flash attention itself needs a GPU; rows in one long sequence have the same loss with any attention."""
    made = module(*APART[0])
    apart, together = batches()
    flash = SimpleNamespace(config=SimpleNamespace(_attn_implementation="flash_attention_2"))
    given = as_model_inputs(together, flash)
    assert given["input_ids"].shape == given["labels"].shape == (1, together["input_ids"].numel())
    torch.testing.assert_close(made.model(**given).loss, made(**apart).loss, rtol=1e-5, atol=1e-6)
    assert as_model_inputs(together, made.model)["input_ids"].shape == together["input_ids"].shape


@pytest.mark.parametrize(("model_class", "config"), TOGETHER)
def test_a_model_in_which_packed_rows_see_each_other_is_refused(model_class, config):
    made = module(model_class, config)
    with pytest.raises(ls.UsageError, match="packing to false"):
        made(**batches()[1])
    assert made.model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("model_class", "config"), APART)
def test_rounding_is_not_taken_for_rows_that_see_each_other(model_class, config, dtype):
    made = module(model_class, config)
    made.model.to(dtype)
    assert made(**batches()[1]).loss.isfinite()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    words = ["good", "film", "the", "cat", "sat", "dog", "runs", "house"]
    found = [{"question": " ".join(words[: 1 + n % 8]), "output": words[n % 8]} for n in range(24)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return SimpleNamespace(rows=str(folder / "train.jsonl"), llama=save_tiny_llama(folder / "llama"))


def trained(project, trainer, batch_size, packing, ckpt_path=None, **options):
    """The trained parameters of a run, and the Trainer."""
    torch.manual_seed(0)
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-2)
    made = ls.CausalLM(project.llama, ls.SoRA(rank=4, threshold=1e-3), optimizer=optimizer, lr_schedule="constant")
    data = ls.InstructionData(
        data_files={"train": project.rows, "validation": project.rows},
        template="{question}",
        max_length=48,
        batch_size=batch_size,
        packing=packing,
    )
    run = trainer(limit_val_batches=0, **options)
    run.fit(made, data, ckpt_path=ckpt_path)
    return {name: p.detach().clone() for name, p in made.named_parameters() if p.requires_grad}, run


def test_a_packed_run_ends_where_the_same_rows_end_apart(project, trainer):
    apart, _ = trained(project, trainer, 24, packing=False, max_steps=6)
    together, run = trained(project, trainer, 24, packing=True, max_steps=6)
    assert run.num_training_batches == 1  # the same rows in every step
    for name, value in apart.items():
        torch.testing.assert_close(together[name], value, rtol=0, atol=1e-4)


class SaveAt(Callback):
    def __init__(self, step, file):
        self.step, self.file = step, file

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.file)


def test_a_packed_run_resumes_in_the_middle_of_an_epoch(project, trainer, tmp_path):
    file = str(tmp_path / "middle.ckpt")
    whole, run = trained(project, trainer, 1, packing=True, max_epochs=2, callbacks=[SaveAt(2, file)])
    assert run.num_training_batches > 3
    resumed, _ = trained(project, trainer, 1, packing=True, max_epochs=2, ckpt_path=file)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())
