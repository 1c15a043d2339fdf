"""Try PEFT's method comparison with the methods of lit_sparse on a tiny random Llama, without a GPU or a download.

Run:  PYTHONPATH=PEFT/src python trial.py PEFT/method_comparison/MetaMathQA [--steps 40] [--experiments METHOD/NAME …]

The suite's own run.py runs, with the adapter configurations of experiments/. Model and data sets are made in a
temporary folder: digits to repeat, in the form of MetaMathQA, GSM8K and finewiki. Without a GPU, which the suite
demands, it runs on the CPU, and every measurement of memory is zero. Nothing is written into the suite's folders.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER = "The answer is:"
WORDS, MARKS = ["<unk>", "</s>", "1", "2"], ["Answer:", ANSWER]
"""So few tokens that a random model's loss, about log 6, is below 2, as the suite demands of the pretrained model."""


def write_model(folder: Path) -> None:
    """A Llama of two layers, and a tokenizer that knows two digits."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    words = {word: number for number, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=WORDS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens(MARKS)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=WORDS[0], eos_token=WORDS[1])
    fast.save_pretrained(folder)
    set_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + len(MARKS),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def write_data(folder: Path) -> None:
    """The three data sets, as folders of the hub's names, which ``load_dataset`` prefers to the hub."""
    digits = random.Random(0)
    asked = [digits.choice(WORDS[2:]) for _ in range(800)]
    metamath = [
        {"query": f"Repeat {d}", "response": f"{ANSWER} {d}", "type": "digits", "original_question": d} for d in asked
    ]
    gsm8k = [{"question": f"Repeat {d}", "answer": f"#### {d}"} for d in asked]
    wiki = [{"text": " ".join(asked[i : i + 8])} for i in range(0, 800, 8)]
    _write_rows(folder / "meta-math" / "MetaMathQA" / "train.jsonl", metamath)
    _write_rows(folder / "openai" / "gsm8k" / "main" / "train.jsonl", gsm8k[:60])
    _write_rows(folder / "openai" / "gsm8k" / "main" / "test.jsonl", gsm8k[60:160])
    files = [{"split": split, "path": f"main/{split}.jsonl"} for split in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "main", "data_files": files}]})  # YAML is a superset of JSON
    (folder / "openai" / "gsm8k" / "README.md").write_text(f"---\n{card}\n---\n")
    _write_rows(folder / "HuggingFaceFW" / "finewiki" / "train.jsonl", wiki)


def _write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_experiment(source: Path, folder: Path, steps: int) -> None:
    """The experiment's adapter configuration, with settings of the training that fit the tiny model."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text((source / "adapter_config.json").read_text())
    training = {
        "model_id": "tiny",
        "max_steps": steps,
        "eval_steps": steps // 2,
        "optimizer_kwargs": {"lr": 1e-2, "weight_decay": 0.1},
        "generation_kwargs": {"max_length": 64, "max_new_tokens": 4},
    }
    (folder / "training_params.json").write_text(json.dumps(training))


def stand_in_for_a_gpu() -> None:
    """Pass the suite's check for a GPU where there is none."""
    import peft.utils
    import torch

    peft.utils.infer_device = lambda: "cuda"
    torch.cuda.reset_peak_memory_stats = lambda: None  # type: ignore[assignment, misc]
    torch.cuda.get_device_name = lambda _: platform.processor()  # type: ignore[assignment, misc]


def try_out(suite: Path, experiments: list[str], steps: int) -> list[dict[str, Any]]:
    """Run experiments in the current folder, which becomes that of model, data sets and results."""
    import torch
    from launch import launch, load_utils

    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        stand_in_for_a_gpu()
    utils = load_utils(suite)
    if not has_gpu:
        utils.device = "cpu:0"  # not "cpu": torch.cpu has no statistics of memory, torch.cuda says 0
    if sys.version_info < (3, 12):  # the suite passes an argument that came with 3.12
        utils.tempfile = SimpleNamespace(
            TemporaryDirectory=lambda delete, **options: tempfile.TemporaryDirectory(**options)  # noqa: ARG005
        )
    results = Path("results").resolve()
    results.mkdir()
    utils.RESULT_PATH = utils.RESULT_PATH_TEST = utils.RESULT_PATH_CANCELLED = str(results)
    write_model(Path("tiny"))
    write_data(Path())
    found = []
    for name in experiments:
        write_experiment(HERE / "experiments" / name, Path("experiments") / name, steps)
        launch(suite, ["-v", "--clean", f"experiments/{name}"])
        (file,) = results.glob("*.json")
        found.append(json.loads(file.read_text()))
        file.unlink()
    return found


def main() -> None:
    every = sorted(str(path.relative_to(HERE / "experiments")) for path in HERE.glob("experiments/*/*"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--experiments", nargs="+", choices=every, default=every)
    options = parser.parse_args()
    suite = options.suite.resolve()
    with tempfile.TemporaryDirectory() as folder:
        # Read when the packages are imported.
        os.environ |= {"HF_HOME": f"{folder}/cache", "HF_HUB_OFFLINE": "1"}
        os.chdir(folder)
        for result in try_out(suite, options.experiments, options.steps):
            info = result["train_info"]
            first, *_, last = info["metrics"]
            print(
                f"{result['run_info']['experiment_name']}: {info['status']}, train loss {first['train loss']:.3f} then "
                f"{last['train loss']:.3f}, test accuracy {last['test accuracy']:.2f}, forgetting "
                f"{last['forgetting']:.3f}, {info['num_trainable_params']} trained, {info['file_size']} bytes"
            )
        os.chdir(HERE)


if __name__ == "__main__":
    sys.exit(main())
