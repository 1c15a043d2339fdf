"""A language model that was adapted, in every form in which it is stored, for the commands that let it write."""

from pathlib import Path

import torch
from backbones import save_tiny_llama
from trained import save_checkpoint
from transformers import AutoTokenizer

import lit_sparse as ls

TEMPLATE = (
    "{{ bos_token }}{% for turn in messages %}{{ turn.role }}: {{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)

EXPORTS = ("merged", "peft", "sparse", "delta")
FORMS = ("checkpoint", *EXPORTS)
SEED = 4  # of adapters that change some answers


def save_language_model(folder: Path, chat: bool) -> dict[str, str]:
    """Write ``base``, ``run.ckpt`` and its exports ``merged``, ``peft``, ``sparse`` and ``delta``; name to path."""
    base = save_tiny_llama(folder / "base")
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(base)
    with torch.random.fork_rng(devices=[]):  # the same in every test
        torch.manual_seed(SEED)
        checkpoint = save_checkpoint(ls.CausalLM(base, ls.SoRA(rank=4, threshold=0.01)), folder / "run.ckpt", std=1.0)
    for form in EXPORTS:
        ls.export_checkpoint(checkpoint, str(folder / form), format=form)
    return {"base": base, "checkpoint": checkpoint, **{form: str(folder / form) for form in EXPORTS}}
