"""Teach a tiny language model facts about made-up cities, then change some, and nothing else: edits by RoseLoRA.

Run:  python examples/edit_generated_facts.py
"""

import itertools
import json
import random
from pathlib import Path

import lightning as L
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import lit_sparse as ls

CITIES = ["".join(parts) for parts in itertools.product(["ka", "lo", "mi", "ren", "tu", "vash"], repeat=3)][::2]
ASK = {"country": ["{} lies in", "the country of {} is"], "river": ["{} stands on the", "the river of {} is"]}


def pretrain(facts, folder):
    """Write a four-layer Llama that knows country and river of every city, and its tokenizer."""
    texts = [f"{ask.format(city)} {facts[city, r]} </s>" for city in CITIES for r in ASK for ask in ASK[r]]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", *sorted({*" ".join(texts).split()})])}))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")  # noqa: S106
    size = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, **size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    ids = tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
    for _ in range(400):
        rows = ids[torch.randperm(len(ids))[:240]]
        model(rows, labels=rows.masked_fill(rows == 0, -100)).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    model.save_pretrained(folder), tokenizer.save_pretrained(folder)


def request(facts, city, rng):
    """Move a city to another country; its river, and the countries of other cities, are to stay."""
    others = [c for c in rng.sample(CITIES, 6) if c != city]
    countries = [{"prompt": f"{c} lies in", "ground_truth": facts[c, "country"]} for c in others]
    river = [{"prompt": f"{city} stands on the", "ground_truth": facts[city, "river"]}]
    new = rng.choice([f"country{i}" for i in range(12) if f"country{i}" != facts[city, "country"]])
    ask, rephrase = (text.format(city) for text in ASK["country"])
    return {"prompt": ask, "target_new": new, "rephrase": rephrase, "locality": {"other": countries, "own": river}}


if __name__ == "__main__":
    L.seed_everything(0)
    rng, folder = random.Random(0), Path("edit_generated_facts")
    facts = {(city, relation): f"{relation}{rng.randrange(12)}" for city in CITIES for relation in ASK}
    pretrain(facts, folder / "model")
    (folder / "requests.json").write_text(json.dumps([request(facts, city, rng) for city in rng.sample(CITIES, 10)]))
    method = ls.RoseLoRA(["down_proj"], rank=4, alpha=8, density=0.1, begin=3, end=20)
    options = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=5e-3), "fluency_tokens": 0}
    editor = ls.Editor(str(folder / "model"), method, str(folder / "edits"), **options)
    trainer = L.Trainer(accelerator="cpu", inference_mode=False, logger=False)
    trainer.test(editor, ls.EditingData(str(folder / "requests.json")))
