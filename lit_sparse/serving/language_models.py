"""Open a causal language model from wherever it is stored: a checkpoint, the folder of an adapter, or a whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from lit_sparse.adapters.injection import adapters_in
from lit_sparse.adapters.token_rows import token_record
from lit_sparse.data.chat_template import ChatTemplate
from lit_sparse.data.tokenizers import load_tokenizer
from lit_sparse.errors import UsageError
from lit_sparse.interchange.metadata import METADATA, means_path
from lit_sparse.interchange.peft_folder import CONFIG, read_peft
from lit_sparse.interchange.peft_import import install
from lit_sparse.interchange.processors import chat_format_of, has_processor, keep_chat_format, processor_of
from lit_sparse.interchange.sparse_folder import load_adapter
from lit_sparse.interchange.stored_folder import read_folder
from lit_sparse.modules import checkpoint as checkpoints
from lit_sparse.modules.backbone import load_backbone
from lit_sparse.serving.from_checkpoint import import_named, restore

_WANTED = "Give a checkpoint file, the folder of an adapter, or the folder or hub id of a causal language model"


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model with its adapters live, not merged.

    Args:
        name: The source as the user named it.
        model: In evaluation mode, on the accelerator if there is one.
        tokenizer: Of the model, with the tokens that training added.
    """

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase

    def require_comparable(self) -> None:
        """Raise a UsageError unless the adapters can be switched off."""
        adapters = [adapter for _, adapter in adapters_in(self.model)]
        if not adapters:
            raise UsageError(
                f"compare switches adapters off, and {self.name!r} has none that are live. Give the checkpoint of a "
                "run, or an adapter's folder of the format peft or sparse."
            )
        if any(adapter.took_from_weight for adapter in adapters):
            raise UsageError(
                f"compare switches adapters off, and those of {self.name!r} started as a part of the weights "
                "(init_weights 'pissa' or 'lora_ga'). Ask the backbone itself for its answers."
            )


def open_language_model(
    source: str,
    backbone: str | None = None,
    import_modules: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model for inference.

    Weights have the dtype of the run that wrote the checkpoint, or else that of the files.

    Args:
        source: A checkpoint file; a folder in PEFT's format or of ``save_adapter`` or ``export_delta``; a folder or hub
            id of a whole model.
        backbone: Name or folder of the adapter's backbone; None: the one that the source names.
        import_modules: Modules to import first, with the classes that a checkpoint names.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        UsageError: If the source cannot be read, names no backbone, or is no causal language model.
    """
    import_named(import_modules)
    path = Path(source)
    is_whole = (path / "config.json").is_file()
    if path.is_file():
        found = _from_checkpoint(path, backbone, trust_remote_code)
    elif (path / CONFIG).is_file() or ((path / METADATA).is_file() and not is_whole):
        found = _from_adapter(path, backbone, trust_remote_code)
    elif path.is_dir() and not is_whole:
        raise UsageError(f"{source!r} holds neither adapters nor a model. {_WANTED}.")
    elif not path.exists() and ((means_path(source) and "://" not in source) or path.suffix == ".ckpt"):
        raise UsageError(f"{source!r} does not exist. {_WANTED}.")
    elif backbone is not None:
        raise UsageError(f"backbone is for a checkpoint or an adapter, and {source!r} is a whole model: leave it out.")
    else:
        found = _load(source, trust_remote_code), load_tokenizer(source)
    model, tokenizer = found
    if tokenizer.chat_template:
        # A backbone that was only pretrained does not know the token that ends a turn.
        keep_chat_format(model, ChatTemplate(tokenizer).format)
    model.eval().requires_grad_(False)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and model.device.type != accelerator.type:
        model.to(accelerator)
    return LanguageModel(source, model, tokenizer)


def _from_checkpoint(path: Path, backbone: str | None, trust_remote_code: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    if path.suffix in (".safetensors", ".gguf"):
        raise UsageError(f"{str(path)!r} is one file of a folder: give the folder, {str(path.parent)!r}.")
    module = restore(checkpoints.read(path), path, backbone, trust_remote_code)
    model = _require_causal(module.model, str(path))
    tokenizer, chat = load_tokenizer(processor_of(model) or module.backbone, _added_texts(model)), chat_format_of(model)
    if chat is not None:
        tokenizer.chat_template = chat["template"]
    return model, tokenizer


def _from_adapter(path: Path, backbone: str | None, trust_remote_code: bool) -> tuple[Any, PreTrainedTokenizerBase]:
    lora = read_peft(path) if (path / CONFIG).is_file() else None
    entries = read_folder(path).entries if lora is None else lora.config
    named = backbone or entries.get("base_model_name_or_path")
    if not named:
        raise UsageError(f"{str(path)!r} does not name the model that it was trained on: give it as backbone.")
    model = _load(named, trust_remote_code)
    if lora is None:
        load_adapter(model, path)
    else:
        install(model, lora)
    if has_processor(path):
        return model, load_tokenizer(str(path))
    return model, load_tokenizer(named, _added_texts(model))


def _load(name: str, trust_remote_code: bool) -> Any:
    # The class that the model itself names: AutoModelForCausalLM gives a classifier a new head of random numbers.
    loader = AutoModelForCausalLM if trust_remote_code else None
    arguments = {"trust_remote_code": True} if trust_remote_code else {}
    return _require_causal(load_backbone(name, loader, dtype="auto", **arguments), name)


def _require_causal(model: Any, name: str) -> Any:
    generates = getattr(model, "can_generate", None)
    if generates is None or not generates() or getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"{name!r} is of a {type(model).__name__}, which does not continue a text. {_WANTED}.")
    return model


def _added_texts(model: nn.Module) -> list[str]:
    """The tokens that training added, in the order of their numbers."""
    numbered = {
        i: text
        for entry in token_record(model).values()
        for i, text in zip(entry["ids"], entry["texts"], strict=False)
        if text
    }
    return [numbered[i] for i in sorted(numbered)]
