"""The settings that all kinds of PEFT's adapters have in ``adapter_config.json``."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from torch import nn
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from lit_sparse.errors import UsageError, listed
from lit_sparse.interchange.peft_readback import ELSE
from lit_sparse.interchange.remains import plain_name

# PEFT's task type, transformers' models for it, and the modules that PEFT's model for the task always saves whole.
_TASKS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("SEQ_CLS", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES", ("classifier", "score")),
    ("TOKEN_CLS", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES", ("classifier", "score")),
    ("QUESTION_ANS", "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES", ("qa_outputs",)),
    ("SEQ_2_SEQ_LM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", ()),
    ("CAUSAL_LM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", ()),
)


def common_config(model: nn.Module, layers: list[str], saved: list[str], parameters: Collection[str]) -> dict[str, Any]:
    """The settings, for ``PeftConfig``.

    Args:
        model: The model with its adapters.
        layers: Full names of the adapted layers and parameters.
        saved: Names of the modules that are saved whole.
        parameters: Those of ``layers`` that are parameters.

    Raises:
        UsageError: If PEFT would take other modules for those that are saved whole.
    """
    names = list(dict.fromkeys(plain_name(model, name) for name, _ in model.named_modules() if name))
    task, unasked = _task(model)
    if any(_excluded(name, unasked) for name in layers) or any(n.endswith(unasked) for n in names if n not in saved):
        task = None  # PEFT's model for the task would not adapt these layers, or miss those modules
    _require_saved_exactly(saved, names, layers)
    frozen = [m for name in layers if isinstance(m := getattr(model.get_submodule(name), "base", None), nn.Module)]
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "inference_mode": True,
        "fan_in_fan_out": any(isinstance(module, Conv1D) for module in frozen),
        "target_modules": _targets(names, [name for name in layers if name not in parameters]),
        "modules_to_save": saved or None,
    }


def task_of(kind: str) -> str | None:
    """PEFT's name of the task of a class of models; None if it has none."""
    found = (task for task, models, _ in _TASKS if kind in _flat(getattr(modeling_auto, models).values()))
    return next(found, None)


def _task(model: nn.Module) -> tuple[str | None, tuple[str, ...]]:
    kind = type(model).__name__
    task = task_of(kind)
    if task is not None:
        return task, next(unasked for name, _, unasked in _TASKS if name == task)
    if kind in _flat(modeling_auto.MODEL_MAPPING_NAMES.values()) and model.main_input_name == "input_ids":
        return "FEATURE_EXTRACTION", ()
    return None, ()


def _flat(names: Iterable[str | Sequence[str]]) -> set[str]:
    return {name for entry in names for name in ([entry] if isinstance(entry, str) else entry)}


def _targets(names: Collection[str], layers: list[str]) -> list[str] | str:
    """The full names; if another layer's name ends with one of them, one pattern for all."""
    meant = set(layers)
    found = {name for name in names if name in meant or any(name.endswith(f".{target}") for target in meant)}
    return layers if found == meant else "|".join(re.escape(name) for name in layers)


def _excluded(name: str, saved: Collection[str]) -> bool:
    """PEFT's rule: nothing is adapted in a module that is saved whole."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in saved)


def _require_saved_exactly(saved: Collection[str], names: Collection[str], ranks: Collection[str]) -> None:
    # PEFT compares the ends of names, even within a word.
    mistaken = [name for name in names if name not in saved and any(name.endswith(module) for module in saved)]
    mistaken += [name for name in ranks if _excluded(name, saved)]
    if mistaken:
        raise UsageError(
            f"The head {listed(saved)} cannot be written for PEFT, which would take {listed(mistaken)} for it. Export "
            f"with_head=False, or: {ELSE}"
        )
