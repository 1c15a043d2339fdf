"""What a user has on disk: a configuration for the command line, and what a run left there."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml


def write_config(file: Path, model: dict[str, Any], data: dict[str, Any], lr: float, **trainer: Any) -> str:
    """Write a configuration of LoRA on every linear layer that logs to ``runs`` and keeps ``kept/last.ckpt``."""
    adamw = {"class_path": "torch.optim.AdamW", "init_args": {"lr": lr}}
    lora = {"class_path": "lit_sparse.LoRA", "init_args": {"rank": 8}}
    model = {**model, "init_args": {"method": lora, "optimizer": adamw, **model["init_args"]}}
    kept = {"dirpath": "kept", "filename": "last"}
    settings = {
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "runs"}},
        "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": kept}],
        **trainer,
    }
    config = {"seed_everything": 0, "model": model, "data": data, "trainer": settings}
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return str(file)


def last_figures(folder: str | Path = "runs") -> dict[str, float]:
    """The last value of each figure in the newest log."""
    file = max(Path(folder).rglob("metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("version_")))
    with file.open(encoding="utf-8") as stream:
        return {key: float(value) for row in csv.DictReader(stream) for key, value in row.items() if value}


def read_lines(file: str | Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON Lines."""
    return [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]
