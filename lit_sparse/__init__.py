"""Sparse adapters for Hugging Face models, trained with PyTorch Lightning.

The public names are loaded on first use, so that ``import lit_sparse`` costs milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

from lit_sparse._version import __version__ as __version__

if TYPE_CHECKING:
    from lit_sparse import functional as functional
    from lit_sparse.adapters.base import LowRankAdapter as LowRankAdapter
    from lit_sparse.adapters.compaction import compact as compact
    from lit_sparse.adapters.compiled import compile_blocks as compile_blocks
    from lit_sparse.adapters.injection import adapters_in as adapters_in
    from lit_sparse.adapters.injection import disable_adapters as disable_adapters
    from lit_sparse.adapters.injection import inject as inject
    from lit_sparse.adapters.linear import LowRankLinear as LowRankLinear
    from lit_sparse.adapters.merging import merge as merge
    from lit_sparse.adapters.merging import unload as unload
    from lit_sparse.adapters.merging import unmerge as unmerge
    from lit_sparse.adapters.token_rows import add_tokens as add_tokens
    from lit_sparse.callbacks.checkpoint import SparseCheckpoint as SparseCheckpoint
    from lit_sparse.callbacks.checkpoint_files import last_checkpoint as last_checkpoint
    from lit_sparse.callbacks.compaction import CompactRanks as CompactRanks
    from lit_sparse.callbacks.ending import summary as summary
    from lit_sparse.callbacks.finite_loss import FiniteLoss as FiniteLoss
    from lit_sparse.callbacks.forgetting import ForgettingProbe as ForgettingProbe
    from lit_sparse.callbacks.monitor import SparsityMonitor as SparsityMonitor
    from lit_sparse.callbacks.predictions import PredictionWriter as PredictionWriter
    from lit_sparse.callbacks.replicas import VerifyReplicas as VerifyReplicas
    from lit_sparse.callbacks.requeue import SlurmRequeue as SlurmRequeue
    from lit_sparse.callbacks.resume import ExactResume as ExactResume
    from lit_sparse.callbacks.samples import GenerationSamples as GenerationSamples
    from lit_sparse.callbacks.sparsify import Sparsify as Sparsify
    from lit_sparse.callbacks.stages import ThresholdStages as ThresholdStages
    from lit_sparse.data.audio import AudioData as AudioData
    from lit_sparse.data.chat import ChatData as ChatData
    from lit_sparse.data.glue import GLUE as GLUE
    from lit_sparse.data.images import ImageData as ImageData
    from lit_sparse.data.instructions import InstructionData as InstructionData
    from lit_sparse.data.masked_language_modeling import MaskedLMData as MaskedLMData
    from lit_sparse.data.multiple_choice import MultipleChoiceData as MultipleChoiceData
    from lit_sparse.data.preferences import PreferenceData as PreferenceData
    from lit_sparse.data.question_answering import QuestionAnsweringData as QuestionAnsweringData
    from lit_sparse.data.reasoning import ReasoningData as ReasoningData
    from lit_sparse.data.reviews import QuickstartReviews as QuickstartReviews
    from lit_sparse.data.seq2seq import Seq2SeqData as Seq2SeqData
    from lit_sparse.data.text_classification import TextClassificationData as TextClassificationData
    from lit_sparse.data.token_classification import TokenClassificationData as TokenClassificationData
    from lit_sparse.editing.data import EditingData as EditingData
    from lit_sparse.editing.editor import Editor as Editor
    from lit_sparse.editing.one_fact import edit_fact as edit_fact
    from lit_sparse.editing.training import FineTuning as FineTuning
    from lit_sparse.errors import TrainingError as TrainingError
    from lit_sparse.errors import UsageError as UsageError
    from lit_sparse.interchange.card import ExportReport as ExportReport
    from lit_sparse.interchange.card import Provenance as Provenance
    from lit_sparse.interchange.export import ExportOptions as ExportOptions
    from lit_sparse.interchange.gguf_export import export_gguf as export_gguf
    from lit_sparse.interchange.merged_folder import export_merged as export_merged
    from lit_sparse.interchange.peft_export import export_peft as export_peft
    from lit_sparse.interchange.peft_import import load_peft as load_peft
    from lit_sparse.interchange.sparse_folder import export_delta as export_delta
    from lit_sparse.interchange.sparse_folder import load_adapter as load_adapter
    from lit_sparse.interchange.sparse_folder import save_adapter as save_adapter
    from lit_sparse.methods.base import SparseMethod as SparseMethod
    from lit_sparse.methods.gated_roselora import GatedRoseLoRA as GatedRoseLoRA
    from lit_sparse.methods.lora import LoRA as LoRA
    from lit_sparse.methods.roselora import RoseLoRA as RoseLoRA
    from lit_sparse.methods.sora import SoRA as SoRA
    from lit_sparse.methods.start import start_from_gradients as start_from_gradients
    from lit_sparse.methods.step import Step as Step
    from lit_sparse.methods.stepping import SparseSteps as SparseSteps
    from lit_sparse.methods.truncation import truncate as truncate
    from lit_sparse.modules.base import SparseModule as SparseModule
    from lit_sparse.modules.classification import SequenceClassification as SequenceClassification
    from lit_sparse.modules.language_modeling import CausalLM as CausalLM
    from lit_sparse.modules.masked_language_modeling import MaskedLM as MaskedLM
    from lit_sparse.modules.media_classification import AudioClassification as AudioClassification
    from lit_sparse.modules.media_classification import ImageClassification as ImageClassification
    from lit_sparse.modules.multiple_choice import MultipleChoice as MultipleChoice
    from lit_sparse.modules.optimization import parameter_groups as parameter_groups
    from lit_sparse.modules.preferences import PreferenceLM as PreferenceLM
    from lit_sparse.modules.question_answering import QuestionAnswering as QuestionAnswering
    from lit_sparse.modules.seq2seq import Seq2SeqLM as Seq2SeqLM
    from lit_sparse.modules.token_classification import TokenClassification as TokenClassification
    from lit_sparse.reporting.plotting import plot_curves as plot_curves
    from lit_sparse.reporting.plotting import plot_gates as plot_gates
    from lit_sparse.reporting.plotting import plot_ranks as plot_ranks
    from lit_sparse.reporting.plotting import plot_support as plot_support
    from lit_sparse.reporting.report import write_report as write_report
    from lit_sparse.serving.bank import AdapterBank as AdapterBank
    from lit_sparse.serving.from_checkpoint import export_checkpoint as export_checkpoint
    from lit_sparse.serving.pretrained import Pretrained as Pretrained
    from lit_sparse.serving.pretrained import from_pretrained as from_pretrained
    from lit_sparse.strategies.fsdp import SparseFSDPStrategy as SparseFSDPStrategy
    from lit_sparse.strategies.fsdp2 import SparseFSDP2Strategy as SparseFSDP2Strategy

_HOME = {
    "LowRankAdapter": "adapters.base",
    "compact": "adapters.compaction",
    "compile_blocks": "adapters.compiled",
    "adapters_in": "adapters.injection",
    "disable_adapters": "adapters.injection",
    "inject": "adapters.injection",
    "LowRankLinear": "adapters.linear",
    "merge": "adapters.merging",
    "unload": "adapters.merging",
    "unmerge": "adapters.merging",
    "add_tokens": "adapters.token_rows",
    "AdapterBank": "serving.bank",
    "CompactRanks": "callbacks.compaction",
    "summary": "callbacks.ending",
    "FiniteLoss": "callbacks.finite_loss",
    "ForgettingProbe": "callbacks.forgetting",
    "SparsityMonitor": "callbacks.monitor",
    "PredictionWriter": "callbacks.predictions",
    "VerifyReplicas": "callbacks.replicas",
    "SlurmRequeue": "callbacks.requeue",
    "ExactResume": "callbacks.resume",
    "GenerationSamples": "callbacks.samples",
    "last_checkpoint": "callbacks.checkpoint_files",
    "SparseCheckpoint": "callbacks.checkpoint",
    "Sparsify": "callbacks.sparsify",
    "ThresholdStages": "callbacks.stages",
    "AudioData": "data.audio",
    "ChatData": "data.chat",
    "GLUE": "data.glue",
    "ImageData": "data.images",
    "InstructionData": "data.instructions",
    "MaskedLMData": "data.masked_language_modeling",
    "MultipleChoiceData": "data.multiple_choice",
    "PreferenceData": "data.preferences",
    "QuestionAnsweringData": "data.question_answering",
    "ReasoningData": "data.reasoning",
    "QuickstartReviews": "data.reviews",
    "Seq2SeqData": "data.seq2seq",
    "TextClassificationData": "data.text_classification",
    "TokenClassificationData": "data.token_classification",
    "EditingData": "editing.data",
    "Editor": "editing.editor",
    "edit_fact": "editing.one_fact",
    "FineTuning": "editing.training",
    "TrainingError": "errors",
    "UsageError": "errors",
    "export_checkpoint": "serving.from_checkpoint",
    "Pretrained": "serving.pretrained",
    "from_pretrained": "serving.pretrained",
    "Provenance": "interchange.card",
    "ExportReport": "interchange.card",
    "ExportOptions": "interchange.export",
    "export_merged": "interchange.merged_folder",
    "export_gguf": "interchange.gguf_export",
    "export_peft": "interchange.peft_export",
    "load_peft": "interchange.peft_import",
    "export_delta": "interchange.sparse_folder",
    "load_adapter": "interchange.sparse_folder",
    "save_adapter": "interchange.sparse_folder",
    "SparseMethod": "methods.base",
    "Step": "methods.step",
    "start_from_gradients": "methods.start",
    "GatedRoseLoRA": "methods.gated_roselora",
    "LoRA": "methods.lora",
    "RoseLoRA": "methods.roselora",
    "SoRA": "methods.sora",
    "SparseSteps": "methods.stepping",
    "truncate": "methods.truncation",
    "SparseModule": "modules.base",
    "SequenceClassification": "modules.classification",
    "CausalLM": "modules.language_modeling",
    "MaskedLM": "modules.masked_language_modeling",
    "AudioClassification": "modules.media_classification",
    "ImageClassification": "modules.media_classification",
    "MultipleChoice": "modules.multiple_choice",
    "parameter_groups": "modules.optimization",
    "PreferenceLM": "modules.preferences",
    "QuestionAnswering": "modules.question_answering",
    "Seq2SeqLM": "modules.seq2seq",
    "TokenClassification": "modules.token_classification",
    "plot_curves": "reporting.plotting",
    "plot_gates": "reporting.plotting",
    "plot_ranks": "reporting.plotting",
    "plot_support": "reporting.plotting",
    "write_report": "reporting.report",
    "SparseFSDPStrategy": "strategies.fsdp",
    "SparseFSDP2Strategy": "strategies.fsdp2",
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
    return sorted({"__version__", *_HOME, "functional"})
