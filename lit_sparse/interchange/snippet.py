"""Code for the model card: load an exported folder and use it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from lit_sparse.interchange.metadata import name_of
from lit_sparse.interchange.processors import EXAMPLE, chat_format_of

_TOKENIZER = "tokenizer_config.json"
_TEMPLATE = "chat_template.jinja"
_CHAT = " --jinja --chat-template-file {}"  # that in base.gguf may be another
_PROCESSOR = ("preprocessor_config.json", "processor_config.json")


def labels_of(model: nn.Module) -> list[str] | None:
    """Names of the classes in order; None where the model only has LABEL_0, LABEL_1 and so on."""
    names = getattr(getattr(model, "config", None), "id2label", None)
    if not names or all(name == f"LABEL_{number}" for number, name in names.items()):
        return None
    return [names[number] for number in sorted(names)]


def snippet(
    form: str,
    model: nn.Module,
    base: str | None,
    place: str,
    is_repository: bool,
    files: Collection[str],
    vocabulary: int | None = None,
) -> str:
    """Python code that loads a folder and, if it has a tokenizer, runs the model on a text; for gguf, shell commands.

    Args:
        form: Format of the export.
        model: The exported model.
        base: Hub id or folder of the pretrained model; None where it was built in Python.
        place: The folder as the user named it, or the repository on the hub.
        is_repository: Whether ``place`` is on the hub.
        files: Names of the files in the folder.
        vocabulary: Rows that embeddings must have before PEFT loads the folder; None: as many as they have.
    """
    if form == "gguf":
        template = _TEMPLATE in files and chat_format_of(model) is not None
        return _commands(base, place, is_repository, [_TEMPLATE] if template else [])
    kind = type(model).__name__
    has_tokenizer = _TOKENIZER in files and getattr(model, "main_input_name", "") == "input_ids"
    if form in ("sparse", "delta") and has_tokenizer and base is not None and hasattr(transformers, kind):
        backbone = f", backbone={_quoted(base)}" if is_repository and base != name_of(model) else ""
        loaded = [
            f"found = ls.from_pretrained({_quoted(place)}{backbone})",
            "model, tokenizer = found.model, found.tokenizer",
        ]
        return "\n".join(["import lit_sparse as ls", "", *loaded, *_use(model)])
    home = "transformers" if hasattr(transformers, kind) else type(model).__module__
    imports = {f"from {home} import {kind}"}
    lines = [] if form == "merged" else _base(model, base)
    if form == "merged":
        lines.append(f"model = {kind}.from_pretrained({_quoted(place)})")
    elif form == "peft":
        imports.add("from peft import PeftModel")
        if vocabulary is not None:
            lines.append(f"model.resize_token_embeddings({vocabulary}, mean_resizing=False)  # the folder has the rows")
        lines.append(f"model = PeftModel.from_pretrained(model, {_quoted(place)})")
    else:
        imports.add("import lit_sparse as ls")
        where = _quoted(place)
        if is_repository:
            imports.add("from huggingface_hub import snapshot_download")
            where = f"snapshot_download({where})"
        lines.append(f"ls.load_adapter(model, {where})")
    lines.append("model.eval()")
    if has_tokenizer:
        imports.add("from transformers import AutoTokenizer")
        lines += ["", f"tokenizer = AutoTokenizer.from_pretrained({_quoted(place)})", *_use(model)]
    elif any(name in files for name in _PROCESSOR):
        loader = "AutoImageProcessor" if model.main_input_name == "pixel_values" else "AutoFeatureExtractor"
        imports.add(f"from transformers import {loader}")
        lines += ["", f"processor = {loader}.from_pretrained({_quoted(place)})"]
    return "\n".join([*sorted(imports, key=lambda line: (not line.startswith("import "), line)), "", *lines])


def _commands(base: str | None, place: str, is_repository: bool, template: list[str]) -> str:
    """Shell commands that convert the base model to GGUF and run llama.cpp with the LoRA and its chat template."""
    source = base or "BASE"
    remote = "" if base is None or Path(base).exists() else "--remote "
    names = ["adapter.gguf", *template]
    lora, *chat = [shlex.quote(name if is_repository else f"{place}/{name}") for name in names]
    lines = ["# convert_hf_to_gguf.py and llama-cli are llama.cpp's"]
    lines.append(f"python convert_hf_to_gguf.py {remote}{shlex.quote(source)} --outfile base.gguf")
    if is_repository:
        lines.append(f"hf download {shlex.quote(place)} {' '.join(names)} --local-dir .")
    return "\n".join([*lines, f"llama-cli -m base.gguf --lora {lora}" + "".join(_CHAT.format(file) for file in chat)])


def _base(model: nn.Module, base: str | None) -> list[str]:
    kind = type(model).__name__
    if base is None or not isinstance(model, PreTrainedModel):
        return [f"model = ...  # a {kind}, built as it was for training"]
    lines, arguments = [], [_quoted(base), f"dtype={_quoted(str(model.dtype).removeprefix('torch.'))}"]
    labels, count = labels_of(model), getattr(model.config, "num_labels", 2)
    if labels is not None:
        lines.append(f"labels = {json.dumps(labels, ensure_ascii=False)}")
        arguments += ["id2label=dict(enumerate(labels))", "label2id={name: i for i, name in enumerate(labels)}"]
    elif count != 2:  # what transformers assumes
        arguments.append(f"num_labels={count}")
    if _has_several_labels(model):
        arguments.append('problem_type="multi_label_classification"')
    if len(arguments) > 2:
        arguments.append("ignore_mismatched_sizes=True")  # the base may have a head for another task
    inside = "".join(f"    {argument},\n" for argument in arguments)
    return [*lines, f"model = {kind}.from_pretrained(\n{inside})"]


def _has_several_labels(model: Any) -> bool:
    return getattr(model.config, "problem_type", None) == "multi_label_classification"


def _use(model: Any) -> list[str]:
    inputs = ['inputs = tokenizer("An example of a text.", return_tensors="pt")']
    if chat_format_of(model) is not None:
        options = 'add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        inputs = [f"turns = {json.dumps(EXAMPLE)}", f"inputs = tokenizer.apply_chat_template(turns, {options})"]
    if model.can_generate():
        return [*inputs, "tokens = model.generate(**inputs, max_new_tokens=20)", "print(tokenizer.decode(tokens[0]))"]
    kind, count = type(model).__name__, getattr(model.config, "num_labels", 2)
    if kind in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values():
        shown = "logits.item()" if count == 1 else "model.config.id2label[logits.argmax(-1).item()]"
        if _has_several_labels(model):
            shown = "[model.config.id2label[i] for i, p in enumerate(logits[0].sigmoid().tolist()) if p > 0.5]"
        return [*inputs, "logits = model(**inputs).logits", f"print({shown})"]
    if kind in modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values():
        tags = "[model.config.id2label[i] for i in model(**inputs).logits.argmax(-1)[0].tolist()]"
        return [*inputs, f"print({tags})"]
    if kind in modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        return []
    return [*inputs, "print(model(**inputs))"]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
