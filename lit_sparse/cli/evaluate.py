"""``lit-sparse evaluate SOURCE --tasks …``: judge a language model by the tasks of lm-eval, its adapters live."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from lit_sparse.errors import UsageError
from lit_sparse.reporting.table import aligned
from lit_sparse.serving.benchmarks import Settings, evaluate
from lit_sparse.serving.language_models import open_language_model
from lit_sparse.verbosity import show

_KEPT = ("n-shot", "versions", "n-samples")  # what else the file has of lm-eval's report


def evaluate_source(
    source: str,
    tasks: str,
    compare: bool = False,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    batch_size: int | Literal["auto"] = 1,
    apply_chat_template: bool = False,
    output: str | None = None,
    backbone: str | None = None,
    import_modules: list[str] | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Print a table of metrics.

    Args:
        source: A checkpoint file, an adapter's folder, or the folder or hub id of a model.
        tasks: Names of tasks or groups of tasks, with commas between them.
        compare: Evaluate without the adapters too.
        include_path: Folder with further tasks as YAML files. A file may name Python functions, which are run.
        num_fewshot: Examples before each question; null: what the task says.
        limit: Rows of each task: a number, or a share below 1; null: all.
        batch_size: Rows at a time; auto: as many as fit into memory.
        apply_chat_template: Ask each question as a turn of the user, in the model's chat format.
        output: JSON file to write: the metrics and how they were measured.
        backbone: Name or folder of the adapter's backbone, if it has moved since the run.
        import_modules: Your Python modules to import first, with the classes that the checkpoint names.
        trust_remote_code: Let transformers run the code in the model's folder.

    Raises:
        UsageError: If the source is no causal language model, a task is not known or its data cannot be loaded, an
            option is outside its range, a chat template is asked for that the tokenizer lacks, or lm-eval is not
            installed.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    settings = Settings(names, include_path, num_fewshot, limit, batch_size, apply_chat_template)
    if output is not None and not Path(output).parent.is_dir():
        raise UsageError(f"The folder of output={output!r} does not exist. Create it first.")
    model = open_language_model(source, backbone, import_modules or (), trust_remote_code)
    if compare:
        model.require_comparable()
    found = {"results": evaluate(model, settings)}
    if compare:
        found["results_without_adapters"] = evaluate(model, settings, adapters=False)
    sys.stdout.write(_table([part["results"] for part in found.values()], found["results"]["n-shot"]) + "\n")
    if output is not None:
        how = {key: found["results"].get(key) for key in _KEPT}
        how |= {"source": source, "limit": limit, "lm_eval_version": found["results"].get("lm_eval_version")}
        written = {**how, **{key: part["results"] for key, part in found.items()}}
        Path(output).write_text(json.dumps(written, indent=2, default=str) + "\n", encoding="utf-8")
        show(f"Wrote {output}.")


def _table(results: Sequence[Mapping[str, Mapping[str, Any]]], shots: Mapping[str, int]) -> str:
    """A line for every metric of every task; results with adapters come first, those without them second."""
    heads = ["with adapters", "± s.e.", "without", "± s.e."] if len(results) > 1 else ["value", "± s.e."]
    rows = [["task", "metric", "shots", *heads]]
    for task, metrics in results[0].items():
        for key in sorted(metrics):
            name, _, kind = key.partition(",")
            if not kind or name.endswith("_stderr"):
                continue
            label = name if kind == "none" else f"{name} ({kind})"
            errors = f"{name}_stderr,{kind}"
            values = [part[task].get(column) for part in results for column in (key, errors)]
            rows.append([str(metrics.get("alias", task)), label, str(shots.get(task, "")), *map(_cell, values)])
    lines = aligned(rows, left=2)
    rule = "─" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def _cell(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else "" if value is None or value == "N/A" else str(value)
