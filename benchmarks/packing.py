"""How many tokens a second a language model is trained on when rows are packed, against rows that are padded.

Run:  python benchmarks/packing.py [--model quickstart://SmolLM2-135M-Instruct] [--rows 2000] [--max_length 256]
      [--rounds 10] [--json FILE]

The rows are movie reviews of the quickstart's set, sentences and whole texts, as responses to a prompt. A round trains
SoRA on one batch of each kind; batches hold about as many tokens. Tokens are those of rows, without padding, and
seconds those of the process's CPU time, by one thread in bfloat16. A ratio is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import statistics
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import tables
import torch
from variants import provenance, ratio, write_json

import lit_sparse as ls
from lit_sparse.data import quickstart

SEQUENCES = 4
KINDS: dict[str, dict[str, Any]] = {
    "padded, shuffled": {"length_grouped": False},
    "padded, grouped by length": {},
    "packed": {"packing": True, "batch_size": SEQUENCES},
}


def rows_of(file: Path, count: int, model: str, max_length: int) -> dict[str, ls.InstructionData]:
    """The same rows in batches of each kind, which hold about as many tokens."""
    with quickstart.reviews_csv().open(encoding="utf-8", newline="") as reviews:
        texts = random.Random(0).sample([row["text"] for row in csv.DictReader(reviews)], count)
    file.write_text("".join(json.dumps({"title": "a film", "text": text}) + "\n" for text in texts))
    made = {}
    for name, options in KINDS.items():
        data = ls.InstructionData(
            str(file),
            template="Write a review of {title}.\n",
            response="text",
            tokenizer=model,
            max_length=max_length,
            validation_fraction=0.1,
            **{"batch_size": 1, **options},
        )
        data.setup("fit")
        if "batch_size" not in options:
            lengths = data._prepared["train"][0]["length"]
            data.batch_size = round(SEQUENCES * max_length / statistics.mean(lengths))
        made[name] = data
    return made


def tokens_of(batch: dict[str, Any], pad_token_id: int) -> int:
    """The tokens of the rows in a batch."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"].sum())
    first = batch["position_ids"] == 0
    # A row has more than one token; padding is a token of its own at position 0.
    alone = first & torch.cat([first[:, 1:], torch.ones_like(first[:, :1])], 1) & (batch["input_ids"] == pad_token_id)
    return int((~alone).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart://SmolLM2-135M-Instruct")
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", help="write the figures there too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = ls.SoRA(rank=8, budget=0.25)
    module = ls.CausalLM(options.model, method)
    module.configure_model()
    optimizer = torch.optim.AdamW(ls.parameter_groups(module, method), lr=1e-4, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        data = rows_of(Path(folder) / "train.jsonl", options.rows, options.model, options.max_length)
        loaders = {name: cycle(kind.train_dataloader()) for name, kind in data.items()}
        speeds: dict[str, list[float]] = {name: [] for name in KINDS}
        padding: dict[str, list[float]] = {name: [] for name in KINDS}
        for _ in range(options.rounds + 1):
            for name, kind in data.items():
                batch = next(loaders[name])
                start = time.process_time()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = module(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tokens = tokens_of(batch, kind.pad_token_id)
                speeds[name].append(tokens / (time.process_time() - start))
                padding[name].append(1 - tokens / batch["input_ids"].numel())
    found = {}
    for name in KINDS:  # the first batch is a warm-up
        found[name] = {
            "speed": statistics.median(speeds[name][1:]),
            "padding": statistics.mean(padding[name]),
            "ratio": ratio(speeds[name][1:], speeds["padded, shuffled"][1:]),
        }
    content = {**provenance(), **vars(options), "kinds": found}
    print(tables.of_packing(content))
    write_json(options.json, content)


if __name__ == "__main__":
    main()
