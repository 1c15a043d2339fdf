"""Several programs on one machine read the same rows into the same cache at once, as a sweep over settings does."""

import csv
import json
import os
import subprocess
import sys

import pytest
from backbones import save_tiny_tokenizer

PROCESSES = 8

# Imports once; then every process reads, tokenizes and caches the same files, at the same moment.
PROGRAM = """
import hashlib, json, multiprocessing, sys

import lit_sparse as ls


def read(barrier, answers):
    data = ls.TextClassificationData("rows", tokenizer="tokenizer", batch_size=16, seed=3)
    barrier.wait(60)
    data.prepare_data()
    data.setup("fit")
    found = hashlib.sha256()
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for name, value in sorted(batch.items()):
            found.update(name.encode() + value.numpy().tobytes())
    answers.put(found.hexdigest())


ls.TextClassificationData  # imported once: public names are lazy
count = int(sys.argv[1])
context = multiprocessing.get_context("fork")
barrier, answers = context.Barrier(count), context.Queue()
children = [context.Process(target=read, args=(barrier, answers)) for _ in range(count)]
for child in children:
    child.start()
found = [answers.get(timeout=120) for _ in children]
for child in children:
    child.join(60)
alone = context.Process(target=read, args=(context.Barrier(1), answers))  # what they left in the cache
alone.start()
found.append(answers.get(timeout=120))
alone.join(60)
children.append(alone)
print(json.dumps({"found": found, "status": [child.exitcode for child in children]}))
"""


@pytest.mark.slow
def test_processes_that_fill_one_cache_at_once_read_the_same_and_leave_it_whole(tmp_path):
    save_tiny_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "rows").mkdir()
    for split, count in (("train", 200), ("validation", 32)):
        with (tmp_path / "rows" / f"{split}.csv").open("w", newline="") as stream:
            rows = [(f"a {['good', 'bad'][i % 2]} film {i}", i % 2) for i in range(count)]
            csv.writer(stream).writerows([("text", "label"), *rows])

    def read(processes: int, cache: str) -> dict[str, list]:
        environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / cache), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", PROGRAM, str(processes)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    alone = read(1, "own")["found"][0]
    together = read(PROCESSES, "shared")
    assert together == {"found": [alone] * (PROCESSES + 1), "status": [0] * (PROCESSES + 1)}
