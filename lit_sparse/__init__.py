"""Sparse adapters for Hugging Face models, trained with PyTorch Lightning.

The public names are loaded on first use, so that ``import lit_sparse`` costs milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lit_sparse._version import __version__ as __version__

if TYPE_CHECKING:
    from lit_sparse import functional as functional
    from lit_sparse.adapters.injection import adapters_in as adapters_in
    from lit_sparse.adapters.injection import disable_adapters as disable_adapters
    from lit_sparse.adapters.injection import inject as inject
    from lit_sparse.adapters.linear import LowRankLinear as LowRankLinear
    from lit_sparse.callbacks.finite_loss import FiniteLoss as FiniteLoss
    from lit_sparse.callbacks.monitor import SparsityMonitor as SparsityMonitor
    from lit_sparse.callbacks.predictions import PredictionWriter as PredictionWriter
    from lit_sparse.callbacks.sparsify import Sparsify as Sparsify
    from lit_sparse.data.glue import GLUE as GLUE
    from lit_sparse.data.instructions import InstructionData as InstructionData
    from lit_sparse.data.reviews import QuickstartReviews as QuickstartReviews
    from lit_sparse.data.text_classification import TextClassificationData as TextClassificationData
    from lit_sparse.errors import TrainingError as TrainingError
    from lit_sparse.errors import UsageError as UsageError
    from lit_sparse.methods.base import SparseMethod as SparseMethod
    from lit_sparse.methods.base import Step as Step
    from lit_sparse.methods.gated_roselora import GatedRoseLoRA as GatedRoseLoRA
    from lit_sparse.methods.lora import LoRA as LoRA
    from lit_sparse.methods.roselora import RoseLoRA as RoseLoRA
    from lit_sparse.methods.sora import SoRA as SoRA
    from lit_sparse.modules.base import SparseModule as SparseModule
    from lit_sparse.modules.classification import SequenceClassification as SequenceClassification
    from lit_sparse.modules.language_modeling import CausalLM as CausalLM
    from lit_sparse.modules.optimization import parameter_groups as parameter_groups
    from lit_sparse.plotting import plot_ranks as plot_ranks

_HOME = {
    "adapters_in": "adapters.injection",
    "disable_adapters": "adapters.injection",
    "inject": "adapters.injection",
    "LowRankLinear": "adapters.linear",
    "FiniteLoss": "callbacks.finite_loss",
    "SparsityMonitor": "callbacks.monitor",
    "PredictionWriter": "callbacks.predictions",
    "Sparsify": "callbacks.sparsify",
    "GLUE": "data.glue",
    "InstructionData": "data.instructions",
    "QuickstartReviews": "data.reviews",
    "TextClassificationData": "data.text_classification",
    "TrainingError": "errors",
    "UsageError": "errors",
    "SparseMethod": "methods.base",
    "Step": "methods.base",
    "GatedRoseLoRA": "methods.gated_roselora",
    "LoRA": "methods.lora",
    "RoseLoRA": "methods.roselora",
    "SoRA": "methods.sora",
    "SparseModule": "modules.base",
    "SequenceClassification": "modules.classification",
    "CausalLM": "modules.language_modeling",
    "parameter_groups": "modules.optimization",
    "plot_ranks": "plotting",
}


def __getattr__(name: str) -> Any:
    if name == "functional":
        return importlib.import_module("lit_sparse.functional")
    if name not in _HOME:
        raise AttributeError(f"module 'lit_sparse' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"lit_sparse.{_HOME[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, "functional"})
